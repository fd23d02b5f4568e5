"""The network: backbone and RPN head, one `forward` for training and evaluation.

State-dict keys are those of `torchvision.models.detection.FasterRCNN` (`backbone.body.*`,
`backbone.fpn.*`, `rpn.head.*`), so that weights travel in both directions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import Backbone
from rpn_train.sparse import stack_at

# Mean and deviation of ImageNet in RGB 0..1, which all torchvision weights expect.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Outputs(NamedTuple):
    """logits [B, R] objectness and deltas [B, R, 4], float32; [B, S] and [B, S, 4] with `at`."""

    logits: Tensor
    deltas: Tensor


class RPNHead(nn.Module):
    """3x3 convolution(s), then two sibling 1x1 convolutions (Ren et al. 2015, section 3.1)."""

    def __init__(
        self, in_channels: int, per_cell: int, *, num_convs: int, channels: int | None
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        convs = [
            nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.ReLU(inplace=True))
            for c in [in_channels] + [channels] * (num_convs - 1)
        ]
        self.conv = nn.Sequential(*convs)
        self.cls_logits = nn.Conv2d(channels, per_cell, 1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> logits [B, H * W * A] and deltas [B, H * W * A, 4]."""
        return self._branches(self.conv(feature))

    def at(
        self,
        feature: Tensor,
        rows: Tensor,
        columns: Tensor,
        before: Sequence[tuple[nn.Conv2d, bool]],
    ) -> tuple[Tensor, Tensor]:
        """The same at some cells: logits [B, S, A] and deltas [B, S, A, 4].

        Args:
            feature: [B, C, H, W], what goes into the convolutions `before` (see `stack_at`).
            rows, columns: int64 [B, S].
        """
        convs = (cast(nn.Sequential, block)[0] for block in self.conv)
        stack = [*before, *((cast(nn.Conv2d, conv), True) for conv in convs)]
        hidden = stack_at(feature, rows, columns, stack)  # [B * S, C, 1, 1]
        logits, deltas = self._branches(hidden)
        return logits.unflatten(0, rows.shape), deltas.unflatten(0, rows.shape)

    def _branches(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.bbox_pred(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        return logits, deltas


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
        levels = [self.rpn["head"](feature) for feature in self.backbone(images)]
        logits = torch.cat([logits for logits, _ in levels], dim=1).float()  # [B, R]
        deltas = torch.cat([deltas for _, deltas in levels], dim=1).float()  # [B, R, 4]
        return Outputs(logits, deltas)

    def _forward_at(self, images: Tensor, at: Tensor) -> Outputs:
        """Outputs at sampled anchors, the fine levels computed at their cells alone.

        On a fine level every slot is computed at some cell, also where its anchor is of another
        level: so no shape depends on the data, and nothing waits for the GPU.
        """
        head, per_cell = cast(RPNHead, self.rpn["head"]), self.grid.per_cell
        merged = self.backbone.merge(images)
        num_sparse = self._num_sparse(merged, at.shape[1])
        parts = []  # first anchor, logits [B, S] and deltas [B, S, 4] of each level
        start = 0
        for level, feature in enumerate(merged[:num_sparse]):
            height, width = feature.shape[-2:]
            length = height * width * per_cell
            place = (at - start).clamp(0, length - 1)
            cell, anchor = place // per_cell, place % per_cell
            before = self.backbone.last_convolutions(level) or []
            logits, deltas = head.at(feature, cell // width, cell % width, before)  # [B, S, A ...]
            logits = torch.take_along_dim(logits, anchor[..., None], 2)[:, :, 0]
            deltas = torch.take_along_dim(deltas, anchor[..., None, None], 2)[:, :, 0]
            parts.append((start, logits, deltas))
            start += length
        dense = [head(feature) for feature in self.backbone.finish(merged, num_sparse)]
        if dense:
            place = (at - start).clamp(min=0)
            logits = torch.cat([logits for logits, _ in dense], dim=1).gather(1, place)
            deltas = torch.cat([deltas for _, deltas in dense], dim=1)  # [B, anchors from start, 4]
            parts.append((start, logits, torch.take_along_dim(deltas, place[..., None], 1)))
        _, logits, deltas = parts[0]
        for start, of_level, deltas_of_level in parts[1:]:
            here = at >= start  # or further on, which the next part settles
            logits = torch.where(here, of_level, logits)
            deltas = torch.where(here[..., None], deltas_of_level, deltas)
        return Outputs(logits.float(), deltas.float())

    def _num_sparse(self, merged: list[Tensor], slots: int) -> int:
        """How many fine levels take fewer multiplications at `slots` cells than everywhere."""
        before = self.backbone.last_convolutions(0)
        if before is None:
            return 0
        convs = len(cast(RPNHead, self.rpn["head"]).conv) + len(before)
        at_slots = slots * sum((2 * i + 1) ** 2 for i in range(convs))
        # the last level of a pyramid is subsampled to one more, which needs all of it
        allowed = merged if self.backbone.fpn is None else merged[:-1]
        return sum(convs * m.shape[-2] * m.shape[-1] > at_slots for m in allowed)


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
