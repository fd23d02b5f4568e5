"""Anchors: reference boxes of several sizes and ratios at every cell of every feature level.

The first anchor centre of a level is at (0, 0), as in torchvision, Detectron2 and MMDetection.
Strides are given, not inferred from feature sizes (torchvision infers 61 for a stride of 64 at
800 px; `test_parity.py` pins the difference), and images are padded to multiples of the largest.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorGrid:
    """Which anchors there are. Hashable, so that grids can be cached.

    sizes: per level, square roots of anchor areas, px. ratios: height / width, the same for all
    levels. strides: per level, px. rounded: cell anchors in whole pixels (torchvision's way).
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    strides: tuple[int, ...]
    rounded: bool

    @property
    def per_cell(self) -> int:
        """Anchors at each position (A); the same for every level, since the head is shared."""
        return len(self.sizes[0]) * len(self.ratios)

    def level_lengths(self, canvas: tuple[int, int]) -> list[int]:
        """Number of anchors of each level for a padded image of (height, width) px."""
        height, width = canvas
        return [(height // s) * (width // s) * self.per_cell for s in self.strides]


def cell_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...], rounded: bool) -> Tensor:
    """Anchors around (0, 0): [len(ratios) * len(sizes), 4], ratio-major as in torchvision."""
    size = torch.tensor(sizes, dtype=torch.float32)
    h_ratio = torch.tensor(ratios, dtype=torch.float32).sqrt()
    heights = (h_ratio[:, None] * size[None, :]).flatten()
    # 1 / sqrt first, as torchvision: another order changes the last bit, which may decide round()
    widths = ((1 / h_ratio)[:, None] * size[None, :]).flatten()
    cells = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return cells.round() if rounded else cells


def level_anchors(
    grid: AnchorGrid, level: int, rows: int, columns: int, device: torch.device
) -> Tensor:
    """Anchors of one level of rows x columns cells: [rows * columns * A, 4] xyxy px."""
    stride = grid.strides[level]
    cells = cell_anchors(grid.sizes[level], grid.ratios, grid.rounded)  # [A, 4]
    cells = cells.to(device, non_blocking=True)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device) * stride,
        torch.arange(columns, dtype=torch.float32, device=device) * stride,
        indexing="ij",
    )
    shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)  # [rows * columns, 1, 4]
    return (shifts + cells).view(-1, 4)


@lru_cache(maxsize=64)
def grid_anchors(grid: AnchorGrid, canvas: tuple[int, int], device: torch.device) -> Tensor:
    """All anchors of a padded image: [R, 4] float32 xyxy px, cached per padded size.

    Order: level, then row, column, ratio, size: the order of the flattened head outputs. Made once
    and shared: never written to.
    """
    levels = [
        level_anchors(grid, level, canvas[0] // stride, canvas[1] // stride, device)
        for level, stride in enumerate(grid.strides)
    ]
    return torch.cat(levels)
