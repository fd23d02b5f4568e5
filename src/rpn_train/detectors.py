"""torchvision's detectors: the RPN read out of one, and an RPN put into one.

The keys of the weights are the same on both sides, so both ways are copies. What weights do not say
stands here: how a detector is built (`DETECTORS`), and the epsilon of its frozen norms.
"""

import os
import re
from typing import Any, NamedTuple, cast
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN

from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.heads import RPNHead
from rpn_train.model import RPN
from rpn_train.weights import read_weights

_V1 = {"backbone": {"name": "resnet50_fpn", "norm": "frozen_bn", "frozen_stages": 2}}
_V2 = {
    "backbone": {"name": "resnet50_fpn", "norm": "bn", "fpn_norm": "bn", "frozen_stages": 2},
    "method": {"num_convs": 2},
}
# Builder -> what its configuration has that the default has not.
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": _V1,
    "maskrcnn_resnet50_fpn": _V1,
    "keypointrcnn_resnet50_fpn": _V1,
    "fasterrcnn_resnet50_fpn_v2": _V2,
    "maskrcnn_resnet50_fpn_v2": _V2,
}
_OURS = ("backbone.", "rpn.")
# As torchvision renames what older versions of it saved.
_RENAMED = (
    (re.compile(r"^(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$"), r"\1.0.\2"),
)


class Transfer(NamedTuple):
    """Which weights of a detector were replaced, and which were left as they were, by key."""

    loaded: tuple[str, ...]
    left: tuple[str, ...]


def read_detector(
    builder: str, weights: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Configuration, where it is not the default, and weights of the RPN of a detector.

    Args:
        builder: a key of `DETECTORS`.
        weights: a name that torchvision gives to weights of the builder, a file with the state dict
            of such a detector, of any number of classes; None: torchvision's best.

    Raises:
        ConfigError: no such builder, or its RPN cannot be built here.
        CheckpointError: the weights cannot be found or read.
    """
    if builder not in DETECTORS:
        expected = " | ".join(map(repr, DETECTORS))
        raise ConfigError(f"torchvision: expected {expected}, got {builder!r}")
    weights = weights or "DEFAULT"
    named = get_model_weights(builder).__members__
    url = named[weights if weights in named else "DEFAULT"].url
    published = os.path.basename(urlparse(url).path)
    state = read_weights(builder, weights, key=f"torchvision:{builder}")
    config = {section: dict(values) for section, values in DETECTORS[builder].items()}
    of_2019 = weights in ("DEFAULT", "COCO_V1") or os.path.basename(weights) == published
    if DETECTORS[builder] is _V1:
        if of_2019:  # trained with an epsilon of 0; the builders set it where they load these
            config["backbone"]["norm_eps"] = 0.0
        elif any(key.endswith("num_batches_tracked") for key in state):
            config["backbone"]["norm"] = "bn"
    found = {_renamed(key): value for key, value in state.items() if key.startswith(_OURS)}
    if not found:
        raise CheckpointError(f"{weights}: expected the state dict of a {builder}, got another one")
    return config, found


def _renamed(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def load_into(detector: FasterRCNN, model: RPN) -> Transfer:
    """Copy backbone and RPN into a detector, whose proposals are then those of the RPN.

    `method.delta_stds` become a part of the weights. Besides weights, the detector takes over the
    epsilon of the norms, and pads images to multiples of the largest stride: torchvision infers its
    strides from the padded size, and they are exact only then. How many proposals it keeps, and the
    sizes it scales images to, are its own.

    Raises:
        ConfigError: the anchors or the networks differ.
    """
    if not isinstance(model.rpn["head"], RPNHead):
        raise ConfigError(
            "expected the head of faster_rcnn or oln, which torchvision's detectors have, too, got "
            f"a {type(model.rpn['head']).__name__}"
        )
    _check_anchors(detector, model)
    given, expected = _plain_weights(model), detector.state_dict()
    wanted = [key for key in expected if key.startswith(_OURS)]
    for key in {*wanted, *given}:
        if key.endswith("num_batches_tracked"):  # a frozen norm has none; nothing depends on it
            continue
        shapes = [tuple(state[key].shape) if key in state else None for state in (expected, given)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"expected a detector of the same network, got {key} of shape {shapes[0]} there, "
                f"{shapes[1]} here"
            )
    loaded = tuple(key for key in wanted if key in given)
    detector.load_state_dict({key: given[key] for key in loaded}, strict=False)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "eps", None), float):
            detector.get_submodule(name).eps = module.eps
    detector.transform.size_divisible = max(model.grid.strides)
    return Transfer(loaded, tuple(key for key in expected if key not in loaded))


def _plain_weights(model: RPN) -> dict[str, Tensor]:
    """The state dict of the same network with deltas that nothing multiplies any more."""
    weights, stds = model.state_dict(), cast(RPNHead, model.rpn["head"]).delta_stds
    for key in ("rpn.head.bbox_pred.weight", "rpn.head.bbox_pred.bias"):
        rows = weights[key].unflatten(0, (-1, 4))  # [A, 4, ...]
        weights[key] = torch.stack([r * s for r, s in zip(rows.unbind(1), stds, strict=True)], 1)
        weights[key] = weights[key].flatten(0, 1)
    return weights


def _check_anchors(detector: FasterRCNN, model: RPN) -> None:
    generator, grid = detector.rpn.anchor_generator, model.grid
    theirs = [tuple(map(float, sizes)) for sizes in generator.sizes]
    ratios = {tuple(map(float, r)) for r in generator.aspect_ratios}
    if theirs != [*grid.sizes] or ratios != {grid.ratios} or not grid.rounded:
        raise ConfigError(
            f"expected a detector with rounded anchors of sizes {grid.sizes} and ratios "
            f"{grid.ratios}, got {generator.sizes} and {generator.aspect_ratios}"
            + ("" if grid.rounded else "; anchors.rounded=false has no counterpart there")
        )
