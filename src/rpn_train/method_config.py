"""The options of methods: what the head is, which anchors learn what, and by which losses."""

from dataclasses import dataclass, fields
from typing import Literal

from rpn_train.errors import ConfigError
from rpn_train.options import option

# What needs a loss that reads every anchor.
_OF_ALL_ANCHORS = ("head", "centerness", "assignment", "objectness_loss", "objectness_target")


@dataclass(frozen=True)
class MethodConfig:
    head: Literal["shared", "towers"] = option(
        "shared", "one stack of convolutions for both branches, or one for each, with group norm"
    )
    num_convs: int = option(1, "3x3 convolutions in a stack", low=1)
    channels: int | None = option(None, "channels of the head; null: the backbone's", low=1)
    centerness: bool = option(
        False, "a third branch says how central an anchor is in its object; ranks proposals too"
    )
    delta_stds: tuple[float, float, float, float] = option(
        (1.0, 1.0, 1.0, 1.0),
        "box deltas are learned as multiples of these (.11 .11 .33 .33)",
        above=0,
    )
    assignment: Literal["max_iou", "atss", "task_aligned"] = option(
        "max_iou", "which anchors are positive: by IoU (Ren 2015), Zhang 2020, Feng 2021"
    )
    fg_iou: float = option(0.7, "max_iou: an anchor is positive from this IoU on", low=0, high=1)
    bg_iou: float = option(0.3, "max_iou: it is background below this IoU", low=0, high=1)
    force_best: bool = option(
        True, "max_iou: the best anchors of each object are positive in any case"
    )
    forced_min_iou: float = option(
        0.0, "but only if their IoU is above 0 and at least this", low=0, high=1
    )
    ignore_ioa: float = option(
        0.5, "an anchor with this share of its area in a crowd box is ignored", above=0, high=1
    )
    border: Literal["use", "ignore"] = option(
        "use", "max_iou: anchors across the image border: train on them, or not (the paper)"
    )
    atss_candidates: int = option(9, "nearest anchors of each level that an object looks at", low=1)
    aligned_candidates: int = option(13, "task_aligned: most positives of an object", low=1)
    aligned_alpha: float = option(1.0, "task_aligned: score^alpha x IoU^beta", low=0)
    aligned_beta: float = option(6.0, "task_aligned: score^alpha x IoU^beta", low=0)
    aligned_from: float = option(
        1 / 3, "share of the run before which task_aligned is atss", low=0, high=1
    )
    sampling: Literal["random", "all"] = option(
        "random", "anchors that the loss reads: a balanced sample, or every one"
    )
    num_samples: int = option(256, "random: anchors sampled per image", low=1)
    fg_fraction: float = option(0.5, "random: positives among them at most", above=0, high=1)
    objectness_loss: Literal["bce", "focal", "quality_focal"] = option(
        "bce", "cross entropy, or Lin 2017, Li 2020: for all anchors"
    )
    objectness_target: Literal["label", "quality"] = option(
        "label", "of a positive: 1, or the IoU of its box (task_aligned: its alignment)"
    )
    focal_alpha: float = option(0.25, "weight of positives in the focal loss", low=0, high=1)
    focal_gamma: float = option(2.0, "exponent of the focal losses", low=1)
    box_loss: Literal["smooth_l1", "l1", "iou", "giou", "ciou"] = option(
        "smooth_l1", "regression loss"
    )
    smooth_l1_beta: float = option(1 / 9, "where smooth-L1 turns from square to line", above=0)
    box_weight: float = option(1.0, "regression loss against objectness loss", low=0)

    def __post_init__(self) -> None:
        if self.bg_iou > self.fg_iou:
            raise ConfigError(
                f"method.bg_iou: expected at most method.fg_iou = {self.fg_iou}, got {self.bg_iou}"
            )
        for option_of in fields(self):
            name, value = option_of.name, getattr(self, option_of.name)
            differs = name in _OF_ALL_ANCHORS and value != option_of.default
            if differs and self.sampling != "all":
                raise ConfigError(
                    f"method.sampling: expected all with method.{name}={value}, got {self.sampling}"
                )
        if self.centerness and self.head != "towers":
            raise ConfigError(
                f"method.head: expected towers with method.centerness=true, got {self.head}"
            )
