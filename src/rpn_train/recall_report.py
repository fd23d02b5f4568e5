"""Recall as a person reads it: tables on the terminal and in Markdown, curves in files."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from rpn_train.curves import figure_to_image, recall_by_iou, recall_by_number
from rpn_train.recall import NAMED_IOUS, SIZES, Protocol, Recall
from rpn_train.run_log import write_text

Figures = Mapping[str, float | None]  # those of `Recall.figures`, or of recall.json

_OF_SIZE = {"AR" if size == "all" else size: f"_{size}".replace("_all", "") for size in SIZES}
# title of a column -> key of its figure, {n} for the number of proposals
COLUMNS = {title: f"ar_{{n}}{suffix}" for title, suffix in _OF_SIZE.items()}
COLUMNS |= {f"IoU .{name[3:].rstrip('0')}": f"recall_{{n}}_{name}" for name in NAMED_IOUS}


def recall_table(figures: Figures) -> str:
    """A row for each N: average recall, also by size, then recall at single IoU thresholds."""
    rows = [f"{'':<8}" + "".join(f"{title:>9}" for title in COLUMNS)]
    for n in _limits(figures):
        cells = [_cell(figures[key.format(n=n)]) for key in COLUMNS.values()]
        rows.append(f"{f'@{n}':<8}" + "".join(f"{cell:>9}" for cell in cells))
    counts = [figures[f"num_objects{suffix}"] for suffix in _OF_SIZE.values()]
    rows.append(f"{'objects':<8}" + "".join(f"{count:>9}" for count in counts))
    return "\n".join(rows)


def recall_markdown(figures: Mapping[str, Figures]) -> str:
    """The table of each name, one below the other, in Markdown."""
    head = f"| | {' | '.join(COLUMNS)} |"
    rows = [head.replace("| |", "| proposals | N |", 1), "|---" * (len(COLUMNS) + 2) + "|"]
    for name, values in figures.items():
        for n in _limits(values):
            cells = " | ".join(_cell(values[key.format(n=n)]) for key in COLUMNS.values())
            rows.append(f"| {name} | {n} | {cells} |")
    return "\n".join(rows) + "\n"


def write_recall(
    recalls: Mapping[str, Recall], protocol: Protocol, folder: Path
) -> dict[str, Tensor]:
    """Write recall.md and two figures, recall_by_number.png and recall_by_iou.png, to a folder.

    Returns:
        The two figures, name -> uint8 [3, H, W].
    """
    named = {name or "proposals": recall for name, recall in recalls.items()}
    figures = {name: recall.figures() for name, recall in named.items()}
    write_text(folder / "recall.md", recall_markdown(figures))
    curves = recall_curves(recalls, protocol)
    for name, picture in curves.items():
        save_picture(picture, folder / f"{name}.png")
    return curves


def recall_curves(recalls: Mapping[str, Recall], protocol: Protocol) -> dict[str, Tensor]:
    """Recall against the number of proposals and against the IoU: name -> uint8 [3, H, W]."""
    return {
        "recall_by_number": figure_to_image(recall_by_number(recalls, protocol)),
        "recall_by_iou": figure_to_image(recall_by_iou(recalls)),
    }


def save_picture(picture: Tensor, path: Path) -> None:
    """A picture uint8 [3, H, W] as a file, of a format by its suffix."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def _limits(figures: Figures) -> list[int]:
    return [int(key.removeprefix("ar_")) for key in figures if re.fullmatch(r"ar_\d+", key)]


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
