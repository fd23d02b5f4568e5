"""Make docs/how-it-works.md and its figures from a run on drawn shapes, or only renew its links.

    python scripts/make_how_it_works.py runs/demo [KEY=VALUE ...] --image shapes_1000002
    python scripts/make_how_it_works.py --links

The image is one of the validation split, drawn from the seed. The overrides are those of
`rpn-inspect`, such as another size of the image. Every figure is followed by the line of code that
it comes from: `--links` finds these lines again, when code has moved.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rpn_train.cli import compose_run
from rpn_train.cli_inspect import find_image
from rpn_train.cli_trained import configured
from rpn_train.curves import figure_to_image
from rpn_train.errors import ConfigError, UserError
from rpn_train.inspect.receptive_field import receptive_fields
from rpn_train.inspect.story import place, plates, story_page
from rpn_train.inspect.walk import walk
from rpn_train.options import to_mapping
from rpn_train.pretrained import find_pretrained, stored_config, trained_model
from rpn_train.report import flatten
from rpn_train.run_log import write_text

DOCS = Path(__file__).parents[1] / "docs"
PAGE, SOURCE = DOCS / "how-it-works.md", "../src/rpn_train"
LINK = re.compile(rf"\[`([\w.]+)`\]\({re.escape(SOURCE)}/([\w/]+)\.py#L\d+\)")
COLOURS = 256  # of a figure: a third of the bytes, and no difference to see
# What makes a run another one; the rest of the configuration is how it was computed.
SECTIONS = ("dataset.", "image.", "backbone.", "anchors.", "method.", "schedule.", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 an error in one line on stderr."""
    parser = argparse.ArgumentParser(description="Make docs/how-it-works.md.")
    parser.add_argument("run", nargs="?", help="run folder or checkpoint, of dataset=shapes")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-inspect")
    parser.add_argument("--image", default="shapes_1000002", help="of the validation split")
    parser.add_argument("--links", action="store_true", help="only renew the links to the code")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.links:
            write_text(PAGE, with_new_links(PAGE.read_text(encoding="utf-8")))
        elif args.run:
            make(args.run, args.overrides, args.image)
        else:
            raise ConfigError("expected a run folder, or --links")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(run: str, overrides: Sequence[str], image: str) -> None:
    """Write the page and its figures."""
    source = find_pretrained(run)
    trained = flatten(to_mapping(stored_config(source)))
    cfg = configured(source, overrides)
    if cfg.dataset.format != "shapes":
        raise ConfigError(f"dataset: expected shapes, which are anyone's, got {cfg.dataset.format}")
    index, read, row, _ = find_image(image, "val", cfg)
    model = trained_model(cfg, source)
    seen = walk(model, index, read, row, cfg, truth=True, seed=cfg.seed)
    shown = plates(seen, receptive_fields(model))
    (DOCS / "images").mkdir(parents=True, exist_ok=True)
    for plate in shown:
        save_small(figure_to_image(plate.figure), DOCS / "images" / f"{plate.name}.png")
    lead = introduction(trained, overrides, seen.name)
    write_text(PAGE, story_page("How it works", lead, shown, "images/{}.png".format, linked))


def introduction(trained: dict[str, Any], overrides: Sequence[str], image: str) -> list[str]:
    """What the page is about, and how it was made: `trained` is the configuration of the run."""
    defaults = flatten(to_mapping(compose_run([])))
    changed = [
        f"{key}={str(value).replace(' ', '')}"
        for key, value in trained.items()
        if key.startswith(SECTIONS) and value != defaults[key]
    ]
    train = shlex.join(["rpn-train", "output_dir=runs/demo", *changed])
    script = ["python", "scripts/make_how_it_works.py", "runs/demo", *overrides, "--image", image]
    return [
        "A Region Proposal Network (RPN, [Ren et al. 2015](https://arxiv.org/abs/1506.01497)) says "
        "where in an image objects are, without saying which. This page follows one image through "
        "a trained one, from its pixels to the proposals. Boxes that stand for the same thing have "
        "the same colour throughout.",
        "The same figures of your own run and image:",
        "```\nrpn-inspect checkpoint=runs/a image=photo.jpg\n```",
        "This page was made by",
        f"```\n{train}\n{shlex.join(script)}\n```",
    ]


def linked(function: Callable[..., Any]) -> str:
    """A link to the line where a function begins."""
    name, file, line = place(function)
    return f"[`{name}`]({SOURCE}/{file}#L{line})"


def with_new_links(page: str) -> str:
    """The page with the lines where its functions begin now."""

    def again(found: re.Match[str]) -> str:
        module = found[2].replace("/", ".")
        name = found[1].removeprefix(f"{module}.")
        return linked(getattr(importlib.import_module(f"rpn_train.{module}"), name))

    return LINK.sub(again, page)


def save_small(picture: Tensor, path: Path) -> None:
    """A figure uint8 [3, H, W] as a PNG of few colours."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    kind, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    image.quantize(COLOURS, method=kind, kmeans=3, dither=plain).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
