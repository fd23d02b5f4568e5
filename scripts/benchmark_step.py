"""Time of a training step, whole and in parts, beside torchvision's RPN.

    python scripts/benchmark_step.py --backbone resnet50_fpn --size 512 512 --boxes 8 --repeats 9

A step is what happens to a batch that is loaded: input (normalised images), targets (assignment and
sampling), network (forward), proposals (torchvision's alone makes some), losses and backward pass,
update by SGD. Before, it is checked that both networks give the same outputs, and at the same
anchors the same losses. See `benchmarking.py` for what is compared.
"""

import torch
from benchmarking import (
    SIDES,
    Bench,
    Timed,
    TorchvisionRPN,
    build,
    check_outputs,
    compare,
    in_turns,
    our_step,
    parser,
    their_canvas,
    write,
)
from torch import Tensor
from torch.testing import assert_close

from rpn_train.data.batch import Batch
from rpn_train.distributed import start
from rpn_train.model import autocast
from rpn_train.schedule import build_optimizer
from rpn_train.step import batch_losses
from rpn_train.targets import Picks
