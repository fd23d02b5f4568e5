"""What of a report matters most, as lines: what is wrong, out of reach, to be changed."""

import math
from collections.abc import Iterator

from rpn_train.inspect.coverage import Reach
from rpn_train.inspect.inspection import SMALL_PX, Level, Report
from rpn_train.inspect.split_summary import OVER_BORDER_PX, Fault

MANY = 0.05  # share of the objects that is worth a line at the top
HALF = 0.5  # of the objects with a positive anchor: fewer are worth a try at fitting
MUCH = 0.1  # loss of recall that is
SUSPICIOUS = 0.05  # of boxes over the border: more than careless drawing
LITTLE = 0.01  # gain in mean IoU that is not worth a change


def findings(report: Report) -> list[str]:
    """What is wrong, what cannot be reached, what to change: the worst first."""
    return [*_wrong(report), *_reached(report), *_advice(report)]


def untrained(reach: Reach) -> float:
    """Share of the objects that no anchor is positive for."""
    return max(0.0, 1 - reach.reached - reach.forced)


def count(number: int, what: str) -> str:
    """'1 image', '2 images'."""
    plural = "boxes" if what == "box" else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def extent(size: tuple[float, float]) -> str:
    """Height x width, px; 'image' where there is no end."""
    height, width = size
    if max(size) == math.inf:
        return "image"
    return f"{height:.0f} x {width:.0f}"


def percent(share: float) -> str:
    """A share 0..1; '-' where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _wrong(report: Report) -> Iterator[str]:
    data = report.data
    for reason, fault in data.left_out.items():
        yield f"left out: {_fault(reason, fault)}"
    for reason, fault in data.files.items():
        yield f"of {data.files_checked:,} image files looked at: {_fault(reason, fault)}"
    if data.over_border:
        share = data.over_border / data.objects
        doubt = "; are they x, y, width, height?" if share > SUSPICIOUS else ""
        yield (
            f"{count(data.over_border, 'box')} ({percent(share)}) cut at the border of the "
            f"image, over which they reach by more than {OVER_BORDER_PX:g} px{doubt}"
        )
    if data.repeated:
        yield f"{count(data.repeated, 'object')} with the very box of another of the same image"
    if not data.objects:
        yield "there is no object"


def _reached(report: Report) -> Iterator[str]:
    everything = report.reach["area"]["all"]
    if not everything.num_objects:
        return
    trains = (
        f", {percent(everything.forced)} train only through their best one, "
        f"{percent(untrained(everything))} not at all"
    )
    yield (
        f"{percent(everything.reached)} of the objects reach IoU {report.fg_iou:g} with an anchor"
        + trains * report.by_iou
    )
    for kind in ("side", "ratio"):
        for name, group in report.reach[kind].items():
            common = group.num_objects >= MANY * everything.num_objects
            if common and group.recall_iou50 < everything.recall_iou50 - MUCH:
                of = "side" if kind == "side" else "height : width"
                yield (
                    f"{of} {name}: of {count(group.num_objects, 'object')} "
                    f"{percent(group.recall_iou50)} have an anchor of IoU 0.5 (of all "
                    f"{percent(everything.recall_iou50)})"
                )


def _advice(report: Report) -> Iterator[str]:
    now, *larger = report.small.items()
    if now[1] > MANY:
        shares = ", ".join(f"{percent(share)} at {side} px" for side, share in larger)
        yield (
            f"{percent(now[1])} of the objects are under {SMALL_PX:g} px after resizing to a "
            f"short side of {now[0]} px; {shares}"
        )
    unused = [f"{size:g} px {_ratio(ratio)} on {x.stride}" for x, size, ratio in _unused(report)]
    if unused:
        listed = ", ".join(unused[:4]) + ", ..." * (len(unused) > 4)
        yield f"{count(len(unused), 'anchor')} of a cell best for no object: {listed}"
    for level in report.levels:
        if level.out_of_sight and level.field_px is not None:
            yield (
                f"stride {level.stride}: {count(len(level.out_of_sight), 'anchor')} larger than "
                f"the {extent(level.field_px)} px that a cell sees, up to "
                f"{extent(max(level.out_of_sight, key=max))} px (height x width)"
            )
    yield from _fitted(report)


def _fitted(report: Report) -> Iterator[str]:
    everything = report.reach["area"]["all"]
    if report.fit is None:
        if everything.reached < HALF:
            yield "fit=true proposes anchors for this data"
        return
    before, after = report.fit.before["all"], report.fit.after["all"]
    gain = "raise" if after.mean_iou - before.mean_iou > LITTLE else "hardly change"
    yield (
        f"fitted anchors {gain} the mean best IoU: {before.mean_iou:.3f} -> {after.mean_iou:.3f}, "
        f"best possible recall at IoU 0.7: {percent(before.recall_iou70)} -> "
        f"{percent(after.recall_iou70)}"
    )


def _unused(report: Report) -> list[tuple[Level, float, float]]:
    return [(level, *shape) for level in report.levels for shape in level.unused]


def _fault(reason: str, fault: Fault) -> str:
    return f"{fault.count:,} x {reason}, first {fault.first}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2g}:1"
