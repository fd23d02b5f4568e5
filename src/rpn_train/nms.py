"""Non-maximum suppression of many lists at once, in few operations for a GPU.

torchvision's `nms` takes one list and waits for the device at its end: 80 times for 16 images of
five levels. Here whether a box is kept is written as a condition on the boxes before it,

    kept[i]  <=>  no kept[j], j < i, has an IoU with i above the threshold,

which one set fulfils, that of the greedy way down the list. Started with all boxes, each round of
the right side settles those for which what they depend on is settled; a round that changes nothing
proves that all are (Cluster-NMS, of Zheng et al., "Enhancing geometric factors ...", 2020). Of
1,000 candidates of trained networks it took 24 rounds at most; a list can be made that takes as
many as it is long.
"""

import torch
from torch import Tensor

from rpn_train.boxes import plain_iou

# Between two looks at whether all is settled, for each of which a GPU is waited for.
ROUNDS = 16
# Pairs of boxes that are looked at together; they take 16 bytes each.
BLOCK_PAIRS = 1 << 27


def suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """What greedy suppression keeps of N lists, bool [N, K]: what `torchvision.ops.nms` does.

    Args:
        boxes: float32 [N, K, 4] xyxy px, the best of each list first.
        valid: bool [N, K], false for rows that are not kept and suppress nothing.
        iou: boxes with a higher IoU than this with one that is kept are not.
    """
    lists = max(1, BLOCK_PAIRS // max(1, boxes.shape[1] ** 2))
    blocks = zip(boxes.split(lists), valid.split(lists), strict=True)
    return torch.cat([_suppress(*block, _float32_below(iou)) for block in blocks])


def _suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    # [N, K, K]: whether box j, of lower index, would suppress box i
    overlaps = (plain_iou(boxes[:, :, None], boxes[:, None]) > iou).tril_(-1)
    kept = valid
    while True:
        for _ in range(ROUNDS):
            before, kept = kept, valid & ~(overlaps & kept[:, None]).any(-1)
        if torch.equal(kept, before):  # waits for the device
            return kept


def _float32_below(number: float) -> float:
    """The largest float32 that is not above: float32 numbers exceed both, or neither."""
    nearest = torch.tensor(number, dtype=torch.float32)
    below = nearest.nextafter(torch.tensor(-torch.inf))
    return nearest.item() if nearest.item() <= number else below.item()
