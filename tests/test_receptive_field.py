import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import vgg16
from torchvision.ops import SqueezeExcitation

from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import build_backbone
from rpn_train.errors import ConfigError
from rpn_train.heads import RPNHead
from rpn_train.inspect.receptive_field import (
    EffectiveField,
    ReceptiveField,
    dependence,
    effective_fields,
    fields_of,
    larger_anchors,
    receptive_fields,
)
from rpn_train.model import RPN


def rpn(name, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(name, weights=None, norm="bn", frozen_stages=0, **options)
        return with_head(backbone, backbone.strides)


def with_head(backbone, strides):
    grid = AnchorGrid(((32.0,),) * len(strides), (1.0,), strides, rounded=True)
    return RPN(backbone, grid, partial(RPNHead, num_convs=1, channels=None))


def conv(kernel, stride=1, padding=0, **options):
    return nn.Conv2d(3, 3, kernel, stride, padding, **options)


def field(*layers, stride=1):
    network = nn.Sequential(*layers).eval()
    return fields_of(lambda images: [network(images)], [stride])[0]


def gradient_support(map_, cell, images):
    """First and last column of the image on which a column of cells depends."""
    (gradient,) = torch.autograd.grad(map_[..., cell].sum(), images, retain_graph=True)
    columns = gradient.abs().amax((0, 1, 2)).nonzero()
    return [columns.min().item(), columns.max().item()]


def test_the_networks_of_the_paper():
    """Ren et al. 2015, section 3.1: 171 px for ZF and 228 for VGG, with the 3x3 of the RPN."""
    zf = [conv(7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(5, 2, 2), nn.MaxPool2d(3, 2, 1)]
    zf += [conv(3, 1, 1), conv(3, 1, 1), conv(3, 1, 1)]
    # each layer adds kernel - 1 times the stride before it: 1 + 6 + 4 + 16 + 16 + 3 x 32
    assert field(*zf, stride=16).size == (139, 139)
    assert field(*zf, conv(3, 1, 1), stride=16).size == (171, 171)
    with torch.device("meta"):  # no weight is read
        conv5_3 = vgg16().features[:30]
        model = rpn("vgg16")
    # cell 0 sees -90 to 105, whose middle is at 8: half a stride from its anchors
    assert field(conv5_3, stride=16) == ReceptiveField(16, (196, 196), (8, 8))
    assert receptive_fields(model) == [ReceptiveField(16, (228, 228), (8, 8))]


@pytest.mark.parametrize(
    ("layer", "size", "centre"),
    [
        (nn.Identity(), (1, 1), (0.5, 0.5)),
        (conv((3, 7), 1, (1, 3), dilation=(2, 1)), (5, 7), (1.5, 0.5)),  # rows -1 to 3
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 3), (0.5, 0.5)),
        (conv(3, 1, 700, dilation=700), (1401, 1401), (0.5, 0.5)),  # the first length is too short
        (nn.ZeroPad2d((1400, 0, 0, 2)), (1, 1), (0.5, -1399.5)),  # so is the second
        (nn.AvgPool2d(3, 1, 1), (3, 3), (0.5, 0.5)),
        (nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.Hardswish()), (3, 3), (1.5, 1.5)),
        (nn.Sequential(conv(3, 1, 1), nn.GroupNorm(1, 3)), (3, 3), (0.5, 0.5)),
        (nn.Sequential(conv(3, 1, 1), SqueezeExcitation(3, 2)), (3, 3), (0.5, 0.5)),
    ],
)
def test_one_layer(layer, size, centre):
    assert field(layer) == ReceptiveField(1, size, centre)


def test_padding_is_no_pixel():
    layers = [conv(3, 1, 1), nn.ZeroPad2d((2, 0, 0, 0))]
    inner, padded = (dependence(lambda x, f=f: [f(x)], (1, 4), axis=1)[0] for f in layers)
    assert inner.tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert padded.tolist() == [[math.inf, -math.inf]] * 2 + [[i, i] for i in range(4)]


def test_writing_into_a_part():
    def network(images):
        x = F.relu(images)
        x[..., 2:].add_(F.max_pool2d(images, 3, 1, 1)[..., 2:])
        return [x, images]

    written, images = dependence(network, (1, 4), axis=1)
    assert written.tolist() == [[0, 0], [1, 1], [1, 3], [2, 3]]
    assert images.tolist() == [[i, i] for i in range(4)]


def test_cells_of_a_pyramid_differ():
    """A map of stride 4, its cells repeated 4 times, then a 3x3: largest size, mean centre."""

    def network(images):
        coarse = F.avg_pool2d(images, 4)
        return [F.max_pool2d(F.interpolate(coarse, scale_factor=4.0), 3, 1, 1)]

    (columns,) = dependence(network, (4, 20), axis=1)
    # 7 and 8 see the repeated cells 1 and 2; 9 and 10 only 2; 11 sees 2 and 3
    assert columns[7:12].tolist() == [[4, 11], [4, 11], [8, 11], [8, 11], [8, 15]]
    # centres of 8 to 11: 8, 10, 10, 12
    assert fields_of(network, [1]) == [ReceptiveField(1, (8, 8), (0.5, 0.5))]


def test_attention_sees_its_window():
    """Windows of 4 cells, then again after a shift by 2: four cells see 8."""

    def attention(x):  # [B, C, 1, W]
        tokens = x.unflatten(3, (-1, 4)).squeeze(2).permute(0, 2, 3, 1)  # [B, W / 4, 4, C]
        tokens = F.linear(F.layer_norm(tokens, (3,)), torch.eye(3))
        mixed = (tokens @ tokens.transpose(2, 3)).softmax(-1) @ tokens
        return x + mixed.flatten(1, 2).transpose(1, 2).unsqueeze(2)

    def network(images):
        x = attention(images)
        weights = images.unflatten(3, (-1, 4)).softmax(-1).flatten(3)
        return [weights, x, attention(x.roll(-2, 3)).roll(2, 3)]

    weights, once, twice = dependence(network, (1, 24), axis=1)
    assert weights[8:12].tolist() == once[8:12].tolist() == [[8, 11]] * 4
    assert twice[10:14].tolist() == [[8, 15]] * 4
    assert twice[14:16].tolist() == [[12, 19]] * 2


def test_a_field_without_end():
    def network(images):
        fine, coarse = F.max_pool2d(images, 16), F.max_pool2d(images, 32)
        tokens = coarse.flatten(2)  # [B, C, H * W]
        everywhere = tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)
        return [fine, everywhere.unflatten(2, coarse.shape[2:])]

    fine, coarse = fields_of(network, [16, 32])
    assert fine == ReceptiveField(16, (16, 16), (8, 8))
    assert coarse.size == (math.inf, math.inf)
    assert all(map(math.isnan, coarse.centre))


@pytest.mark.parametrize(
    ("name", "length"),
    [("resnet18_fpn", 832), ("resnet50_c4", 448), ("vgg16", 256), ("mobilenet_v3_large_fpn", 960)],
)
def test_theory_is_where_gradients_are(name, length):
    model = rpn(name).eval().requires_grad_(False)
    head = model.rpn["head"].conv
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):  # gates are not counted
            module.avgpool.register_forward_hook(lambda _module, _input, output: output.detach())

    def network(images):
        return [head(feature) for feature in model.backbone(images)]

    canvas = (max(model.grid.strides), length)
    images = torch.randn(1, 3, *canvas, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    theory = dependence(network, canvas, axis=1)
    fields = receptive_fields(model)
    for map_, cells, of_level in zip(network(images), theory, fields, strict=True):
        stride, size = of_level.stride, of_level.size
        middle = len(cells) // 2
        first, last = gradient_support(map_, middle, images)
        assert cells[middle].tolist() == [first, last]
        assert size == (last - first + 1, last - first + 1)
        if stride < 32:  # another part of the repeated cell
            other = middle + 16 // stride
            assert cells[other].tolist() == gradient_support(map_, other, images)


def test_shifted_windows_are_where_gradients_are():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = build_backbone("swin_t_fpn", weights=None, frozen_stages=0, norm="bn").body.eval()
    images = torch.randn(1, 3, 32, 440, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    network = nn.Sequential(*list(body.children())[:4])  # two stages of a shifted block each
    (cells,) = dependence(lambda x: [network(x).permute(0, 3, 1, 2)], (32, 440), axis=1)
    map_ = network(images).permute(0, 3, 1, 2)
    for cell in (24, 29, 33):
        support = gradient_support(map_, cell, images)
        assert cells[cell].tolist() == support
        assert 0 < support[0] < support[1] < 439


class Cumulative(nn.Module):
    def forward(self, x):
        return x.cumsum(3)


@pytest.mark.parametrize(
    ("layer", "match"),
    [(Cumulative(), "aten.cumsum"), (nn.ConvTranspose2d(3, 3, 2, 2), "transposed")],
)
def test_an_unknown_operator_is_refused(layer, match):
    with pytest.raises(ConfigError, match=match):
        field(layer)


class Halved(nn.Module):
    """Stride 2, and twice the sum of four pixels and three colours."""

    out_channels = 1

    def __init__(self, *more):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 1, 2, 2, bias=False), *more)
        nn.init.constant_(self.layers[0].weight, 2)

    def forward(self, images):
        return [self.layers(images)]


def test_effective_field_by_hand():
    model = with_head(Halved(), (2,))
    for module in model.rpn["head"].modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    images = torch.rand(2, 3, 18, 14)
    (found,) = effective_fields(model, images)
    # cell (4, 3) sees the 3x3 cells around it; the mean over 2 images, each of which has 2
    expected = torch.zeros(18, 14)
    expected[6:12, 4:10] = 2
    assert_close(found.heat, expected)
    assert found.centre == (8, 6)
    # of 36 pixels, 9 are in the square of 3 and 25 in that of 5, which ends a pixel too early
    assert [found.side(share) for share in (0.02, 0.24, 0.26, 0.69, 0.7, 1)] == [1, 3, 5, 5, 7, 7]
    assert EffectiveField(torch.zeros(5, 5), (2, 2)).side() == 0


def test_effective_against_theoretical():
    """Luo et al. 2016: of the field, only the middle counts."""
    model = rpn("resnet18_c4")
    images = torch.randn(1, 3, 288, 320, generator=torch.Generator().manual_seed(0))
    (found,) = effective_fields(model, images)
    (theory,) = receptive_fields(model)
    assert theory.size == (243, 243)
    row, column = found.centre
    assert (row, column) == (144, 160)
    inside = torch.zeros_like(found.heat)
    inside[row - 121 : row + 122, column - 121 : column + 122] = 1
    assert (found.heat * (1 - inside) == 0).all()
    assert 60 < found.side() < 200
    assert found.side(1.0) <= 243


def test_the_model_stays_as_it_is():
    model = with_head(Halved(nn.BatchNorm2d(1), nn.Dropout(0.5)), (2,)).train()
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    receptive_fields(model)
    effective_fields(model, torch.ones(1, 3, 8, 8))
    model.backbone.layers.append(Cumulative())
    with pytest.raises(ConfigError):
        receptive_fields(model)
    assert [module.training for module in model.modules()][: len(modes)] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_larger_anchors():
    grid = AnchorGrid(((128.0, 256.0), (16.0, 8.0)), (0.5, 1.0), (16, 32), rounded=False)
    # 128 px at ratio 1/2 are 90.5 x 181, and 256 are 181 x 362
    # on the second level 8 rows see neither 11.3 x 22.6 nor 16 x 16, but 5.7 x 11.3 and 8 x 8
    fine, coarse = larger_anchors(grid, [(228, 228), (8, 16)])
    root = 2**0.5
    assert_close(torch.tensor(fine), torch.tensor([[128 * root, 256 * root], [256, 256]]))
    assert_close(torch.tensor(coarse), torch.tensor([[8 * root, 16 * root], [16, 16]]))
    assert larger_anchors(grid, [(math.inf, math.inf)] * 2) == [[], []]
