"""Outputs and gradients at sampled anchors are those of the dense computation."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import build_backbone
from rpn_train.heads import RPNHead
from rpn_train.model import RPN
from rpn_train.sparse import stack_at

SIZES = {"resnet18_fpn": ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)), "resnet18_c4": ((32.0,),)}


def network(backbone: str, num_convs: int) -> RPN:
    torch.manual_seed(0)
    body = build_backbone(backbone, weights=None, frozen_stages=0, norm="bn")
    grid = AnchorGrid(SIZES[backbone], (0.5, 1.0, 2.0), body.strides, rounded=False)
    model = RPN(body, grid, lambda c, a: RPNHead(c, a, num_convs=num_convs, channels=None))
    for parameter in model.rpn.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.double()


def outputs_and_gradients(model: RPN, images: Tensor, at: Tensor, sparse: bool) -> list[Tensor]:
    """Outputs at anchors, and the gradients of a scalar of them with respect to everything."""
    model = copy.deepcopy(model)
    if not sparse:
        model._num_sparse = lambda merged, slots: 0  # type: ignore[method-assign]
    logits, deltas, *_ = model(images, at=at)
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    ((logits * weights).sum() + (deltas.square() * weights[..., None]).sum()).backward()
    return [logits, deltas, *(p.grad for p in model.parameters() if p.grad is not None)]


def sparse_levels(model: RPN, images: Tensor, at: Tensor) -> int:
    found = []
    real = model._num_sparse
    model._num_sparse = lambda *given: found.append(real(*given)) or found[-1]
    model(images, at=at)
    del model._num_sparse
    return found[0]


@pytest.mark.parametrize("counts", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize(
    ("backbone", "num_convs"),
    [("resnet18_fpn", 1), ("resnet18_fpn", 2), ("resnet18_c4", 1), ("resnet18_c4", 2)],
)
def test_values_and_gradients_are_those_of_the_dense_path(
    backbone: str, num_convs: int, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots in corners, doubled slots, levels without any slot; both ways to divide the work."""
    monkeypatch.setattr("rpn_train.model._counts_slots", lambda device: counts)
    model = network(backbone, num_convs)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 128, 192, generator=generator, dtype=torch.float64)
    lengths = model.grid.level_lengths((128, 192))
    slots = 20 if num_convs == 1 else 9
    at = torch.randint(lengths[0], (2, slots), generator=generator)
    at[0, :4] = torch.tensor([0, 0, lengths[0] - 1, sum(lengths) - 1])  # corners, and one twice
    if len(lengths) > 1:
        at[1, :2] = torch.tensor([lengths[0] - 1, lengths[0]])  # neighbours on two levels
    # 40 slots of 10 multiplications each and more, against 2 x 32 x 48, 16 x 24, 8 x 12 cells
    expected = 1 if backbone == "resnet18_c4" else 3 if counts else 2
    assert sparse_levels(model, images, at) == expected
    sparse = outputs_and_gradients(model, images, at, sparse=True)
    dense = outputs_and_gradients(model, images, at, sparse=False)
    everywhere = copy.deepcopy(model)(images)
    assert len(sparse) == len(dense) > 40
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # the outputs are made float32
    torch.testing.assert_close(sparse[0], everywhere.logits.gather(1, at), rtol=0, atol=1e-6)


def test_a_stack_at_every_cell_is_the_dense_stack() -> None:
    """float64 to 1e-10: borders, where the padding of every convolution counts, included."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(c, 5, 3, padding=1).double() for c in (4, 5, 5)]
    feature = torch.randn(2, 4, 3, 7, dtype=torch.float64, requires_grad=True)
    dense = convs[2](convs[1](convs[0](feature)).relu()).relu()  # [2, 5, 3, 7]
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(7), indexing="ij")
    image = torch.arange(2).repeat_interleave(21)
    cells = [image, *(v.flatten().repeat(2) for v in (rows, columns))]
    stack = list(zip(convs, (False, True, True), strict=True))
    sparse = stack_at(feature, *cells, stack)  # [2 * 21, 5, 1, 1]
    sparse = sparse.view(2, 3, 7, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)
    weight = torch.randn_like(dense)
    parameters = [feature, *(p for conv in convs for p in conv.parameters())]
    for a, b in zip(
        torch.autograd.grad((sparse * weight).sum(), parameters),
        torch.autograd.grad((dense * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
