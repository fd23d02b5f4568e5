"""All figures of the way of an image in their order, and the page that shows them."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rpn_train.curves import figure_to_image
from rpn_train.inspect.diagram import modules_plate
from rpn_train.inspect.learning_figures import assignment_plate, objectness_plate, read_plate
from rpn_train.inspect.network_figures import (
    anchors_plate,
    features_plate,
    image_plate,
    window_plate,
)
from rpn_train.inspect.panels import Plate
from rpn_train.inspect.proposal_figures import nms_plate, proposals_plate, regression_plate
from rpn_train.inspect.receptive_field import ReceptiveField
from rpn_train.inspect.walk import Walk
from rpn_train.recall_report import save_picture
from rpn_train.run_log import write_text

PACKAGE = Path(__file__).parents[1]


def plates(walk: Walk, fields: list[ReceptiveField] | None) -> list[Plate]:
    """The figures in the order of the way; those of targets only where the objects are known."""
    of_targets = [] if walk.truth is None else [assignment_plate(walk), read_plate(walk)]
    return [
        image_plate(walk),
        modules_plate(walk),
        features_plate(walk),
        window_plate(walk, fields),
        anchors_plate(walk),
        *of_targets,
        objectness_plate(walk),
        regression_plate(walk),
        nms_plate(walk),
        proposals_plate(walk),
    ]


def story_page(
    title: str,
    lead: Sequence[str],
    shown: Sequence[Plate],
    picture: Callable[[str], str],
    link: Callable[[Callable[..., Any]], str],
) -> str:
    """Markdown: each figure with its sentences and where its code is.

    Args:
        lead: paragraphs above the first figure.
        picture: file name of a figure, by its name, from where the page will be.
        link: what the page says of a function.
    """
    parts = [f"# {title}", *lead]
    for number, plate in enumerate(shown, start=1):
        code = ", ".join(link(source) for source in plate.sources)
        parts += [
            f"## {number}. {plate.title}",
            f"![{plate.title}]({picture(plate.name)})",
            plate.text,
            f"Code: {code}",
        ]
    return "\n\n".join(parts) + "\n"


def write_story(
    walk: Walk, fields: list[ReceptiveField] | None, lead: Sequence[str], folder: Path
) -> list[str]:
    """Write the figures and `image.md` to a folder; the names of the files.

    Args:
        lead: lines that stand above the first figure.
    """
    shown = plates(walk, fields)
    files = [f"{plate.name}.png" for plate in shown]
    for plate, file in zip(shown, files, strict=True):
        save_picture(figure_to_image(plate.figure), folder / file)
    page = story_page(walk.name, lead, shown, lambda name: f"{name}.png", _told)
    write_text(folder / "image.md", page)
    return ["image.md", *files]


def place(function: Callable[..., Any]) -> tuple[str, str, int]:
    """Name in this package, file below it, and line of a function or class: a link's ends."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
    file = Path(inspect.getfile(function)).relative_to(PACKAGE).as_posix()
    module = file.removesuffix(".py").replace("/", ".")
    return f"{module}.{function.__qualname__}", file, first + start


def _told(function: Callable[..., Any]) -> str:
    name, file, line = place(function)
    return f"`{name}` (rpn_train/{file}, line {line})"
