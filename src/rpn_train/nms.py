"""Non-maximum suppression of many lists at once, in few operations for a GPU.

torchvision's `nms` takes one list and waits for the device at its end: 80 times for 16 images of
five levels. Here whether a box is kept is written as a condition on the boxes before it,

    kept[i]  <=>  no kept[j], j < i, has an IoU with i above the threshold,

which one set fulfils, that of the greedy way down the list. Started with all boxes, each round of
the right side settles those for which what they depend on is settled; a round that changes nothing
proves that all are. (Cluster-NMS, Zheng et al. 2020, section 4.2.) Of 1,000 candidates of trained
networks it took 24 rounds at most; a list can be made that takes as many as it is long.
"""

import torch
from torch import Tensor

from rpn_train.boxes import plain_iou

# Between two looks at whether all is settled, for each of which a GPU is waited for.
ROUNDS = 16
# Pairs whose IoU is computed at once, some 30 bytes each.
BLOCK_PAIRS = 1 << 25


def suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """What greedy suppression keeps of N lists, bool [N, K]: what `torchvision.ops.nms` does.

    Args:
        boxes: float32 [N, K, 4] xyxy px, the best of each list first.
        valid: bool [N, K], false for rows that are not kept and suppress nothing.
        iou: boxes with a higher IoU than this with one that is kept are not.
    """
    length = boxes.shape[1]
    lists_at_once = max(1, BLOCK_PAIRS // max(1, length**2))
    # [N, K, K]: whether box j, of lower index, would suppress box i
    overlaps = torch.cat(
        [
            (plain_iou(of_block[:, :, None], of_block[:, None]) > iou).tril_(-1)
            for of_block in boxes.split(lists_at_once)
        ]
    )
    kept = valid
    while True:
        for _ in range(ROUNDS):
            before, kept = kept, valid & ~(overlaps & kept[:, None]).any(-1)
        if torch.equal(kept, before):  # waits for the device
            return kept
