"""Where the arithmetic of a training step goes, ours beside the same head evaluated everywhere.

    python scripts/benchmark_model.py --backbone resnet50_fpn --size 512 512 --size 800 1344

Floating-point operations of the convolutions, forward and backward, are counted and not timed. The
body is what any detector needs. Pyramid and head are evaluated at the cells of the sampled anchors
where a level has many more: on a GPU every fine level at as many cells as there are samples, on a
CPU each sample at its own level.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from benchmarking import RESNETS, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rpn_train.build import build_model
from rpn_train.config import BackboneConfig, TrainConfig
from rpn_train.data.sampler import canvas_of
from rpn_train.distributed import start
from rpn_train.model import RPN


def counting() -> FlopCounterMode:
    """A counter of multiplications and additions that knows deformable convolutions, too."""

    def forward(images: Sequence[int], weight: Sequence[int], *rest: Any, **others: Any) -> int:
        return 2 * images[0] * math.prod(images[2:]) * math.prod(weight)  # of stride 1, padded

    def backward(of_output: Any, *inputs: Any, **others: Any) -> int:
        return 2 * forward(*inputs)  # by the features and by the weights

    ops = torch.ops.torchvision
    known = {ops.deform_conv2d: forward, ops._deform_conv2d_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=known)


def count_gflop(forward: Callable[[], Iterable[Tensor | None]]) -> float:
    """10^9 operations (a multiplication and an addition are two), backward pass included."""
    with counting() as counter:
        torch.stack([output.sum() for output in forward() if output is not None]).sum().backward()
    return counter.get_total_flops() / 1e9


def count_step(model: RPN, size: tuple[int, int], batch: int, slots: int) -> dict[str, Any]:
    """Operations of a step and of the body in it: as on a GPU, as on a CPU, and everywhere.

    On a CPU they depend on where the samples are. Nearly all are background, which is drawn evenly.
    """
    canvas = canvas_of([size], max(model.grid.strides))
    images = torch.empty(batch, 3, *canvas, device="meta")
    at = torch.empty(batch, slots, dtype=torch.int64, device="meta")
    body = count_gflop(lambda: model.backbone.body(images).values())
    drawn = torch.randint(sum(model.grid.level_lengths(canvas)), (batch, slots))
    on_cpu = copy.deepcopy(model).to_empty(device="cpu")
    counts = {
        "GPU": count_gflop(partial(model, images, at)),
        "CPU": count_gflop(partial(on_cpu, torch.zeros(images.shape), drawn)),
        "everywhere": count_gflop(partial(model, images)),
    }
    paths = {
        name: {
            "body": body,
            "pyramid and head": whole - body,
            "whole": whole,
            "share outside the body": 1 - body / whole,
        }
        for name, whole in counts.items()
    }
    return {"size": size, "canvas": canvas, **paths}


def count_parameters(module: nn.Module) -> dict[str, int]:
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {"all": sum(n for n, _ in counts), "trained": sum(n for n, trains in counts if trains)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Arithmetic of a training step.")
    parser.add_argument("--backbone", choices=RESNETS, default="resnet50_fpn")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_args(argv)
    cfg = TrainConfig(backbone=BackboneConfig(args.backbone, frozen_stages=2, norm="frozen_bn"))
    model = build_model(cfg).to("meta")
    parts = {"body": model.backbone.body, "pyramid": model.backbone.fpn, "head": model.rpn}
    parameters = {name: count_parameters(cast(nn.Module, part)) for name, part in parts.items()}
    print(f"{args.backbone}, batches of {args.batch}, frozen stem and first stage")
    for name, counts in parameters.items():
        print(
            f"{name:9}{counts['all'] / 1e6:7.2f} M weights, {counts['trained'] / 1e6:.2f} M trained"
        )
    steps = []
    for height, width in args.size or [[512, 512], [800, 1344]]:
        steps.append(count_step(model, (height, width), args.batch, cfg.method.num_samples))
        paths = [steps[-1][name] for name in ("GPU", "CPU", "everywhere")]
        print(f"\n{height} x {width:<15}{'ours, GPU':>12}{'ours, CPU':>12}{'everywhere':>12}")
        *parts_of_step, share = paths[0]
        for part in parts_of_step:
            cells = "".join(f"{path[part]:12.1f}" for path in paths)
            print(f"{part + ', GFLOP':21}{cells}")
        print(f"{share:21}" + "".join(f"{path[share]:12.1%}" for path in paths))
    with start("cpu") as ranks:
        write(args, ranks, {"parameters": parameters, "steps": steps})


if __name__ == "__main__":
    main()
