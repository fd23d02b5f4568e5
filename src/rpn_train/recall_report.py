"""Recall as a person reads it: tables on the terminal and in Markdown, figures in files."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from rpn_train.figures import figure_to_image, recall_curves
from rpn_train.recall import SIZES, Recall
from rpn_train.run_log import write_json, write_text


def recall_table(figures: Mapping[str, float | None]) -> str:
    """Figures of `Recall.figures`, or of recall.json, as a table: a column for each size."""
    sizes = {size: "" if size == "all" else f"_{size}" for size in SIZES}
    limits = [int(key.removeprefix("ar_")) for key in figures if re.fullmatch(r"ar_\d+", key)]
    labels = {
        f"{label}@{n}{iou}": key
        for n in limits
        for label, key, iou in (
            ("AR", f"ar_{n}", ""),
            ("R", f"recall_{n}_iou50", ", IoU .5"),
            ("R", f"recall_{n}_iou70", ", IoU .7"),
        )
    }
    rows = [f"{'':<18}" + "".join(f"{size:>9}" for size in sizes)]
    for label, key in labels.items():
        values = [figures[key + suffix] for suffix in sizes.values()]
        cells = ["-" if v is None or math.isnan(v) else f"{v:.4f}" for v in values]
        rows.append(f"{label:<18}" + "".join(f"{cell:>9}" for cell in cells))
    counts = [figures[f"num_objects{suffix}"] for suffix in sizes.values()]
    rows.append(f"{'objects':<18}" + "".join(f"{count:>9}" for count in counts))
    return "\n".join(rows)


def tell_recall(recalls: Mapping[str, Recall], folder: Path, extra: Mapping[str, Any]) -> None:
    """Print a table of each, and write recall.json, recall.md and the curves as PNG to a folder.

    With one nameless recall, recall.json holds its figures; otherwise those of each under its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: recall.figures() for name, recall in recalls.items()}
    for name, values in figures.items():
        print(f"{name}\n{recall_table(values)}" if name else recall_table(values))
        curves = figure_to_image(recall_curves(recalls[name]))
        picture = Image.fromarray(curves.permute(1, 2, 0).numpy())
        picture.save(folder / (f"recall_{name}.png" if name else "recall.png"))
    nameless = figures.get("")
    write_json(folder / "recall.json", {**extra, **(figures if nameless is None else nameless)})
    write_text(folder / "recall.md", recall_markdown(figures))
    print(f"written to {folder}: recall.json, recall.md and the curves as PNG")


def recall_markdown(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of all objects as a table in Markdown: a row for each name."""
    limits = [key for key in next(iter(figures.values())) if re.fullmatch(r"ar_\d+", key)]
    columns = [*limits, *(f"recall_{key[3:]}_iou50" for key in limits)]
    rows = [
        f"| {name or 'proposals'} | " + " | ".join(f"{values[c]:.4f}" for c in columns) + " |"
        for name, values in figures.items()
    ]
    titles = [
        c.replace("ar_", "AR@").replace("recall_", "R@").replace("_iou50", ", IoU .5")
        for c in columns
    ]
    head = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, *rows]) + "\n"
