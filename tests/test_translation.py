"""Translation invariance (Ren et al. 2015, section 3.1.1): move the image, move the proposals."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.backbones import build_backbone
from rpn_train.heads import RPNHead
from rpn_train.model import RPN
from rpn_train.proposals import make_proposals

STRIDE = 16
# Without biases black stays zero, and a logit is zero unless one of the 243 px it sees (layer3 of a
# resnet18 and the 3x3 of the head) is not. So the content, of 24 px, is felt in cells that lie at
# most 122 px from it, and none of these, shifted or not, is at the border.
CANVAS = (336, 368)
ROW, COLUMN, CONTENT = 152, 168, 24


@pytest.fixture(scope="module")
def outputs_of():
    """Function of a shift: logits [rows, columns, A], and boxes of the best proposals."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet18_c4", weights=None, frozen_stages=0, norm="bn")
    grid = AnchorGrid(((16.0, 32.0),), (0.5, 1.0, 2.0), backbone.strides, rounded=True)
    model = RPN(backbone, grid, partial(RPNHead, num_convs=1, channels=None)).eval()
    content = torch.randn(3, CONTENT, CONTENT)

    @torch.no_grad()
    def outputs_of(down, right):
        image = torch.zeros(1, 3, *CANVAS)
        row, column = ROW + down, COLUMN + right
        image[0, :, row : row + CONTENT, column : column + CONTENT] = content
        logits, deltas, *_ = model(image)
        found = make_proposals(
            logits,
            deltas,
            grid_anchors(grid, CANVAS, torch.device("cpu")),
            grid.level_lengths(CANVAS),
            torch.tensor([CANVAS]),
            pre_nms=1000,
            post_nms=100,
            nms_iou=0.7,
            min_size=0,
        )[0]
        cells = logits.view(CANVAS[0] // STRIDE, CANVAS[1] // STRIDE, grid.per_cell)
        edges = [cells[0], cells[-1], cells[:, 0], cells[:, -1]]
        assert all((edge == 0).all() for edge in edges)
        assert (found.logits > 0).all()
        return cells, found.boxes

    return outputs_of


def test_a_shift_by_strides_shifts_everything(outputs_of):
    cells, boxes = outputs_of(0, 0)
    assert cells.abs().max() > 0.01
    assert len(boxes) == 100
    assert boxes.min() > 16  # none meets the border, shifted or not
    for down, right in ((16, 0), (-16, 32)):
        moved_cells, moved_boxes = outputs_of(down, right)
        expected = cells.roll((down // STRIDE, right // STRIDE), (0, 1))
        assert_close(moved_cells, expected, rtol=1e-4, atol=1e-6)
        shift = torch.tensor([right, down, right, down], dtype=torch.float32)
        assert_close(moved_boxes, boxes + shift, rtol=0, atol=1e-3)


def test_a_shift_by_less_does_not(outputs_of):
    """Guards the test above: the logits do depend on where in its cell the content lies."""
    cells, moved_cells = outputs_of(0, 0)[0], outputs_of(8, 0)[0]
    assert (moved_cells - cells).abs().max() > 0.3 * cells.abs().max()
