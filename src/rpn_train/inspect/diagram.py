"""The modules of a network and what flows between them, with the sizes that one image gave them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rpn_train.figures import BLUISH_GREEN, GREY, ORANGE, SKY_BLUE
from rpn_train.inspect.panels import WIDTH_IN, Plate, unit
from rpn_train.inspect.walk import Walk
from rpn_train.model import RPN
from rpn_train.objective import batch_losses

LINE_IN, BOX_IN, COLUMN_IN = 0.165, 1.74, 2.0  # height of a line, width of a box, and of its place
GAP_IN, AROUND_IN = 0.5, 0.09  # between rows, and around the head
POINTS = 8.5
OF_NETWORK, OF_TRAINING, OF_RESULT, GIVEN = SKY_BLUE, ORANGE, BLUISH_GREEN, GREY

Point = tuple[float, float]


@dataclass(frozen=True)
class Block:
    """A box of lines, the first in bold; its middle (x, y) and its width in inches."""

    lines: Sequence[str]
    colour: tuple[int, int, int]
    x: float
    y: float
    width: float = BOX_IN

    @property
    def height(self) -> float:
        """Inches."""
        return _height(self.lines)

    def edge(self, right: float, up: float) -> Point:
        """A point: (-1, 0) is the middle of the left edge, (0, 1) that of the upper one."""
        return self.x + right * self.width / 2, self.y + up * self.height / 2


def modules_plate(walk: Walk) -> Plate:
    """The modules, and the size of everything between them."""
    blocks, method = _blocks(walk), walk.cfg.method
    height = max(block.edge(0, 1)[1] for block in blocks.values()) + 2 * AROUND_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH_IN), ylim=(0, height))
    axes.set_axis_off()
    _draw_head(axes, blocks)
    for block in blocks.values():
        _draw(axes, block)
    learned = method.head == "cascade" or method.assignment == "task_aligned"
    for start, end in _arrows(blocks, learned):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"})
    pyramid = ", a feature pyramid" * ("pyramid" in blocks)
    return Plate(
        "modules",
        "The modules",
        f"The network (blue) is a backbone{pyramid} and a head"
        + ", the same one on every level" * ("pyramid" in blocks)
        + ". In training (orange) its outputs are compared with what the objects demand of the "
        "anchors"
        + "; which anchors that are follows from boxes alone, so they are picked first, and the "
        "outputs computed only there"
        * (method.sampling != "all" and method.head != "cascade")
        + ". In use (green) the outputs at all anchors become "
        "proposals. The sizes are those of this network and this image, channels x height x width.",
        figure,
        (RPN, batch_losses),
    )


def _blocks(walk: Walk) -> dict[str, Block]:
    """All boxes, from the bottom row up."""
    num_anchors, method = len(walk.anchors), walk.cfg.method
    lengths = " + ".join(f"{level.logits.numel():,}" for level in walk.levels)
    anchors = [
        f"anchors: {num_anchors:,} x 4",
        *[f"= {lengths}, level by level"] * (len(walk.levels) > 1),
    ]
    y = 0.1 + _height(anchors) / 2
    blocks = {"anchors": Block(anchors, GIVEN, _column(2.5), y, 3 * COLUMN_IN + BOX_IN)}
    read = "anchors" if method.learn_background else "positives"
    most = (
        method.num_samples if method.learn_background else method.num_samples * method.fg_fraction
    )
    sampling = ["sampling", f"{min(int(most), num_anchors):,} {read}"]
    if method.sampling == "all":
        sampling = ["no sampling", f"all {read}"]
    losses = ["objectness + boxes", *["+ centerness"] * method.centerness]
    losses += ["+ boxes of stage one"] * (method.head == "cascade")
    num_objects = "G" if walk.truth is None else f"{len(walk.truth.boxes)}"
    lower = {
        "truth": (["ground truth", f"{num_objects} x 4"], GIVEN),
        "assign": (["assignment", f"{num_anchors:,} labels"], OF_TRAINING),
        "sample": (sampling, OF_TRAINING),
        "losses": (["losses", *losses], OF_TRAINING),
        "proposals": (
            ["proposals", "decode, clip, NMS", f"{len(walk.proposals.logits):,} x 4"],
            OF_RESULT,
        ),
    }
    tallest = max(_height(lines) for lines, _ in lower.values())
    y = blocks["anchors"].edge(0, 1)[1] + GAP_IN + tallest / 2
    for column, (name, (lines, colour)) in enumerate(lower.items()):
        blocks[name] = Block(lines, colour, _column(column), y)
    return blocks | _network(walk, y + tallest / 2 + GAP_IN)


def _network(walk: Walk, floor: float) -> dict[str, Block]:
    """The boxes of the network, above `floor`."""
    height, width = walk.canvas
    sizes = {name: [" x ".join(map(str, size)) for size in of] for name, of in walk.shapes.items()}
    sizes["body"] = [" x ".join(map(str, size)) for size in _body_sizes(walk)]
    method, branch = walk.cfg.method, f"{walk.kernel} x {walk.kernel}"
    convs = method.num_convs
    stack = "3 x 3 convolution" if convs == 1 else f"{convs} convolutions, 3 x 3"
    window = {
        "shared": [stack],
        "towers": ["two towers, each of", stack],
        "cascade": ["two stages", stack, "moves the anchors;", "adaptive 3 x 3 there"],
    }[method.head]
    third = ["and centerness"] * method.centerness
    outputs = {
        "deltas": [f"{branch} conv.: deltas", *sizes["deltas"], *third],
        "logits": [f"{branch} conv.: objectness", *sizes["logits"]],
    }
    floor += AROUND_IN
    top = floor + sum(_height(lines) for lines in outputs.values()) + GAP_IN / 2
    y = (floor + top) / 2
    rows = {
        "image": (["image", f"3 x {height} x {width}"], GIVEN),
        "body": (["backbone", _shortened(walk.cfg.backbone.name), *sizes["body"]], OF_NETWORK),
        "pyramid": (["feature pyramid", *sizes["backbone"]], OF_NETWORK),
        "head": ([*window, *sizes["hidden"]], OF_NETWORK),
    }
    blocks = {
        name: Block(lines, colour, _column(column), y)
        for column, (name, (lines, colour)) in enumerate(rows.items())
        if name != "pyramid" or len(walk.levels) > 1
    }
    for name, low in (("deltas", floor), ("logits", top - _height(outputs["logits"]))):
        lines = outputs[name]
        blocks[name] = Block(lines, OF_NETWORK, _column(4), low + _height(lines) / 2)
    return blocks


def _arrows(blocks: dict[str, Block], learned: bool) -> list[tuple[Point, Point]]:
    """From where to where something flows.

    Args:
        learned: whether the assignment depends on what the network says.
    """
    path = [blocks[name] for name in ("image", "body", "pyramid", "head") if name in blocks]
    path_of_training = [blocks[name] for name in ("truth", "assign", "sample", "losses")]
    arrows = [
        (a.edge(1, 0), b.edge(-1, 0)) for of in (path, path_of_training) for a, b in pairwise(of)
    ]
    head, losses, proposals = (blocks[name] for name in ("head", "losses", "proposals"))
    arrows += [(head.edge(1, 0), blocks[name].edge(-1, 0)) for name in ("logits", "deltas")]
    x, bottom = blocks["deltas"].edge(0, -1)
    arrows.append(((x - 0.6 * BOX_IN, bottom - AROUND_IN), losses.edge(0.5, 1)))
    arrows.append(((x, bottom - AROUND_IN), proposals.edge(0, 1)))
    if learned:
        start = head.edge(-1, 0)[0], bottom - AROUND_IN
        arrows.append((start, blocks["assign"].edge(0.5, 1)))
    level = blocks["anchors"].edge(0, 1)[1]
    for name in ("assign", "losses", "proposals"):
        x, bottom = blocks[name].edge(0, -1)
        arrows.append(((x, level), (x, bottom)))
    return arrows


def _draw_head(axes: Axes, blocks: dict[str, Block]) -> None:
    """A frame around the parts of the head."""
    left, _ = blocks["head"].edge(-1, 0)
    right, top = blocks["logits"].edge(1, 1)
    _, bottom = blocks["deltas"].edge(1, -1)
    left, bottom, right, top = (
        edge + sign * AROUND_IN for edge, sign in ((left, -1), (bottom, -1), (right, 1), (top, 1))
    )
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.08",
            fill=False,
            edgecolor=unit(OF_NETWORK),
            linestyle="--",
            linewidth=1.5,
        )
    )
    axes.text(left + 0.1, top - 0.15, "head", va="center", fontsize=POINTS, style="italic")


def _draw(axes: Axes, block: Block) -> None:
    left, bottom = block.edge(-1, -1)
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            block.width,
            block.height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=(*unit(block.colour), 0.3),
            edgecolor=unit(block.colour),
            linewidth=1.5,
        )
    )
    middle = (len(block.lines) - 1) / 2
    for i, line in enumerate(block.lines):
        weight = "normal" if i else "bold"
        y = block.y + (middle - i) * LINE_IN
        axes.text(block.x, y, line, ha="center", va="center", fontsize=POINTS, weight=weight)


def _body_sizes(walk: Walk) -> list[tuple[int, ...]]:
    """Channels first, as not all networks have them: the sides of the others are as the canvas."""
    height, width = walk.canvas
    return [
        size if size[1] * width == size[2] * height else (size[2], *size[:2])
        for size in walk.shapes["body"]
    ]


def _height(lines: Sequence[str]) -> float:
    return LINE_IN * (len(lines) + 1.2)


def _column(number: float) -> float:
    """The middle of a column."""
    return COLUMN_IN * (number + 0.5)


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
