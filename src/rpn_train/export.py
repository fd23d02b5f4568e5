"""A trained network as one file that needs nothing of this package: ONNX, or torch.export's .pt2.

All from uint8 images to proposals is inside. An exporter follows no loop over the images of a batch
and no mask that changes a shape, so `ProposalNetwork` does the work of `make_proposals` with logits
of -inf where that drops rows; `test_export.py` holds the two together.
"""

import io
import json
import textwrap
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torchvision.ops import nms

from rpn_train.anchors import grid_anchors
from rpn_train.boxes import clip, decode
from rpn_train.config import ProposalsConfig, TrainConfig
from rpn_train.errors import ConfigError
from rpn_train.model import RPN, normalize_images
from rpn_train.whole_file import replacing

# boxes [N, P, 4], logits [N, P], IoU -> bool [N, P]: what NMS within each row keeps
Suppress = Callable[[Tensor, Tensor, float], Tensor]


@torch.no_grad()
def export_network(model: RPN, cfg: TrainConfig, path: Path, *, step: int | None) -> None:
    """Write a network, from images to proposals, as `.onnx` or `.pt2`: whole or not at all.

    Inputs of the file. B, H and W are free, H and W multiples of the largest stride (in a .pt2 also
    at least twice as large). At others the file fails when it runs; only an ONNX network of one
    level does not, whose grid is then rounded as its feature map is.
        images: uint8 [B, 3, H, W] RGB, resized to `cfg.image`, padded at the right and bottom.
        sizes: int64 [B, 2] height and width of each image without padding, px.
    Outputs. K is `cfg.proposals.test.post_nms`, or levels * pre_nms where that is less.
        boxes: float32 [B, K, 4] xyxy px of the input, best first; zeros after the last proposal.
        logits: float32 [B, K] objectness; -inf after the last proposal.
        num_valid: int64 [B] how many of the K rows are proposals.

    They are those of `make_proposals` in fp32, whatever `cfg.precision` says; only the order among
    equal logits may differ. What the input has to be is in the file too: in the metadata of an ONNX
    model, in the extra file `rpn_train.json` of a .pt2. The latter is for the CPU and loads after
    `import torchvision`; its NMS takes time by the square of B.

    Args:
        step: of the training, for the metadata; None: not known.

    Raises:
        ConfigError: another suffix, the packages of the extra `export` are not installed, or the
            exporter cannot follow the network; of those built here, that is swin_t_fpn.
    """
    if path.suffix not in _FORMATS:
        expected = " or ".join(_FORMATS)
        raise ConfigError(f"output: expected a name that ends in {expected}, got {path.name!r}")
    if path.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ConfigError(f"output: {path.name} needs pip install 'rpn-train[export]'")
    network = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    about = {
        "images": "uint8 RGB, resized, padded at the right and bottom; normalised inside",
        "sizes": "height and width without padding, px",
        "short_side": str(cfg.image.short_side),
        "max_side": str(cfg.image.max_side),
        "divisor": str(max(model.grid.strides)),
        "step": "unknown" if step is None else str(step),
    }
    try:
        with warnings.catch_warnings():
            # what the exporters say is about their own code, and other in every version
            warnings.simplefilter("ignore")
            content = _FORMATS[path.suffix](network, cfg.proposals, about)
    except Exception as error:  # theirs have no class in common
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        raise ConfigError(
            f"backbone.name: {cfg.backbone.name} cannot be exported to {path.suffix}: {reason}"
        ) from error
    with replacing(path) as file:
        file.write(content)


class ProposalNetwork(nn.Module):
    """Images to proposals, best first, in shapes that follow from those of the images alone."""

    def __init__(self, network: RPN, cfg: ProposalsConfig, suppress: Suppress) -> None:
        super().__init__()
        self.network = network
        self._cfg = cfg
        self._suppress = suppress

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The contract of an exported file: see `export_network`."""
        boxes, logits = self._candidates(images, sizes)  # [B, L, P, 4], [B, L, P]
        # rows of -inf come last in NMS, where they suppress nothing
        keep = self._suppress(boxes.flatten(0, 1), logits.flatten(0, 1), self._cfg.nms_iou)
        logits = torch.where(keep.view_as(logits), logits, -torch.inf).flatten(1)  # [B, L * P]
        logits, order = logits.topk(min(self._cfg.test.post_nms, logits.shape[1]), dim=1)  # [B, K]
        boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        valid = logits > -torch.inf
        return torch.where(valid[..., None], boxes, 0.0), logits, valid.sum(1)

    def _candidates(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The best P = pre_nms of each level: boxes [B, L, P, 4]; logits [B, L, P], -inf: none."""
        canvas, grid = (images.shape[2], images.shape[3]), self.network.grid
        outputs = self.network(normalize_images(images, sizes))
        logits, deltas = outputs.scores, outputs.deltas
        anchors = grid_anchors.__wrapped__(grid, canvas, images.device)  # its cache wants numbers
        # at all anchors, so that it fails in any runtime where the levels do not fit the canvas
        boxes = clip(decode(deltas, outputs.starting_from(anchors)), sizes[:, None])  # [B, R, 4]
        start, levels = 0, []
        for of_level in logits.split(grid.level_lengths(canvas), dim=1):
            # a level may have fewer anchors than pre_nms
            padded = F.pad(of_level, (0, self._cfg.test.pre_nms), value=-torch.inf)
            top, index = padded.topk(self._cfg.test.pre_nms, dim=1)
            levels.append((top, index + start))
            start += of_level.shape[1]
        top, index = (torch.stack(parts, dim=1) for parts in zip(*levels, strict=True))  # [B, L, P]
        index = index.flatten(1).clamp(max=logits.shape[1] - 1)  # beyond it, top is -inf
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)).view(*top.shape, 4)
        large = (boxes[..., 2:] - boxes[..., :2] >= self._cfg.min_size).all(-1)
        return boxes, torch.where(large, top, -torch.inf)


def nms_at_once(boxes: Tensor, logits: Tensor, iou: float) -> Tensor:
    """NMS of all rows in one call, each moved to where no other reaches (a `Suppress`).

    In float64: so far out, the steps of float32 are hundredths of a pixel.
    """
    rows = torch.arange(boxes.shape[0], dtype=torch.float64, device=boxes.device)
    moved = boxes + (rows * (boxes.amax() + 1))[:, None, None]  # [N, P, 4]
    # torchvision declares to torch.export that NMS keeps two or more: two empty boxes make it true
    kept = nms(
        F.pad(moved.flatten(0, 1), (0, 0, 0, 2)),
        F.pad(logits.double().flatten(), (0, 2), value=-torch.inf),
        iou,
    )
    keep = logits.new_zeros(logits.numel() + 2, dtype=torch.bool).index_fill(0, kept, True)
    return keep[:-2].view_as(logits)


@torch.library.custom_op("rpn_train::nms_by_row", mutates_args=())
def nms_by_row(boxes: Tensor, logits: Tensor, iou: float) -> Tensor:
    """NMS row by row (a `Suppress`): what stands for ONNX's operator until it is written."""
    keep = torch.zeros_like(logits, dtype=torch.bool)
    for row, (row_boxes, row_logits) in enumerate(zip(boxes, logits, strict=True)):
        keep[row, nms(row_boxes, row_logits, iou)] = True
    return keep


@nms_by_row.register_fake
def _(boxes: Tensor, logits: Tensor, iou: float) -> Tensor:
    return torch.empty_like(logits, dtype=torch.bool)


def _nms_in_onnx(boxes: Any, logits: Any, iou: float) -> Any:
    """`nms_by_row` in ONNX, whose operator takes a batch: here, of rows."""
    import onnxscript

    op: Any = onnxscript.opset18  # its annotations do not know that it takes numbers and lists
    scores = op.Unsqueeze(logits, [1])  # [N, 1 class, P]
    most = op.Shape(boxes, start=1, end=2)
    kept = op.NonMaxSuppression(boxes, scores, most, [iou])  # [kept, (row, class, box)]
    none = op.Expand(op.Constant(value_int=0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_int=1), op.Shape(kept, start=0, end=1))
    return op.Cast(op.Squeeze(op.ScatterND(none, kept, ones), [1]), to=9)  # 9: BOOL


def _to_pt2(network: RPN, cfg: ProposalsConfig, about: dict[str, str]) -> bytes:
    program, _ = _follow(ProposalNetwork(network, cfg, nms_at_once))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"rpn_train.json": json.dumps(about)})
    return file.getvalue()


def _to_onnx(network: RPN, cfg: ProposalsConfig, about: dict[str, str]) -> bytes:
    followed, shapes = _follow(ProposalNetwork(network, cfg, nms_by_row))
    program = torch.onnx.export(
        followed,
        dynamic_shapes=shapes,  # for their names
        input_names=["images", "sizes"],
        output_names=["boxes", "logits", "num_valid"],
        opset_version=18,  # what torch translates to without a conversion afterwards
        custom_translation_table={torch.ops.rpn_train.nms_by_row.default: _nms_in_onnx},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(about)
    return program.model_proto.SerializeToString()  # and not save(): one file, weights inside


def _follow(proposer: ProposalNetwork) -> tuple[ExportedProgram, dict[str, dict[int, Any]]]:
    """The operations of a network for any number and size of images, and which sizes are free."""
    stride = max(proposer.network.grid.strides)
    height, width = (stride * Dim(name, min=2) for name in ("rows", "columns"))
    shapes = {"images": {0: Dim("batch"), 2: height, 3: width}, "sizes": {0: Dim("batch")}}
    # no size of the example is 1, which would be taken for one that broadcasts
    program = torch.export.export(
        proposer.eval(), _blank(2, 2 * stride, 3 * stride), dynamic_shapes=shapes, strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    # Swin takes other ways at other sizes: a program notices that when it runs, ONNX does not.
    for rows, columns in ((5, 7), (7, 4)):
        program.module()(*_blank(1, rows * stride, columns * stride))
    return program, shapes


def _blank(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    return images, torch.tensor([[height, width]] * batch)


_FORMATS = {".onnx": _to_onnx, ".pt2": _to_pt2}
