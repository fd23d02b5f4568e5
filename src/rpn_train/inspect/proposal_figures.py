"""From the outputs of the network to proposals: regression, NMS, the best over the objects."""

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.ops import box_iou

from rpn_train.boxes import decode
from rpn_train.figures import BLUE, DRAWN_PROPOSALS, ORANGE, SKY_BLUE, VERMILLION
from rpn_train.inspect.panels import (
    OBJECT,
    PROPOSAL,
    Look,
    Plate,
    image_panels,
    legend_of,
    show_boxes,
    show_image,
    show_number,
    show_objects,
    unit,
    zoom_out,
)
from rpn_train.inspect.walk import Walk
from rpn_train.proposals import Proposals, make_proposals
from rpn_train.recall import score_recall

REGRESSED = 6  # proposals that are drawn with their anchors
CANDIDATES = 40  # that are drawn before NMS
FOUND_IOU = 0.5
MANY = 100  # proposals, of which recall is usually told
MISSED = Look(f"object that none overlaps by {FOUND_IOU:g}", VERMILLION, "--", 3)


def regression_plate(walk: Walk) -> Plate:
    """The anchors of the best proposals, and the boxes that the deltas make of them."""
    rows = walk.behind(REGRESSED)
    figure, panels = image_panels(2, walk.size, columns=2)
    before, after = walk.anchors[rows], walk.boxes[rows]
    looks = (Look("anchor", ORANGE, width=2), Look("box", BLUE, width=2))
    for axes, boxes, look in zip(panels, (before, after), looks, strict=True):
        show_image(axes, walk.image, faded=True)
        show_objects(axes, walk.truth)
        show_boxes(axes, boxes, look)
        zoom_out(axes, before, walk.size)
        for number, (x1, y1, *_) in enumerate(boxes.tolist(), start=1):
            show_number(axes, x1, y1, f" {number}")
    panels[0].set_title("before: the anchors of the best proposals", fontsize=10)
    panels[1].set_title("after: the proposals, in the same order", fontsize=10)
    legend_of(figure, panels)
    return Plate(
        "regression",
        "Boxes before and after regression",
        "The other branch gives each anchor four deltas: how far to move its centre, in parts of "
        "its width and height, and by which factor to stretch both, as a logarithm. What comes out "
        f"is cut to the image. Drawn are the anchors behind the {len(rows)} best proposals"
        + ", as the first stage has moved them," * (walk.cfg.method.head == "cascade")
        + " and what became of them.",
        figure,
        (decode,),
    )


def nms_plate(walk: Walk) -> Plate:
    """The best boxes before NMS, those of them that it leaves, and how many it leaves per level."""
    figure, panels = image_panels(3, walk.size, columns=3)
    candidates = _together([level.candidates for level in walk.levels])
    kept = _together([level.kept for level in walk.levels])
    best = candidates.boxes[:CANDIDATES]
    stays = (best[:, None] == kept.boxes).all(-1).any(1)
    for axes in panels[:2]:
        show_image(axes, walk.image, faded=True)
        show_boxes(axes, best[stays], Look("stays", BLUE))
    show_boxes(panels[0], best[~stays], Look("a better one is nearly the same", VERMILLION, "--"))
    panels[0].set_title(f"the {len(best)} best boxes before NMS", fontsize=10)
    panels[1].set_title(f"the {int(stays.sum())} of them that stay", fontsize=10)
    _draw_counts(panels[2], walk)
    legend_of(figure, panels)
    cfg = walk.cfg.proposals
    top = cfg.train if walk.cfg.eval.split == "train" else cfg.test
    return Plate(
        "nms",
        "Non-maximum suppression",
        f"Neighbouring anchors find the same object. So of each level the {top.pre_nms:,} boxes "
        "that rank highest are taken from the best down, and every box that overlaps a "
        f"better one by an IoU above {cfg.nms_iou:g} goes: {len(kept.logits):,} of "
        f"{len(candidates.logits):,} stay here. The best {top.post_nms:,} of all levels together, "
        "at most, are the proposals.",
        figure,
        (make_proposals,),
    )


def _together(levels: list[Proposals]) -> Proposals:
    """Boxes of all levels, the best first."""
    boxes, logits = (torch.cat(parts) for parts in zip(*levels, strict=True))
    order = logits.argsort(descending=True, stable=True)
    return Proposals(boxes[order], logits[order])


def _draw_counts(axes: Axes, walk: Walk) -> None:
    """How many boxes of each level go into NMS, and how many are left."""
    places = torch.arange(len(walk.levels))
    counts = [[len(v.candidates.logits) for v in walk.levels]]
    counts.append([len(v.kept.logits) for v in walk.levels])
    for i, (of_levels, name, colour) in enumerate(
        zip(counts, ("before NMS", "after NMS"), (SKY_BLUE, BLUE), strict=True)
    ):
        bars = axes.barh(places + 0.4 * i - 0.2, of_levels, 0.4, color=unit(colour), label=name)
        axes.bar_label(bars, padding=2, fontsize=9)
    axes.set_yticks(places.tolist(), [f"stride {level.stride}" for level in walk.levels])
    axes.set(ylim=(len(places) - 0.5, -0.5), xlim=(0, 1.25 * max(1, *counts[0])))
    axes.set_title("boxes of each level", fontsize=10)


def proposals_plate(walk: Walk) -> Plate:
    """The best few proposals, and of more the ones that overlap the objects most."""
    figure, panels = image_panels(2, walk.size, columns=2)
    few, many = (walk.proposals.boxes[:count] for count in (DRAWN_PROPOSALS, MANY))
    for axes in panels:
        show_image(axes, walk.image, faded=True)
    text = f"What is left, best first: {len(walk.proposals.logits):,} boxes that say where objects "
    text += "are, but not which. "
    if walk.truth is None:
        show_boxes(panels[0], few, PROPOSAL)
        show_boxes(panels[1], many, PROPOSAL)
        panels[1].set_title(f"the {len(many)} best", fontsize=10)
        text += "What the objects are is not known here, so none can be called found or missed."
    else:
        objects = walk.truth.boxes[~walk.truth.ignore]
        found_by_few = int((_overlaps(objects, few).amax(1) >= FOUND_IOU).sum())
        found = _draw_found(panels[1], objects, many)
        show_objects(panels[0], walk.truth)
        show_boxes(panels[0], few, PROPOSAL)
        panels[1].set_title(
            f"of the {len(many)} best: those that overlap the objects most, with IoU", fontsize=10
        )
        text += (
            f"An object counts as found here if one overlaps it by an IoU of {FOUND_IOU:g}: the "
            f"best {len(few)} find {found_by_few} of {len(objects)} objects, the best {len(many)} "
            f"find {found}. Recall is this share over all images, and average recall its mean over "
            "thresholds from 0.5 to 0.95."
        )
    panels[0].set_title(f"the {len(few)} best", fontsize=10)
    legend_of(figure, panels)
    return Plate("proposals", "The proposals", text, figure, (make_proposals, score_recall))


def _draw_found(axes: Axes, objects: Tensor, boxes: Tensor) -> int:
    """Objects [G, 4], with the box that overlaps each of them most; how many are found."""
    best, which = _overlaps(objects, boxes).max(1)
    found = best >= FOUND_IOU
    show_boxes(axes, objects[found], OBJECT)
    show_boxes(axes, objects[~found], MISSED)
    if len(boxes):
        show_boxes(axes, boxes[which[found]], PROPOSAL)
    for (x1, y1, *_), iou in zip(objects.tolist(), best.tolist(), strict=True):
        show_number(axes, x1, y1, f" {iou:.2f}")
    return int(found.sum())


def _overlaps(objects: Tensor, boxes: Tensor) -> Tensor:
    """IoU [G, K], with one box more that overlaps nothing: a maximum is always there."""
    return box_iou(objects, torch.cat([boxes, torch.zeros(1, 4)]))
