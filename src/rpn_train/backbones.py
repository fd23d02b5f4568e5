"""Backbones: networks that turn a batch of images into feature maps of known strides.

Each is a classification network cut after its last useful layer (`body`), with or without a feature
pyramid on top (`fpn`), under the state-dict keys of torchvision's detectors.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from rpn_train.errors import ConfigError
from rpn_train.norms import NORMS, Norm, fold_norms
from rpn_train.sparse import Lateral
from rpn_train.timm_body import timm_body
from rpn_train.weights import load_body, read_weights

Pyramid = Literal["p2_p6", "p3_p7"]
PYRAMIDS: dict[Pyramid, tuple[int, ...]] = {  # their strides
    "p2_p6": (4, 8, 16, 32, 64),
    "p3_p7": (8, 16, 32, 64, 128),
}


class Backbone(nn.Module):
    """Images to feature maps, fine to coarse.

    A body of four maps (strides 4 to 32) gets a feature pyramid. "p2_p6" (Lin et al. 2017) has
    their strides, and a fifth map that subsamples the fourth; "p3_p7" (RetinaNet, Lin et al. 2017b)
    leaves out the finest and adds two by convolutions of stride 2. A body of one map (stride 16)
    is used as it is. `stage_ends` names the last child of the body in each stage that can freeze.

    Attributes:
        out_channels: channels of every map that comes out.
        strides: pixels between neighbouring cells, one number per map.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        channels: Sequence[int],
        stage_ends: Sequence[str] = (),
        channels_last: bool = False,
        pyramid: Pyramid = "p2_p6",
        fpn_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        assert len(channels) in (1, 4)
        has_pyramid = len(channels) == 4
        self.out_channels: int = 256 if has_pyramid else channels[0]
        self.strides: tuple[int, ...] = PYRAMIDS[pyramid] if has_pyramid else (16,)
        self.body = body
        self._finest = int(has_pyramid and pyramid == "p3_p7")  # map of the body that is used
        extra = LastLevelP6P7(256, 256) if self._finest else None
        fpn_layer = None if fpn_norm is None else partial(NORMS[fpn_norm], eps=1e-5)
        used = [*channels[self._finest :]]
        self.fpn = FeaturePyramidNetwork(used, 256, extra, fpn_layer) if has_pyramid else None
        self._norm_in_fpn = has_pyramid and fpn_norm is not None
        self._stage_ends = tuple(stage_ends)
        self._frozen: tuple[str, ...] = ()
        self._channels_last = channels_last
        fold_norms(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images: float [B, 3, H, W], normalised as the weights expect.

        Returns:
            One [B, out_channels, H/s, W/s] per stride s, exactly so where H and W are multiples of
            the largest stride. Otherwise each network rounds in its own way: pad the images first.
        """
        return self.finish(self.merge(images))

    def merge(self, images: Tensor) -> list[Tensor | Lateral]:
        """The maps before the last convolutions of the pyramid: [B, C, H/s, W/s], fine to coarse.

        Without a pyramid they are the output; with one, the levels that are made of the last are
        not yet among them, and the first has not been computed yet.
        """
        maps = self.body(images)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]  # [B, H, W, C] -> [B, C, H, W]
        if self.fpn is None:
            return maps
        maps = maps[self._finest :]
        inner = self.fpn.inner_blocks
        merged = [inner[-1](maps[-1])]  # coarse to fine
        for i in range(len(maps) - 2, 0, -1):
            merged.append(Lateral(maps[i], inner[i], merged[-1]).whole())
        return [Lateral(maps[0], inner[0], merged[-1]), *reversed(merged)]

    def finish(self, merged: list[Tensor | Lateral], first: int = 0) -> list[Tensor]:
        """The maps that come out, from level `first` on; `first` is not beyond the last merged."""
        wanted = [m.whole() if isinstance(m, Lateral) else m for m in merged[first:]]
        if self.fpn is None:
            return wanted
        blocks = [*self.fpn.layer_blocks][first:]
        levels = [block(m) for block, m in zip(blocks, wanted, strict=True)]
        if self.fpn.extra_blocks is None:
            return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]
        p6 = self.fpn.extra_blocks.p6(levels[-1])
        return [*levels, p6, self.fpn.extra_blocks.p7(F.relu(p6))]

    def last_convolutions(self, level: int) -> list[tuple[nn.Conv2d, bool]] | None:
        """The 3x3 convolutions between `merge` and `finish`, and whether a ReLU follows each.

        None where there is more in between: a norm, which may need the whole map.
        """
        if self._norm_in_fpn:
            return None
        return [] if self.fpn is None else [(self.fpn.layer_blocks[level][0], False)]

    def freeze(self, stages: int) -> None:
        """Stop the first stages from learning; ConfigError where there are not so many."""
        most = len(self._stage_ends)
        if not 0 <= stages <= most:
            raise ConfigError(
                f"backbone.frozen_stages: expected 0 to {most} for this backbone, got {stages}"
            )
        children = [name for name, _ in self.body.named_children()]
        end = children.index(self._stage_ends[stages - 1]) + 1 if stages else 0
        self._frozen = tuple(children[:end])
        for i, name in enumerate(children):
            self.body.get_submodule(name).requires_grad_(i >= end)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode of all but the frozen stages, whose batch norm keeps its statistics."""
        super().train(mode)
        for name in self._frozen:
            self.body.get_submodule(name).eval()
        return self


def build_backbone(
    name: str,
    *,
    weights: str | None,
    frozen_stages: int,
    norm: Norm,
    norm_eps: float | None = None,
    pyramid: Pyramid = "p2_p6",
    fpn_norm: Norm | None = None,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: a key of `BACKBONES`, or `timm:<name>` for any network of the `timm` package that has
            features of strides 4, 8, 16 and 32.
        weights: None for random numbers (torchvision's, from torch's global generator); a name
            torchvision gives to weights of this network, as `DEFAULT` or `IMAGENET1K_V1`; or a file
            with the state dict of the classification network. timm has `DEFAULT` and files.
        frozen_stages: 0 none, 1 the stem, 2 also the first stage of blocks (Detectron2's FREEZE_AT
            2, torchvision's 3 trainable layers), and so on to 5, or 4 for C4. For vgg16 the five
            blocks of convolutions: the paper freezes 2. For timm only 0.
        norm: what stands where the network has batch norm; vgg16, convnext_tiny and swin_t have
            none and ignore it. `frozen_bn` without weights is the identity. `sync_bn` in a process
            group trains on GPUs only. timm does not offer `gn`.
        norm_eps: added to the variance; None: as the network was made. 0 for torchvision's
            detectors of 2019. Not for timm.
        pyramid: which levels; ignored by a network that has none.
        fpn_norm: the norm of the pyramid; None: no norm there, as in the paper.

    Raises:
        ConfigError: there is no such name, or it does not offer what is asked of it.
        CheckpointError: the weights cannot be found, read or fitted to the network.
    """
    if name.startswith("timm:"):
        if norm_eps is not None:
            raise ConfigError(f"backbone.norm_eps: expected null for timm, got {norm_eps:g}")
        body, channels, nhwc = timm_body(name.removeprefix("timm:"), weights=weights, norm=norm)
        backbone = Backbone(
            body, channels=channels, channels_last=nhwc, pyramid=pyramid, fpn_norm=fpn_norm
        )
    elif name in BACKBONES:
        backbone = BACKBONES[name](
            weights=weights, norm=norm, norm_eps=norm_eps, pyramid=pyramid, fpn_norm=fpn_norm
        )
    else:
        expected = " | ".join(map(repr, [*BACKBONES, "timm:<name>"]))
        close = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ConfigError(f"backbone.name: expected {expected}, got '{name}'{hint}")
    if backbone.fpn is None and fpn_norm is not None:
        raise ConfigError(
            f"backbone.fpn_norm: expected null for {name}, which has no pyramid, got {fpn_norm}"
        )
    backbone.freeze(frozen_stages)
    return backbone


def _from_torchvision(
    arch: str,
    *,
    trunk: str,
    stage_ends: Sequence[str],
    channels: Sequence[int],
    own_eps: float | None,
    channels_last: bool = False,
    weights: str | None,
    norm: Norm,
    norm_eps: float | None,
    pyramid: Pyramid,
    fpn_norm: Norm | None,
) -> Backbone:
    """Cut the torchvision network `arch` after its last stage.

    The children of its submodule `trunk` run one after the other. Of the stages, which end with the
    children `stage_ends`, the last `len(channels)` are read, and put out so many channels.
    `own_eps` is None where the network has no batch norm.
    """
    state = None if weights is None else read_weights(arch, weights)
    eps = own_eps if norm_eps is None else norm_eps
    norm_layer = None if own_eps is None else partial(NORMS[norm], eps=eps)
    network = get_model(arch, **({"norm_layer": norm_layer} if norm_layer else {}))
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            # It would draw from the global generator, and a step must be a function of seed and
            # step alone. Differs from torchvision in training: test_training_draws_nothing.
            module.p = 0.0
    levels = {end: end for end in stage_ends[-len(channels) :]}
    body = IntermediateLayerGetter(network.get_submodule(trunk), levels)
    if state is not None:
        load_body(body, state, trunk=trunk, what=f"'{weights}' in {arch} with norm '{norm}'")
    return Backbone(
        body,
        channels=channels,
        stage_ends=stage_ends,
        channels_last=channels_last,
        pyramid=pyramid,
        fpn_norm=fpn_norm,
    )


_BASIC = (64, 128, 256, 512)
_BOTTLENECK = (256, 512, 1024, 2048)
_LAYERS = ("maxpool", "layer1", "layer2", "layer3", "layer4")
_resnet = partial(_from_torchvision, trunk="", stage_ends=_LAYERS, own_eps=1e-5)
_resnet_c4 = partial(_resnet, stage_ends=_LAYERS[:-1])
_features = partial(_from_torchvision, trunk="features", own_eps=None)
_patches = partial(_features, stage_ends=("0", "1", "3", "5", "7"), channels=(96, 192, 384, 768))

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18_fpn": partial(_resnet, "resnet18", channels=_BASIC),
    "resnet34_fpn": partial(_resnet, "resnet34", channels=_BASIC),
    "resnet50_fpn": partial(_resnet, "resnet50", channels=_BOTTLENECK),
    "resnet101_fpn": partial(_resnet, "resnet101", channels=_BOTTLENECK),
    "resnext50_32x4d_fpn": partial(_resnet, "resnext50_32x4d", channels=_BOTTLENECK),
    "resnext101_32x8d_fpn": partial(_resnet, "resnext101_32x8d", channels=_BOTTLENECK),
    "resnet18_c4": partial(_resnet_c4, "resnet18", channels=(256,)),
    "resnet34_c4": partial(_resnet_c4, "resnet34", channels=(256,)),
    "resnet50_c4": partial(_resnet_c4, "resnet50", channels=(1024,)),
    "resnet101_c4": partial(_resnet_c4, "resnet101", channels=(1024,)),
    # Through conv5_3 and its ReLU, without the last pooling (Ren et al. 2015, section 3.1).
    "vgg16": partial(_features, "vgg16", stage_ends=("3", "8", "15", "22", "29"), channels=(512,)),
    # The last block of each stride. torchvision's detector reads "13" and "16", both of stride 32,
    # and freezes batch norm with epsilon 1e-5, which its ImageNet weights were not trained with:
    # test_mobilenet_keeps_its_epsilon.
    "mobilenet_v3_large_fpn": partial(
        _features,
        "mobilenet_v3_large",
        stage_ends=("1", "3", "6", "12", "16"),
        channels=(24, 40, 112, 960),
        own_eps=1e-3,
    ),
    "convnext_tiny_fpn": partial(_patches, "convnext_tiny"),
    "swin_t_fpn": partial(_patches, "swin_t", channels_last=True),
}
