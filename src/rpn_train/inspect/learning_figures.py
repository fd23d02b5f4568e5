"""What the network is asked to learn, and what it has learned: targets and objectness.

These can be watched during training, of one image over time.
"""

import math

import torch
from torchvision.ops import box_iou

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
from rpn_train.targets import BACKGROUND, IGNORED, POSITIVE, assign, sample

DRAWN_IGNORED = 100  # more would be a wall


def objectness_plate(walk: Walk) -> Plate:
    """The objectness of every level, the highest of each cell, beside the image."""
    count = 1 + len(walk.levels)
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
        "One of the branches gives every anchor a number, whose sigmoid is the probability that "
        "the anchor is an object. Drawn is the highest of each cell, around the point on which "
        "its anchors are centred. Each level answers for objects of about the size of its anchors "
        "and stays dark for the others."
        + " Here it is the root of this probability times that of another branch, centerness: it "
        "ranks the proposals." * walk.cfg.method.centerness,
        figure,
        (walk.head,),
    )


def assignment_plate(walk: Walk) -> Plate:
    """Which anchors are positive, and which are ignored."""
    truth, method = walk.truth, walk.cfg.method
    assert truth is not None
    assert truth.targets is not None
    figure, panels = image_panels(2, walk.size, columns=2)
    for axes in panels:
        show_image(axes, walk.image, faded=True)
        show_objects(axes, truth)
    rows, ignored = truth.targets.rows(POSITIVE), truth.targets.rows(IGNORED)
    positives, counted = walk.anchors[rows], truth.boxes[~truth.ignore]
    if len(rows):
        reached = box_iou(positives, counted).amax(1) >= method.fg_iou
        show_boxes(panels[0], positives[~reached], FORCED_ANCHOR)
        show_boxes(panels[0], positives[reached], POSITIVE_ANCHOR)
    every = math.ceil(len(ignored) / DRAWN_IGNORED) or 1
    show_boxes(panels[1], walk.anchors[ignored[::every]], IGNORED_ANCHOR)
    panels[0].set_title(f"{len(rows):,} positive", fontsize=10)
    some = f", one in {every} drawn" if every > 1 else ""
    panels[1].set_title(f"{len(ignored):,} ignored{some}", fontsize=10)
    legend_of(figure, panels)
    return Plate(
        "assignment",
        "Which anchors are positive",
        f"In training an anchor is positive if its IoU with an object is at least "
        f"{method.fg_iou:g}, and background if it is below {method.bg_iou:g} with all of them; "
        "what is in between is ignored, because neither answer would be right."
        + " The best anchors of each object are positive in any case, so that none is left out."
        * method.force_best
        + f" Of the {len(walk.anchors):,} anchors here {len(rows):,} are positive, "
        f"{len(ignored):,} ignored and {len(truth.targets.rows(BACKGROUND)):,} background.",
        figure,
        (assign,),
    )


def sampled_plate(walk: Walk) -> Plate:
    """The anchors that the loss reads, coloured by what the network says of them."""
    truth, method = walk.truth, walk.cfg.method
    assert truth is not None
    assert truth.targets is not None
    figure, panels = image_panels(2, walk.size, columns=2, bar=True)
    names = ("positive: towards 1", "background: towards 0")
    for axes, rows, name in zip(panels, truth.targets.sampled_of, names, strict=True):
        show_image(axes, walk.image, faded=True)
        show_objects(axes, truth)
        scores = walk.logits[rows].sigmoid()
        order = torch.argsort(scores)  # the highest on top
        show_scored(axes, walk.anchors[rows][order], scores[order])
        mean = f", mean objectness {scores.mean():.2f}" if len(rows) else ""
        axes.set_title(f"{len(rows)} {name}{mean}", fontsize=10)
    heat_bar(figure, panels, "objectness")
    legend_of(figure, panels)
    return Plate(
        "sampled",
        "Which anchors the loss reads",
        "Background is everywhere, and would drown the rest. So the loss of an image reads "
        f"{method.num_samples} random anchors, at most {method.fg_fraction:.0%} of them positive. "
        "It pulls the objectness of the positive ones (left) to 1 and of the background (right) to "
        "0; the deltas are learned from the positive ones alone.",
        figure,
        (sample, rpn_losses),
    )
