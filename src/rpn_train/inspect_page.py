"""The page that `rpn-inspect` prints, as plain text and as Markdown: what matters comes first."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rpn_train.coverage import Reach
from rpn_train.inspect_data import SMALL_PX, Level, Report
from rpn_train.split_summary import OVER_BORDER_PX, Fault, Spread

MANY = 0.1  # a share that is worth a line at the top
SUSPICIOUS = 0.05  # of boxes over the border: more than careless drawing


@dataclass(frozen=True)
class Section:
    """A title, lines of text, and below them a table; its first row has the names of columns."""

    title: str
    lines: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()


def findings(report: Report) -> list[str]:
    """What is wrong, what cannot be reached, what to change: the worst first."""
    return [*_wrong(report), *_reached(report), *_advice(report)]


def page_sections(report: Report) -> list[Section]:
    """Everything but the findings."""
    sections = [_data(report), _reach(report), _levels(report), _image_size(report)]
    return sections if report.fit is None else [*sections, _fit(report)]


def plain_page(title: str, found: Sequence[str], sections: Sequence[Section]) -> str:
    """For a terminal, some 100 columns wide."""
    lines = [title, *(f"  * {finding}" for finding in found)]
    for section in sections:
        lines += ["", section.title.upper(), *(f"  {line}" for line in section.lines)]
        lines += [f"  {row}" for row in _aligned(section.table)]
    return "\n".join(lines)


def markdown_page(
    title: str, found: Sequence[str], sections: Sequence[Section], pictures: dict[str, str]
) -> str:
    """The same in Markdown, with figures.

    Args:
        pictures: file name -> what it shows.
    """
    parts = [f"# {title}", "\n".join(f"- {finding}" for finding in found)]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.lines:
            parts.append("  \n".join(section.lines))
        if section.table:
            head, *rows = [f"| {' | '.join(row)} |" for row in section.table]
            rule = "|---" + "|---:" * (len(section.table[0]) - 1) + "|"
            parts.append("\n".join([head, rule, *rows]))
    parts += [f"## {text}\n\n![{text}]({name})" for name, text in pictures.items()]
    return "\n\n".join(parts) + "\n"


def report_mapping(report: Report) -> dict[str, Any]:
    """All figures and the findings, for JSON; null where a figure is undefined or infinite."""
    mapping: dict[str, Any] = _finite(dataclasses.asdict(report))
    return {"findings": findings(report), **mapping}


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
            f"{_count(data.over_border, 'box')} ({_percent(share)}) cut at the border of the "
            f"image, over which they reach by more than {OVER_BORDER_PX:g} px{doubt}"
        )
    if data.repeated:
        yield f"{_count(data.repeated, 'object')} with the very box of another of the same image"
    if not data.objects:
        yield "there is no object"


def _reached(report: Report) -> Iterator[str]:
    everything = report.reach["area"]["all"]
    if not everything.num_objects:
        return
    yield (
        f"{_percent(everything.reached)} of the objects reach IoU {report.fg_iou:g} with an anchor, "
        f""
        f"{_percent(everything.forced)} train only through their best one, "
        f"{_percent(_untrained(everything))} not at all"
    )
    sides = report.reach["side"]
    hard = [
        (name, group)
        for name, group in sides.items()
        if group.num_objects > MANY * everything.num_objects
        and group.recall_iou50 < everything.recall_iou50 - MANY
    ]
    for name, group in hard:
        yield (
            f"of the {group.num_objects:,} objects of {name} only {_percent(group.recall_iou50)} "
            f"have an anchor of IoU 0.5 (of all {_percent(everything.recall_iou50)})"
        )


def _advice(report: Report) -> Iterator[str]:
    now, *larger = report.small.items()
    if now[1] > MANY:
        shares = ", ".join(f"{_percent(share)} at {side} px" for side, share in larger)
        yield (
            f"{_percent(now[1])} of the objects are under {SMALL_PX:g} px after resizing to a "
            f"short side of {now[0]} px; {shares}"
        )
    unused = [f"{size:g} px {_ratio(ratio)} on {x.stride}" for x, size, ratio in _unused(report)]
    if unused:
        listed = ", ".join(unused[:4]) + ", ..." * (len(unused) > 4)
        yield f"{_count(len(unused), 'anchor')} of a cell best for no object: {listed}"
    for level in report.levels:
        if level.out_of_sight and level.field_px is not None:
            yield (
                f"stride {level.stride}: {_count(len(level.out_of_sight), 'anchor')} larger than "
                f"the {_extent(level.field_px)} px that a cell sees, up to "
                f"{_extent(max(level.out_of_sight, key=max))} px (height x width)"
            )
    if report.fit is not None:
        before, after = report.fit.before["all"], report.fit.after["all"]
        yield (
            f"fitted anchors raise the mean best IoU from {before.mean_iou:.3f} to "
            f"{after.mean_iou:.3f}, best possible recall at IoU 0.7 from "
            f"{_percent(before.recall_iou70)} to {_percent(after.recall_iou70)}"
        )


def _data(report: Report) -> Section:
    data = report.data
    ignored = f", {data.ignored:,} to ignore (crowd, difficult)" if data.ignored else ""
    lines = [
        f"{_count(data.images, 'image')}, {data.empty_images:,} without objects; "
        f"{_count(data.objects, 'object')}{ignored}",
    ]
    rows = [
        ["objects per image", *_cells(data.objects_per_image, "g")],
        ["side, px", *_cells(data.side_px, "g")],
        ["height / width", *_cells(data.ratio, ".2f")],
        ["positive anchors per image", *_cells(report.positives.per_image, "g")],
    ]
    head = ["", "5 %", "25 %", "median", "75 %", "95 %", "most"]
    return Section("The data, resized as for training", lines, [head, *rows])


def _reach(report: Report) -> Section:
    positives, shares = report.positives, report.reach
    lines = [
        "positive: share of objects with an anchor of IoU "
        f"{report.fg_iou:g}; forced: only their best anchors train; untrained: none",
        f"in {_count(positives.images, 'image')}: more positive anchors than are sampled in "
        f"{_percent(positives.above_sample)}, objects left without one "
        f"{_percent(positives.objects_without)}",
    ]
    total = shares["area"]["all"].num_objects
    rows = [["", "objects", "share", *REACH_COLUMNS]]
    for kind, groups in shares.items():
        for name, group in groups.items():
            if group.num_objects:
                label = f"ratio {name}" if kind == "ratio" else name
                share = _percent(group.num_objects / total)
                rows.append([label, f"{group.num_objects:,}", share, *_reach_cells(group)])
    return Section("Reach of the anchors", lines, rows)


def _levels(report: Report) -> Section:
    rows = [
        ["stride", "sizes", "largest", "best for", "of side", "unused", "sees", "in effect"],
        *([str(x.stride), *_level_cells(x, len(report.ratios))] for x in report.levels),
    ]
    lines = [
        "of side: of the objects best reached here, 5 to 95 %; sees: receptive field; px, "
        "height x width",
    ]
    return Section("Levels", lines, rows)


def _level_cells(level: Level, num_ratios: int) -> list[str]:
    side, anchors = level.side_px, num_ratios * len(level.sizes)
    mark = " !" if level.out_of_sight else ""
    return [
        " ".join(f"{size:g}" for size in level.sizes),
        _extent(level.largest_anchor_px),
        f"{level.best_for:,}",
        f"{side.p5:.0f} - {side.p95:.0f}" if level.best_for else "-",
        f"{len(level.unused)} of {anchors}",
        "-" if level.field_px is None else _extent(level.field_px) + mark,
        "-" if level.effective_px is None else str(level.effective_px),
    ]


def _image_size(report: Report) -> Section:
    rows = [
        ["short side, px", *map(str, report.small)],
        [f"under {SMALL_PX:g} px", *map(_percent, report.small.values())],
    ]
    return Section("Small objects by image size", (), rows)


def _fit(report: Report) -> Section:
    assert report.fit is not None
    rows = [["", "objects", *REACH_COLUMNS]]
    for name, before in report.fit.before.items():
        if before.num_objects:
            cells = _reach_cells(report.fit.after[name])
            rows.append([name, f"{before.num_objects:,}", *_reach_cells(before)])
            rows.append(["  fitted", "", *cells])
    return Section("Fitted anchors", [anchor_overrides(report)], rows)


def anchor_overrides(report: Report) -> str:
    """The fitted anchors as they are typed to `rpn-train`."""
    assert report.fit is not None
    sizes = ",".join(f"[{','.join(f'{s:g}' for s in level)}]" for level in report.fit.sizes)
    ratios = ",".join(f"{ratio:g}" for ratio in report.fit.ratios)
    return f"anchors.sizes='[{sizes}]' anchors.ratios='[{ratios}]'"


REACH_COLUMNS = ("mean IoU", "IoU .5", "IoU .7", "positive", "forced", "untrained")


def _reach_cells(reach: Reach) -> list[str]:
    shares = (reach.recall_iou50, reach.recall_iou70, reach.reached, reach.forced)
    return [f"{reach.mean_iou:.3f}", *map(_percent, shares), _percent(_untrained(reach))]


def _untrained(reach: Reach) -> float:
    return max(0.0, 1 - reach.reached - reach.forced)


def _unused(report: Report) -> list[tuple[Level, float, float]]:
    return [(level, *shape) for level in report.levels for shape in level.unused]


def _fault(reason: str, fault: Fault) -> str:
    return f"{fault.count:,} x {reason}, first {fault.first}"


def _cells(spread: Spread, form: str) -> list[str]:
    form = ".0f" if form == "g" else form
    return [f"{value:{form}}" for value in dataclasses.astuple(spread)]


def _count(number: int, what: str) -> str:
    plural = "boxes" if what == "box" else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _extent(size: tuple[float, float]) -> str:
    height, width = size
    if max(size) == math.inf:
        return "image"
    return f"{height:.0f} x {width:.0f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2g}:1"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
