"""Heads: what turns the feature maps into objectness and boxes, shared by all levels."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from rpn_train.boxes import centers_and_sizes, decode
from rpn_train.sparse import Lateral, stack_at

PRIOR = 0.01  # objectness of every anchor before training (Lin et al. 2017b, section 4.1)
# Box deltas of the first of two stages are learned as multiples of these (Vu et al. 2019, code).
FIRST_STDS = (0.1, 0.1, 0.5, 0.5)


class Outputs(NamedTuple):
    """What the head says of each anchor: [B, R] and [B, R, 4]; with `at` S in place of R.

    logits: objectness. centerness: a second logit, of how central the anchor is in its object;
    None: the head has none. anchors: [B, R, 4] xyxy px, where a first stage has moved them, to
    which deltas refer; None: nothing moves them.
    """

    logits: Tensor
    deltas: Tensor
    centerness: Tensor | None = None
    anchors: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """Logits [B, R] that rank the proposals: of objectness, or of both it and centerness.

        sqrt(objectness x centerness) as in ATSS (Zhang et al. 2020): a probability, too.
        """
        if self.centerness is None:
            return self.logits
        log_p = (F.logsigmoid(self.logits) + F.logsigmoid(self.centerness)) / 2
        return log_p - torch.log(-torch.expm1(log_p))

    def starting_from(self, anchors: Tensor) -> Tensor:
        """The boxes that deltas refer to, of the `anchors` [R, 4] of the grid, without gradient."""
        return anchors if self.anchors is None else self.anchors.detach()


def join_levels(levels: Sequence[Outputs]) -> Outputs:
    """Outputs of all levels one after the other, float32."""
    parts = zip(*levels, strict=True)
    joined = [None if of[0] is None else torch.cat(of, dim=1).float() for of in parts]
    return Outputs(*cast(list[Tensor], joined))


class RPNHead(nn.Module):
    """3x3 convolution(s), then two sibling 1x1 convolutions (Ren et al. 2015, section 3.1).

    delta_stds: what the second puts out is multiplied by these (dx, dy, dw, dh): it then learns
    numbers of about the same size.
    """

    delta_stds: Tensor

    def __init__(
        self,
        in_channels: int,
        per_cell: int,
        *,
        num_convs: int,
        channels: int | None,
        delta_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        self.register_buffer("delta_stds", torch.tensor(delta_stds), persistent=False)
        convs = [
            nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.ReLU(inplace=True))
            for c in [in_channels] + [channels] * (num_convs - 1)
        ]
        self.conv = nn.Sequential(*convs)
        self.cls_logits = nn.Conv2d(channels, per_cell, 1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 1)
        _initialize(self)

    def forward(self, feature: Tensor) -> Outputs:
        """[B, C, H, W] -> logits [B, H * W * A] and deltas [B, H * W * A, 4]."""
        return Outputs(*self._branches(self.conv(feature)))

    def at(
        self,
        feature: Tensor | Lateral,
        image: Tensor,
        rows: Tensor,
        columns: Tensor,
        before: Sequence[tuple[nn.Conv2d, bool]],
    ) -> tuple[Tensor, Tensor]:
        """The same at some cells: logits [N, A] and deltas [N, A, 4].

        Args:
            feature: [B, C, H, W], what goes into the convolutions `before` (see `stack_at`).
            image, rows, columns: int64 [N].
        """
        convs = (cast(nn.Sequential, block)[0] for block in self.conv)
        stack = [*before, *((cast(nn.Conv2d, conv), True) for conv in convs)]
        return self._branches(stack_at(feature, image, rows, columns, stack))

    def _branches(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _rows(self.cls_logits(hidden)), _deltas(self.bbox_pred(hidden), self.delta_stds)


class TowerHead(nn.Module):
    """A stack of 3x3 convolutions with group norm for each of two branches (RetinaNet, FCOS).

    The first ends in objectness, the second in boxes and, with `centerness`, in a third number: how
    central an anchor is in its object (Tian et al. 2019, section 3.3). For losses that read every
    anchor: objectness starts at `PRIOR`, so that the many background anchors do not drown the rest.
    """

    delta_stds: Tensor

    def __init__(
        self,
        in_channels: int,
        per_cell: int,
        *,
        num_convs: int,
        channels: int | None,
        delta_stds: Sequence[float],
        centerness: bool,
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        self.register_buffer("delta_stds", torch.tensor(delta_stds), persistent=False)
        self.cls_tower = _tower(in_channels, channels, num_convs)
        self.bbox_tower = _tower(in_channels, channels, num_convs)
        self.cls_logits = nn.Conv2d(channels, per_cell, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, per_cell, 3, padding=1) if centerness else None
        _initialize(self)
        nn.init.constant_(cast(Tensor, self.cls_logits.bias), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, feature: Tensor) -> Outputs:
        """[B, C, H, W] -> logits [B, H * W * A], deltas [B, H * W * A, 4] and maybe centerness."""
        boxes = self.bbox_tower(feature)
        logits = _rows(self.cls_logits(self.cls_tower(feature)))
        deltas = _deltas(self.bbox_pred(boxes), self.delta_stds)
        centerness = None if self.centerness is None else _rows(self.centerness(boxes))
        return Outputs(logits, deltas, centerness)


class CascadeHead(nn.Module):
    """Two stages: the first moves the anchors, the second looks where they are then.

    Cascade RPN (Vu et al. 2019). The first is a stack of 3x3 convolutions dilated by 3, which says
    nothing of objectness. The second is one adaptive convolution of its features (section 3.2),
    whose nine points spread evenly over the moved anchor. For one anchor per cell.
    """

    delta_stds: Tensor
    first_stds: Tensor

    def __init__(
        self,
        in_channels: int,
        per_cell: int,
        *,
        num_convs: int,
        channels: int | None,
        delta_stds: Sequence[float],
    ) -> None:
        super().__init__()
        assert per_cell == 1, "checked with the configuration"
        channels = channels or in_channels
        self.register_buffer("delta_stds", torch.tensor(delta_stds), persistent=False)
        self.register_buffer("first_stds", torch.tensor(FIRST_STDS), persistent=False)
        layers: list[nn.Module] = []
        for c in [in_channels] + [channels] * (num_convs - 1):
            layers += [nn.Conv2d(c, channels, 3, padding=3, dilation=3), nn.ReLU(inplace=True)]
        self.first_conv = nn.Sequential(*layers)
        self.first_bbox_pred = nn.Conv2d(channels, 4, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, 1, 1)
        self.bbox_pred = nn.Conv2d(channels, 4, 1)
        _initialize(self)

    def forward(self, feature: Tensor, anchors: Tensor, stride: int) -> Outputs:
        """[B, C, H, W] -> logits [B, H * W], deltas [B, H * W, 4] and moved anchors [B, H * W, 4].

        Args:
            anchors: [H * W, 4] xyxy px, of this level. stride: px between neighbours.
        """
        hidden = self.first_conv(feature)
        first = _deltas(self.first_bbox_pred(hidden), self.first_stds)
        moved = decode(first.float(), anchors)
        points = adaptive_points(moved.detach(), feature.shape[-2:], stride)
        hidden = convolve_at(hidden, points, self.conv).relu()
        deltas = _deltas(self.bbox_pred(hidden), self.delta_stds)
        return Outputs(_rows(self.cls_logits(hidden)), deltas, anchors=moved)


def adaptive_points(boxes: Tensor, cells: Sequence[int], stride: int) -> Tensor:
    """Where a 3x3 convolution looks instead of at its own 3 x 3 cells: x, y [B, 9, H, W, 2], cells.

    At the corners of the box of each cell, the middles of its sides and its centre, row by row (Vu
    et al. 2019, section 3.2).

    Args:
        boxes: [B, H * W, 4] xyxy px. cells: (H, W); the first is centred at (0, 0).
    """
    centers, sizes = centers_and_sizes(boxes.unflatten(1, tuple(cells)) / stride)
    (x, y), (width, height) = centers.unbind(-1), sizes.unbind(-1)
    halves = (-1 / 2, 0, 1 / 2)
    nine = [torch.stack([x + b * width, y + a * height], -1) for a in halves for b in halves]
    return torch.stack(nine, dim=1)


def convolve_at(feature: Tensor, points: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution that looks at the points [B, 9, H, W, 2], between cells bilinearly.

    [B, C, H, W] -> [B, C', H, W]. Beyond the map there are zeros.
    """
    feature = feature.float()  # half numbers are too coarse for where to look
    (height, width), bias = feature.shape[-2:], cast(Tensor, conv.bias)
    if feature.device.type != "cpu":
        return deform_conv2d(feature, offsets_of(points), conv.weight, bias, padding=1)
    x, y = points.unbind(-1)
    # three times as fast there, and exporters know it
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).flatten(1, 2)
    seen = F.grid_sample(feature, grid, align_corners=False)  # [B, C, 9 * H, W]
    seen = seen.unflatten(2, (9, height)).flatten(1, 2).flatten(2)  # [B, C * 9, H * W]
    return (conv.weight.flatten(1) @ seen).unflatten(2, (height, width)) + bias[:, None, None]


def offsets_of(points: Tensor) -> Tensor:
    """Points [B, 9, H, W, 2] as `deform_conv2d` has them: y, x from a cell's own, [B, 18, H, W]."""
    height, width = points.shape[2:4]
    own_y = torch.arange(height, device=points.device)[:, None]
    own_x = torch.arange(width, device=points.device)
    offsets = []
    for k, (x, y) in enumerate(point.unbind(-1) for point in points.unbind(1)):
        offsets += [y - (own_y + k // 3 - 1), x - (own_x + k % 3 - 1)]
    return torch.stack(offsets, dim=1)


def _tower(in_channels: int, channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    groups = math.gcd(32, channels)
    if groups == channels > 1:
        groups //= 2  # a group of one channel has no variance in a map of one cell
    for c in [in_channels] + [channels] * (num_convs - 1):
        layers += [nn.Conv2d(c, channels, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialize(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _rows(maps: Tensor) -> Tensor:
    """[B, A * K, H, W] -> [B, H * W * A * K], in the order of the anchors."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _deltas(maps: Tensor, stds: Tensor) -> Tensor:
    """[B, A * 4, H, W] -> [B, H * W * A, 4]."""
    return _rows(maps).unflatten(1, (-1, 4)) * stds
