"""Anchors against values computed by hand; that they are torchvision's is in test_parity.py."""

import torch
from torch.testing import assert_close

from rpn_train.anchors import AnchorGrid, cell_anchors, grid_anchors

CPU = torch.device("cpu")


def test_rounded_cell_anchors_by_hand():
    """32 px at ratio .5: 45.25 x 22.63, halved 22.63 and 11.31, to whole pixels 23 and 11."""
    cells = cell_anchors((32.0,), (0.5, 1.0, 2.0), rounded=True)
    assert cells.dtype == torch.float32
    assert cells.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_cell_anchors_keep_area_and_ratio():
    sizes, ratios = (13.0, 50.0), (0.5, 1.0, 3.0)
    cells = cell_anchors(sizes, ratios, rounded=False)
    width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
    assert_close(cells[:, :2], -cells[:, 2:])
    assert_close(width * height, torch.tensor([13.0**2, 50.0**2] * 3))  # ratio-major
    assert_close(height / width, torch.tensor([0.5, 0.5, 1, 1, 3, 3]))


def test_grid_by_hand():
    """Order: level, row, column, anchor of the cell; the first centre is (0, 0)."""
    grid = AnchorGrid(sizes=((2.0,), (8.0,)), ratios=(1.0, 4.0), strides=(8, 16), rounded=False)
    fine = [[-1.0, -1, 1, 1], [-0.5, -2, 0.5, 2]]
    coarse = [[-4.0, -4, 4, 4], [-2, -8, 2, 8]]
    centers = [(fine, x, y) for y in (0, 8) for x in (0, 8, 16, 24)]
    centers += [(coarse, x, y) for y in (0,) for x in (0, 16)]
    expected = [[c[0] + x, c[1] + y, c[2] + x, c[3] + y] for cells, x, y in centers for c in cells]
    anchors = grid_anchors(grid, (16, 32), CPU)
    assert anchors.dtype == torch.float32
    assert anchors.tolist() == expected
    assert grid.per_cell == 2
    assert grid.level_lengths((16, 32)) == [16, 4]


def test_grids_are_made_once_for_each_canvas():
    grid = AnchorGrid(((8.0,),), (1.0,), (8,), rounded=True)
    same = AnchorGrid(((8.0,),), (1.0,), (8,), rounded=True)
    assert grid_anchors(grid, (32, 48), CPU) is grid_anchors(same, (32, 48), CPU)
    assert not torch.equal(grid_anchors(grid, (32, 48), CPU), grid_anchors(grid, (48, 32), CPU))


def test_lengths_of_a_pyramid():
    """832 x 1344: 208 x 336 cells at stride 4, a quarter at each next, 13 x 21 at the last."""
    sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    grid = AnchorGrid(sizes, (0.5, 1.0, 2.0), (4, 8, 16, 32, 64), rounded=True)
    lengths = grid.level_lengths((832, 1344))
    assert lengths == [209664, 52416, 13104, 3276, 819]
    assert len(grid_anchors(grid, (832, 1344), CPU)) == sum(lengths)
