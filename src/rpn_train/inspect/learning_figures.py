"""What the network is asked to learn, and what it has learned: targets and objectness.

These can be watched during training, of one image over time.
"""

import math
from collections.abc import Callable

import torch
from torchvision.ops import box_iou

from rpn_train.dense_losses import dense_losses
from rpn_train.dense_targets import atss_assign, center_region_assign, task_aligned_assign
from rpn_train.inspect.panels import (
    FORCED_ANCHOR,
    IGNORED_ANCHOR,
    POSITIVE_ANCHOR,
    Plate,
    heat_bar,
    image_panels,
    legend_of,
    show_boxes,
    show_heat,
    show_image,
    show_objects,
    show_scored,
)
from rpn_train.inspect.walk import Walk
from rpn_train.losses import rpn_losses
from rpn_train.method_config import MethodConfig
from rpn_train.targets import BACKGROUND, IGNORED, POSITIVE, assign, assign_dense, sample

DRAWN_IGNORED, DRAWN_READ = 100, 256  # more would be a wall
# What the objectness of a positive anchor aims at.
AIMS = {
    "label": "1",
    "quality": "how well its box fits",
    "centerness": "how central it is in its object",
}
ASSIGNMENTS: dict[str, Callable[..., object]] = {
    "max_iou": assign,
    "atss": atss_assign,
    "task_aligned": task_aligned_assign,
    "center_region": center_region_assign,
}


def objectness_plate(walk: Walk) -> Plate:
    """The objectness of every level, the highest of each cell, beside the image."""
    count, method = 1 + len(walk.levels), walk.cfg.method
    figure, (first, *panels) = image_panels(count, walk.size, columns=min(count, 3), bar=True)
    show_image(first, walk.image)
    first.set_title("the image", fontsize=10)
    for axes, level in zip(panels, walk.levels, strict=True):
        show_heat(axes, level.objectness, level.stride, walk.size)
        rows, columns = level.objectness.shape
        highest = level.objectness.max().item()
        axes.set_title(
            f"stride {level.stride}: {rows} x {columns} cells, highest {highest:.2f}", fontsize=10
        )
    for axes in (first, *panels):
        show_objects(axes, walk.truth)
    heat_bar(figure, [first, *panels], "objectness")
    legend_of(figure, [first])
    return Plate(
        "objectness",
        "Objectness, level by level",
        f"One of the branches gives every anchor a number, whose sigmoid {_meaning(method)}. Drawn "
        "is the highest of each cell, around the point on which its anchors are centred."
        + (
            " Each level answers for objects of about the size of its anchors and stays dark for "
            "the others."
            if method.learn_background
            else " Where no object is it was never told what to say."
        )
        + " What is drawn here ranks the proposals: the root of the product of this probability "
        "and that of another branch, centerness." * method.centerness,
        figure,
        (walk.head,),
    )


def _meaning(method: MethodConfig) -> str:
    if method.objectness_target == "label":
        return "is the probability that the anchor is an object"
    return f"says {AIMS[method.objectness_target]}"


def assignment_plate(walk: Walk) -> Plate:
    """Which anchors are positive, and which are ignored."""
    truth, method = walk.truth, walk.cfg.method
    assert truth is not None
    figure, panels = image_panels(2, walk.size, columns=2)
    for axes in panels:
        show_image(axes, walk.image, faded=True)
        show_objects(axes, truth)
    rows, ignored = truth.targets.rows(POSITIVE), truth.targets.rows(IGNORED)
    positives, counted = walk.anchors[rows], truth.boxes[~truth.ignore]
    if len(rows):
        forced = box_iou(positives, counted).amax(1) < method.fg_iou
        forced &= method.assignment == "max_iou"  # no other has a threshold
        show_boxes(panels[0], positives[forced], FORCED_ANCHOR)
        show_boxes(panels[0], positives[~forced], POSITIVE_ANCHOR)
    every = math.ceil(len(ignored) / DRAWN_IGNORED) or 1
    show_boxes(panels[1], walk.anchors[ignored[::every]], IGNORED_ANCHOR)
    panels[0].set_title(f"{len(rows):,} positive", fontsize=10)
    some = f", one in {every} drawn" if every > 1 else ""
    panels[1].set_title(f"{len(ignored):,} ignored{some}", fontsize=10)
    legend_of(figure, panels)
    return Plate(
        "assignment",
        "Which anchors are positive",
        _rule(method) + f" Of the {len(walk.anchors):,} anchors here {len(rows):,} are positive, "
        f"{len(ignored):,} ignored and {len(truth.targets.rows(BACKGROUND)):,} background.",
        figure,
        (center_region_assign, assign_dense)
        if method.head == "cascade"
        else (ASSIGNMENTS[method.assignment],),
    )


def _rule(method: MethodConfig) -> str:
    """What makes an anchor positive, background or ignored, in words."""
    if method.assignment == "atss":
        rule = (
            f"In training each object looks at the {method.atss_candidates} anchors of every level "
            "whose centres are nearest to its own. Positive are those of them whose IoU with it is "
            "at least the mean plus the standard deviation of all, and whose centre lies in it."
        )
    elif method.assignment == "task_aligned":
        rule = (
            f"In training, from {method.aligned_from:.0%} of the run on, positive are at most "
            f"{method.aligned_candidates} anchors of an object, of those whose centre lies in it: "
            "the ones that do best by what the network itself says of them, objectness^"
            f"{method.aligned_alpha:g} x IoU^{method.aligned_beta:g}."
        )
    elif method.assignment == "center_region":
        rule = (
            "In training an anchor is positive if its cell touches the middle of an object, "
            f"{method.center_share:.0%} of its sides, on the level of its size."
        )
    else:
        rule = _by_iou(method)
    if not method.learn_background:
        rule += (
            " All others are ignored here: what nobody has labelled may be an object, too, so it "
            "is not learned as background."
        )
    return rule


def _by_iou(method: MethodConfig) -> str:
    moved = ", as the first stage has moved it," * (method.head == "cascade")
    background = (
        f", and background if it is below {method.bg_iou:g} with all of them"
        + "; what is in between is ignored, because neither answer would be right"
        * (method.fg_iou > method.bg_iou)
    )
    rule = (
        f"In training an anchor{moved} is positive if its IoU with an object is at least "
        f"{method.fg_iou:g}{background * method.learn_background}."
        + _forced(method)
        + " An anchor across the border of the image is ignored, too." * (method.border == "ignore")
    )
    if method.head != "cascade":
        return rule
    return (
        "The first stage learns to move the anchors whose cells touch the middle of an object, "
        f"{method.center_share:.0%} of its sides, on the level of its size. Drawn is what the "
        f"second learns. {rule}"
    )


def _forced(method: MethodConfig) -> str:
    if not method.force_best:
        return ""
    if method.forced_min_iou == 0:
        return (
            " The best anchors of each object are positive in any case, so that none is left out."
        )
    if method.forced_min_iou < method.fg_iou:
        return (
            " The best anchors of each object are positive, too, if their IoU is at least "
            f"{method.forced_min_iou:g}."
        )
    return ""


def read_plate(walk: Walk) -> Plate:
    """The anchors that the loss reads, coloured by what the network says of them."""
    truth, method = walk.truth, walk.cfg.method
    assert truth is not None
    figure, panels = image_panels(2, walk.size, columns=2, bar=True)
    aim = "1" if method.objectness_target == "label" else method.objectness_target
    towards = {"positive": aim, "background": "0"}
    for axes, rows, (kind, to) in zip(panels, truth.targets.read_of, towards.items(), strict=True):
        show_image(axes, walk.image, faded=True)
        show_objects(axes, truth)
        scores = walk.objectness[rows].sigmoid()
        order = torch.argsort(scores)[-DRAWN_READ:]  # the highest on top
        show_scored(axes, walk.anchors[rows][order], scores[order])
        title = f"{len(rows):,} {kind}"
        title += f": towards {to}, mean objectness {scores.mean():.2f}" if len(rows) else ""
        title += f"\nthe {DRAWN_READ} highest are drawn" if len(rows) > DRAWN_READ else ""
        axes.set_title(title, fontsize=10)
    heat_bar(figure, panels, "objectness")
    legend_of(figure, panels)
    losses = dense_losses if method.sampling == "all" else rpn_losses
    return Plate(
        "read",
        "Which anchors the loss reads",
        f"{_reading(method)} It pulls the objectness of the positive ones (left) to "
        + AIMS[method.objectness_target]
        + " and of the background (right) to 0" * method.learn_background
        + "; the deltas"
        + ", and the centerness of the other branch," * method.centerness
        + " are learned from the positive ones alone.",
        figure,
        (losses,) if method.sampling == "all" else (sample, losses),
    )


def _reading(method: MethodConfig) -> str:
    """Which anchors the loss reads, and why, in words."""
    if method.sampling == "random" and method.learn_background:
        return (
            "Background is everywhere, and would drown the rest. So the loss of an image reads "
            f"{method.num_samples} random anchors, at most {method.fg_fraction:.0%} of them "
            "positive."
        )
    if not method.learn_background:
        most = int(method.num_samples * method.fg_fraction)
        some = f", at most {most} random ones" * (method.sampling == "random")
        return f"The loss of an image reads positive anchors alone{some}."
    focal = " and counts those little that are right already" * ("focal" in method.objectness_loss)
    return (
        "Background is everywhere, and could drown the rest. The loss reads every anchor that is "
        f"not ignored all the same{focal}."
    )
