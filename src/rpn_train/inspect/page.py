"""The page that `rpn-inspect` prints, as plain text and as Markdown: what matters comes first."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpn_train.inspect.coverage import Reach
from rpn_train.inspect.findings import count, extent, findings, percent, untrained
from rpn_train.inspect.inspection import SMALL_PX, FitSummary, Level, Report
from rpn_train.inspect.split_summary import Spread


@dataclass(frozen=True)
class Section:
    """A title, lines of text, and below them a table; its first row has the names of columns."""

    title: str
    lines: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()


def page_title(report: Report) -> str:
    """Which data, at which size, for which network."""
    return (
        f"{report.split} of {report.source} at {report.short_side} px (at most {report.max_side}), "
        f"{report.backbone}"
    )


def page_sections(report: Report) -> list[Section]:
    """Everything but the findings."""
    sections = [_data(report), _reach(report), _levels(report)]
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
    """All figures and the findings, plain."""
    return {"findings": findings(report), **dataclasses.asdict(report)}


def _data(report: Report) -> Section:
    data = report.data
    ignored = f", {data.ignored:,} to ignore (crowd, difficult)" if data.ignored else ""
    lines = [
        f"{count(data.images, 'image')}, {data.empty_images:,} without objects; "
        f"{count(data.objects, 'object')}{ignored}",
        f"objects under {SMALL_PX:g} px at a short side of "
        + ", ".join(f"{side} px: {percent(share)}" for side, share in report.small.items()),
    ]
    rows = [
        ["objects per image", *_cells(data.objects_per_image, ".0f")],
        ["side, px", *_cells(data.side_px, ".0f")],
        ["height / width", *_cells(data.ratio, ".2f")],
    ]
    head = ["", "5 %", "25 %", "median", "75 %", "95 %", "most"]
    return Section("The data, resized as for training", lines, [head, *rows])


def _reach(report: Report) -> Section:
    positives, shares = report.positives, report.reach
    per_image = positives.per_image
    lines = [
        f"shares of objects with such an anchor; below IoU {report.fg_iou:g} their best one alone"
    ]
    lines.append("trains (forced), or none (untrained)" + ", if IoU decides" * (not report.by_iou))
    if positives.images and report.by_iou:
        sampled = f"{percent(positives.above_sample)} have more than are sampled; "
        lines += [
            f"positive anchors per image: {per_image.p5:.0f} to {per_image.p95:.0f} (5 to 95 %), "
            f"median {per_image.median:.0f};",
            f"of {count(positives.images, 'image')} "
            + sampled * (not math.isnan(positives.above_sample))
            + f"{percent(positives.objects_without)} of the objects have none",
        ]
    total = shares["area"]["all"].num_objects
    rows = [["", "objects", "share", *_reach_columns(report)]]
    for kind, groups in shares.items():
        for name, group in groups.items():
            if group.num_objects:
                label = f"ratio {name}" if kind == "ratio" else name
                share = percent(group.num_objects / total)
                rows.append([label, f"{group.num_objects:,}", share, *_reach_cells(report, group)])
    return Section("Reach of the anchors", lines, rows)


def _levels(report: Report) -> Section:
    rows = [
        ["stride", "sizes", "largest", "best for", "of side", "unused", "sees", "in effect"],
        *([str(x.stride), *_level_cells(x, len(report.ratios))] for x in report.levels),
    ]
    lines = [
        "px, height x width; of side: of the objects best reached here, 5 to 95 %; sees: receptive "
        "field;",
        "in effect: square with 95 % of the gradient, within the image (effective=true)",
    ]
    return Section("Levels", lines, rows)


def _level_cells(level: Level, num_ratios: int) -> list[str]:
    side, anchors = level.side_px, num_ratios * len(level.sizes)
    mark = " !" if level.out_of_sight else ""
    return [
        " ".join(f"{size:g}" for size in level.sizes),
        extent(level.largest_anchor_px),
        f"{level.best_for:,}",
        f"{side.p5:.0f} - {side.p95:.0f}" if level.best_for else "-",
        f"{len(level.unused)} of {anchors}",
        "-" if level.field_px is None else extent(level.field_px) + mark,
        "-" if level.effective_px is None else str(level.effective_px),
    ]


def _fit(report: Report) -> Section:
    assert report.fit is not None
    rows = [["", "objects", *_reach_columns(report)]]
    for name, before in report.fit.before.items():
        if before.num_objects:
            rows.append([name, f"{before.num_objects:,}", *_reach_cells(report, before)])
            rows.append(["  fitted", "", *_reach_cells(report, report.fit.after[name])])
    return Section("Fitted anchors", [_overrides(report.fit)], rows)


def _overrides(fit: FitSummary) -> str:
    """Anchors as they are typed."""
    sizes = ",".join(f"[{','.join(f'{size:g}' for size in level)}]" for level in fit.sizes)
    ratios = ",".join(f"{ratio:g}" for ratio in fit.ratios)
    rounded = "" if fit.rounded else " anchors.rounded=false"
    return f"anchors.sizes='[{sizes}]' anchors.ratios='[{ratios}]'{rounded}"


def _reach_columns(report: Report) -> list[str]:
    thresholds = [f"IoU .{name}" for name in ("5", "7")]
    own = [] if report.fg_iou in (0.5, 0.7) else [f"IoU {report.fg_iou:g}"]
    return ["mean IoU", *thresholds, *own, "forced", "untrained"]


def _reach_cells(report: Report, reach: Reach) -> list[str]:
    own = [] if report.fg_iou in (0.5, 0.7) else [reach.reached]
    shares = [reach.recall_iou50, reach.recall_iou70, *own, reach.forced, untrained(reach)]
    return [f"{reach.mean_iou:.3f}", *map(percent, shares)]


def _cells(spread: Spread, form: str) -> list[str]:
    values = dataclasses.astuple(spread)
    return ["-" if math.isnan(value) else f"{value:{form}}" for value in values]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
