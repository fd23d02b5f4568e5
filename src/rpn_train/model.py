"""The network: backbone and RPN head, one `forward` for training and evaluation.

State-dict keys are those of `torchvision.models.detection.FasterRCNN` (`backbone.body.*`,
`backbone.fpn.*`, `rpn.head.*`), so that weights travel in both directions.
"""

from collections.abc import Callable
from itertools import accumulate, takewhile
from typing import cast

import torch
from torch import Tensor, nn

from rpn_train.anchors import AnchorGrid, level_anchors
from rpn_train.backbones import Backbone
from rpn_train.heads import CascadeHead, Outputs, RPNHead, join_levels
from rpn_train.sparse import Lateral

# Mean and deviation of ImageNet in RGB 0..1, which all torchvision weights expect.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class RPN(nn.Module):
    """Backbone, anchors and head.

    Attributes:
        grid: the anchors of the levels that `backbone` puts out.
    """

    def __init__(
        self,
        backbone: Backbone,
        grid: AnchorGrid,
        make_head: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.grid = grid
        self.rpn = nn.ModuleDict({"head": make_head(backbone.out_channels, grid.per_cell)})

    def forward(self, images: Tensor, at: Tensor | None = None) -> Outputs:
        """Outputs at every anchor, or at the sampled ones: the same values, and gradients.

        Args:
            images: normalised float [B, 3, H, W]; H and W multiples of the largest stride.
            at: int64 [B, S] indices into the R anchors; None: all of them, in order.
        """
        if at is not None:
            return self._forward_at(images, at)
        features = enumerate(self.backbone(images))
        return join_levels([self._forward_level(level, feature) for level, feature in features])

    def _forward_level(self, level: int, feature: Tensor) -> Outputs:
        head = self.rpn["head"]
        if not isinstance(head, CascadeHead):
            return cast(Outputs, head(feature))
        height, width = feature.shape[-2:]
        anchors = level_anchors(self.grid, level, height, width, feature.device)
        return cast(Outputs, head(feature, anchors, self.grid.strides[level]))

    def _forward_at(self, images: Tensor, at: Tensor) -> Outputs:
        """Outputs at sampled anchors, the fine levels computed at their cells alone."""
        head, per_cell = cast(RPNHead, self.rpn["head"]), self.grid.per_cell
        merged = self.backbone.merge(images)
        height, width = images.shape[-2:]
        ends = [*accumulate(self.grid.level_lengths((height, width)))]
        starts = [0, *ends[:-1]]
        anchor = at.flatten()  # [N], N = B * S
        image = torch.arange(len(at), device=at.device).repeat_interleave(at.shape[1])
        slots = [_slots_of(anchor, *bounds) for bounds in zip(starts, ends, strict=True)]
        num_sparse = self._num_sparse(merged, [len(of_level) for of_level in slots])
        parts = []  # logits [n] and deltas [n, 4] at the slots of each sparse level, then the rest
        for level in range(num_sparse):
            here = slots[level]
            place = (anchor[here] - starts[level]).clamp(0, ends[level] - starts[level] - 1)
            cell, of_cell = place // per_cell, (place % per_cell)[:, None]
            columns = merged[level].shape[-1]
            before = self.backbone.last_convolutions(level) or []
            logits, deltas = head.at(
                merged[level], image[here], cell // columns, cell % columns, before
            )  # [n, A], [n, A, 4]
            deltas = torch.take_along_dim(deltas, of_cell[..., None], 1)[:, 0]
            parts.append((logits.gather(1, of_cell)[:, 0], deltas))
        dense = [head(feature) for feature in self.backbone.finish(merged, num_sparse)]
        if dense:
            start, here = starts[num_sparse], _slots_of(anchor, starts[num_sparse], ends[-1])
            of_image = image[here] * (ends[-1] - start)
            place = of_image + (anchor[here] - start).clamp(min=0)
            logits = torch.cat([of_level.logits for of_level in dense], dim=1).flatten()
            deltas = torch.cat([of_level.deltas for of_level in dense], dim=1).flatten(0, 1)
            parts.append((logits.index_select(0, place), deltas.index_select(0, place)))
            slots[num_sparse:] = [here]
        logits, deltas = _joined(parts, slots, starts, anchor)
        return Outputs(logits.float().view(at.shape), deltas.float().view(*at.shape, 4))

    def _num_sparse(self, merged: list[Tensor | Lateral], slots: list[int]) -> int:
        """How many fine levels take fewer multiplications at their slots than everywhere."""
        before = self.backbone.last_convolutions(0)
        if before is None:
            return 0
        convs = len(cast(RPNHead, self.rpn["head"]).conv) + len(before)
        per_slot = sum((2 * i + 1) ** 2 for i in range(convs))
        # the last level of a pyramid is subsampled to one more, which needs all of it
        allowed = merged if self.backbone.fpn is None else merged[:-1]
        cells = [m.shape[0] * m.shape[2] * m.shape[3] for m in allowed]
        fewer = (convs * c > n * per_slot for c, n in zip(cells, slots, strict=False))
        return sum(takewhile(bool, fewer))


def _counts_slots(device: torch.device) -> bool:
    """Whether shapes may depend on the data.

    A GPU would be waited for to learn them, and a compiled network be compiled again for each.
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _slots_of(anchor: Tensor, start: int, end: int) -> Tensor:
    """Which slots [n] of `anchor` [N] are of a level, whose anchors are those from start to end.

    With `_counts_slots` those alone; without it is all of them, each computed at some cell of the
    level, and `_joined` picks.
    """
    if _counts_slots(anchor.device):
        return ((anchor >= start) & (anchor < end)).nonzero()[:, 0]
    return torch.arange(len(anchor), device=anchor.device)


def _joined(
    parts: list[tuple[Tensor, Tensor]], slots: list[Tensor], starts: list[int], anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [N] and deltas [N, 4] in the order of the slots, from those of each level."""
    if _counts_slots(anchor.device):
        order = torch.cat(slots).argsort()
        logits, deltas = (torch.cat(columns)[order] for columns in zip(*parts, strict=True))
        return logits, deltas
    logits, deltas = parts[0]
    for start, (of_level, deltas_of_level) in zip(starts[1:], parts[1:], strict=False):
        here = anchor >= start  # or further on, which the next part settles
        logits = torch.where(here, of_level, logits)
        deltas = torch.where(here[:, None], deltas_of_level, deltas)
    return logits, deltas


def normalize_images(images: Tensor, sizes: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] 0..255 RGB -> float32, normalised, with exact zeros in the padding.

    Args:
        sizes: int64 [B, 2] height and width of each image without padding, px.
    """
    # not made on the device: that would wait for everything the GPU still has to do
    statistics = torch.tensor([IMAGE_MEAN, IMAGE_STD]).to(images.device, non_blocking=True)
    mean, std = statistics.view(2, 3, 1, 1)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]  # [B, H]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]  # [B, W]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # [B, 1, H, W]
    return torch.where(inside, (images.float() / 255 - mean) / std, 0.0)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which the network computes."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
