"""The options of methods: what the head is, which anchors learn what, and by which losses."""

from dataclasses import dataclass
from typing import Literal

from rpn_train.errors import ConfigError
from rpn_train.options import option

# What needs a loss that reads every anchor.
_OF_ALL_ANCHORS = {
    "head": ("towers",),
    "centerness": (True,),
    "assignment": ("atss", "task_aligned", "center_region"),
    "objectness_loss": ("focal", "quality_focal"),
}


@dataclass(frozen=True)
class MethodConfig:
    head: Literal["shared", "towers", "cascade"] = option(
        "shared",
        "one stack of convolutions for both branches, or one for each, with group norm, or a first "
        "stage that moves the anchors and a second that looks where they are then (Vu 2019)",
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
    assignment: Literal["max_iou", "atss", "task_aligned", "center_region"] = option(
        "max_iou",
        "which anchors are positive: by IoU (Ren 2015), Zhang 2020, Feng 2021, in the middle of an "
        "object (the first stage of a cascade has that in any case)",
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
    center_share: float = option(
        0.2, "center_region: the middle of an object, as a share of its sides", above=0, high=1
    )
    atss_candidates: int = option(9, "nearest anchors of each level that an object looks at", low=1)
    aligned_candidates: int = option(13, "task_aligned: most positives of an object", low=1)
    aligned_alpha: float = option(1.0, "task_aligned: score^alpha x IoU^beta", low=0)
    aligned_beta: float = option(6.0, "task_aligned: score^alpha x IoU^beta", low=0)
    aligned_from: float = option(
        1 / 3, "share of the run before which task_aligned learns as atss does", low=0, high=1
    )
    sampling: Literal["random", "all"] = option(
        "random", "anchors that the loss reads: a balanced sample, or every one"
    )
    num_samples: int = option(256, "random: anchors sampled per image", low=1)
    fg_fraction: float = option(0.5, "random: positives among them at most", above=0, high=1)
    objectness_loss: Literal["bce", "focal", "quality_focal", "l1"] = option(
        "bce", "cross entropy, the absolute error, or for all anchors Lin 2017, Li 2020"
    )
    objectness_target: Literal["label", "quality", "centerness"] = option(
        "label",
        "of a positive: 1, the IoU of its box (task_aligned: its alignment), or how central it is",
    )
    learn_background: bool = option(
        True, "false: objectness is learned from positives alone (Kim 2022)"
    )
    focal_alpha: float = option(0.25, "weight of positives in the focal loss", low=0, high=1)
    focal_gamma: float = option(2.0, "exponent of the focal losses", low=1)
    box_loss: Literal["smooth_l1", "l1", "iou", "giou", "ciou"] = option(
        "smooth_l1", "regression loss"
    )
    smooth_l1_beta: float = option(1 / 9, "where smooth-L1 turns from square to line", above=0)
    box_weight: float = option(1.0, "regression loss against objectness loss", low=0)

    def __post_init__(self) -> None:
        if self.head == "cascade" and self.assignment != "max_iou":
            raise ConfigError(
                "method.assignment: expected max_iou with method.head=cascade, got "
                f"{self.assignment}"
            )
        if self.assignment == "task_aligned" and self.objectness_target == "centerness":
            raise ConfigError(
                "method.objectness_target: expected label or quality with "
                "method.assignment=task_aligned, got centerness"
            )
        if self.assignment == "max_iou" and self.bg_iou > self.fg_iou:
            raise ConfigError(
                f"method.bg_iou: expected at most method.fg_iou = {self.fg_iou}, got {self.bg_iou}"
            )
        for name, values in _OF_ALL_ANCHORS.items():
            value = getattr(self, name)
            if value in values and self.sampling != "all":
                raise ConfigError(
                    f"method.sampling: expected all with method.{name}={value}, got {self.sampling}"
                )
        if self.centerness and self.head != "towers":
            raise ConfigError(
                f"method.head: expected towers with method.centerness=true, got {self.head}"
            )
        if self.head == "cascade" and self.sampling != "random":
            raise ConfigError(
                f"method.sampling: expected random with method.head=cascade, got {self.sampling}"
            )
