"""What the outputs of a network see of the image: receptive fields, in theory and in effect.

In theory: the network itself runs on coordinates in the place of colours. Every number in it is
then the farthest column that it depends on: a convolution finds the farthest in its kernel, a sum
the farther of its terms, and what only moves numbers moves these too. It reads no weight, and is
exact for any network of known operators: where gradients are not zero (`test_receptive_field.py`).

Not counted is what scales a map as a whole, a gate (squeeze and excitation) or the statistics of a
group norm: through it a cell depends on all pixels, but on none in particular.

In effect: gradients say how much of that field counts (Luo et al. 2016, "Understanding the
effective receptive field in deep convolutional neural networks").
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from rpn_train.anchors import AnchorGrid, cell_anchors
from rpn_train.errors import ConfigError
from rpn_train.heads import CascadeHead
from rpn_train.model import RPN

# Images [B, 3, H, W], H and W multiples of the largest stride -> a map [B, C, H/s, W/s] per stride.
Network = Callable[[Tensor], Sequence[Tensor]]

aten = torch.ops.aten
NOTHING = -math.inf  # how far a number sees that does not depend on the image
# Of images to try, px, until no field in their middle half meets a border. They are narrow.
LENGTHS = (2048, 4096, 8192)


@dataclass(frozen=True)
class ReceptiveField:
    """Which pixels the cells of a level depend on, away from the borders of the image.

    Neighbours differ where a pyramid repeats the cells of a coarser level, or attention has
    windows: so the size is that of the largest field, and the centre is the mean.

    stride: px. size: (height, width) px; inf where a cell sees the whole image. centre: (y, x) px,
    of the field, from the centre of the cell's anchors; nan where the size is inf. The first pixel
    reaches from 0 to 1, so a network that is centred on pixels has 0.5.
    """

    stride: int
    size: tuple[float, float]
    centre: tuple[float, float]


@dataclass(frozen=True)
class EffectiveField:
    """How much each pixel counts for the cell in the middle of a level.

    heat: float32 [H, W], on the CPU: absolute gradient of the sum of the cell's logits, the mean
    over images and colours. centre: (row, column) of the pixel at the centre of the cell's anchors.
    """

    heat: Tensor
    centre: tuple[int, int]

    def side(self, share: float = 0.95) -> int:
        """Side of the smallest square around `centre` with this share of the heat; 0: none has any.

        It may reach beyond the image.
        """
        y, x = (
            (torch.arange(length) - middle).abs()
            for length, middle in zip(self.heat.shape, self.centre, strict=True)
        )
        radius = torch.maximum(y[:, None], x)  # [H, W]
        held = radius.flatten().bincount(self.heat.flatten().double()).cumsum(0)
        return 2 * int((held < share * held[-1]).sum()) + 1 if held[-1] > 0 else 0


def receptive_fields(model: RPN) -> list[ReceptiveField]:
    """The field of the head's outputs at each level, its 3x3 convolutions included.

    The paper counts it so: 228 px for VGG16 (Ren et al. 2015, section 3.1).

    Raises:
        ConfigError: the network has an operator that is not known here.
    """
    with _evaluating(model):
        return fields_of(lambda images: _logits(model, images), model.grid.strides)


def fields_of(network: Network, strides: Sequence[int]) -> list[ReceptiveField]:
    """The same of the maps of any network, which is in evaluation mode."""
    rows, columns = (_along(network, strides, axis) for axis in (0, 1))
    return [
        ReceptiveField(stride, (height, width), (y, x))
        for stride, (height, y), (width, x) in zip(strides, rows, columns, strict=True)
    ]


def dependence(network: Network, canvas: tuple[int, int], *, axis: int) -> list[Tensor]:
    """First and last row (axis 0) or column (1) of an image that the cells of each map depend on.

    Args:
        canvas: (height, width) of the image, px.

    Returns:
        float32 [H/s or W/s, 2] per map, inclusive; (inf, -inf) for a cell that depends on nothing.

    Raises:
        ConfigError: the network has an operator that is not known here.
    """
    position = torch.arange(canvas[axis], dtype=torch.float32)
    position = (position[:, None] if axis == 0 else position).expand(canvas)
    images = torch.stack([-position, position])  # the farthest of the negative ones is the first
    with torch.no_grad():
        maps = network(_Farthest(images[:, None].repeat(1, 3, 1, 1)))
    ends = [_seen(m).amax((1, 3 - axis)) for m in maps]  # [2, H/s or W/s]
    return [torch.stack([-first, last], 1) for first, last in ends]


def effective_fields(model: RPN, images: Tensor) -> list[EffectiveField]:
    """How much each pixel counts for the logits of the cell in the middle of each level.

    Gates and statistics count here; what lies beyond the images does not.

    Args:
        images: float32 [B, 3, H, W], normalised, on the device of the model; H and W multiples of
            the largest stride. The more, the smoother the heat.
    """
    images, found = images.detach().requires_grad_(), []
    with torch.enable_grad(), _evaluating(model):
        for logits, stride in zip(_logits(model, images), model.grid.strides, strict=True):
            row, column = logits.shape[-2] // 2, logits.shape[-1] // 2
            of_cell = logits[:, :, row, column].sum()
            (gradient,) = torch.autograd.grad(of_cell, images, retain_graph=True)
            heat = gradient.abs().mean((0, 1)).cpu()  # [H, W]
            found.append(EffectiveField(heat, (row * stride, column * stride)))
    return found


def larger_anchors(
    grid: AnchorGrid, sizes: Sequence[tuple[float, float]]
) -> list[list[tuple[float, float]]]:
    """The anchors of each level that are higher or wider than what its cells see.

    Not impossible: the middle of an object may tell roughly how far it extends (Ren et al. 2015,
    section 3.3, whose anchors of up to 724 px see 228). But its borders are out of sight.

    Args:
        sizes: (height, width) per level, px; of `ReceptiveField`, or sides of `EffectiveField`.

    Returns:
        (height, width) px of such anchors, for each level, in the order of the anchors.
    """
    found = []
    for of_level, (height, width) in zip(grid.sizes, sizes, strict=True):
        cells = cell_anchors(of_level, grid.ratios, grid.rounded)
        shapes = (cells[:, 2:] - cells[:, :2]).flip(1).tolist()
        found.append([(h, w) for h, w in shapes if h > height or w > width])
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _logits(model: RPN, images: Tensor) -> list[Tensor]:
    """[B, A, H/s, W/s] per level; of two stages the first: the second looks anywhere."""
    head, maps = model.rpn["head"], model.backbone(images)
    if isinstance(head, CascadeHead):
        return [head.first_bbox_pred(head.first_conv(m)) for m in maps]
    return [head(m)[0].unflatten(1, (*m.shape[2:], -1)).permute(0, 3, 1, 2) for m in maps]


def _along(network: Network, strides: Sequence[int], axis: int) -> list[tuple[float, float]]:
    """Size and centre of the field of each map, along one axis."""
    narrow = max(16, *strides)
    for length in LENGTHS:
        found, canvas = [], (length, narrow) if axis == 0 else (narrow, length)
        for cells, stride in zip(dependence(network, canvas, axis=axis), strides, strict=True):
            middle = torch.arange(length // 4, length * 3 // 4, stride)
            first, last = cells[middle // stride].unbind(1)
            if first.min() <= 0 or last.max() >= length - 1:
                found.append((math.inf, math.nan))
            else:
                centre = ((first + last + 1) / 2 - middle).mean()
                found.append(((last - first + 1).max().item(), centre.item()))
        if all(size < math.inf for size, _ in found):
            break
    return found


class _Farthest(Tensor):
    """Stands for a tensor in a network, and holds how far each of its numbers sees.

    seen: float32, of the same shape and layout. What sees nothing, as weights, is a plain tensor.
    """

    seen: Tensor

    def __new__(cls, seen: Tensor) -> "_Farthest":
        made = Tensor._make_wrapper_subclass(cls, seen.shape, strides=seen.stride())
        made.seen = seen
        return made

    @classmethod  # torch's annotation lacks the first argument
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What the operator `func` makes of how far its arguments see."""
        operator, writes, kwargs = func.overloadpacket, func._schema.is_mutable, kwargs or {}
        if operator in _RULES:
            return _RULES[operator](*args)
        if (func.is_view or operator in _MOVES) and not writes:
            moved = func(*tree_map(_seen, args), **tree_map(_seen, kwargs))
            return tree_map(lambda m: cls(m) if isinstance(m, Tensor) else m, moved)
        pointwise = torch.Tag.pointwise in func.tags or operator in _POINTWISE
        if not pointwise or (writes and not isinstance(args[0], cls)):
            raise _unknown(func)
        terms = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        shape = torch.broadcast_shapes(*(term.shape for term in terms))
        seen = [term.seen.expand(shape) for term in terms if isinstance(term, cls)]
        farther = reduce(torch.maximum, seen, seen[0])  # a new tensor, also if there is one term
        if not writes:
            return cls(farther)
        args[0].seen.copy_(farther)
        return args[0]


def _unknown(what: Any) -> ConfigError:
    return ConfigError(f"backbone.name: expected operators whose field is known here, got {what}")


def _seen(value: Any) -> Any:
    """How far an argument sees; indices, and what is no tensor, as they are."""
    if isinstance(value, _Farthest):
        return value.seen
    is_map = isinstance(value, Tensor) and value.is_floating_point()
    return torch.full(value.shape, NOTHING) if is_map else value


def _mix(x: _Farthest, dims: tuple[int, ...]) -> _Farthest:
    """Every number depends on all along some dimensions."""
    return _Farthest(x.seen.amax(dims, keepdim=True).expand_as(x.seen).contiguous())


def _matmul(a: Tensor, b: Tensor) -> _Farthest:
    """[..., N, K], [..., K, M] -> [..., N, M]."""
    return _Farthest(torch.maximum(_seen(a).amax(-1, True), _seen(b).amax(-2, True)))


def _mean(x: _Farthest, dims: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """Over both axes of a map it is the beginning of a gate, and sees nothing."""
    seen = x.seen.amax(tuple(dims), keepdim)
    return _Farthest(seen) if len(dims) == 1 else torch.zeros_like(seen)


def _convolution(x: Tensor, weight: Tensor, bias: Any, *options: Any) -> _Farthest:
    """Of groups, too, every channel sees what all see together."""
    stride, padding, dilation, transposed, *_ = options
    if transposed or len(padding) != 2 or not isinstance(x, _Farthest):
        raise _unknown("a convolution that is transposed, or not of two axes of a map")
    top, left = padding
    padded = F.pad(x.seen.amax(1, True), (left, left, top, top), value=NOTHING)
    seen = F.max_pool2d(padded, weight.shape[-2:], stride, 0, dilation)
    return _Farthest(seen.repeat(1, len(weight), 1, 1))


# Torch's own marks say which operators are views, and which act on each number; except for these.
_POINTWISE = {aten.hardswish, aten.hardswish_}
_MOVES = {aten.cat, aten.clone, aten.index, aten.roll, aten._unsafe_view}
_MOVES |= {aten.upsample_nearest2d, aten.max_pool2d_with_indices}  # the largest is the farthest
_RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution: _convolution,
    aten.avg_pool2d: lambda x, kernel, stride=(), padding=0, ceil_mode=False, *_: _Farthest(
        F.max_pool2d(x.seen, kernel, stride or None, padding, 1, ceil_mode)
    ),
    aten.mean: _mean,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.addmm: lambda bias, a, b: _matmul(a, b),
    aten._softmax: lambda x, dim, half: _mix(x, (dim,)),
    aten.native_layer_norm: lambda x, shape, *_: (_mix(x, tuple(range(-len(shape), 0))),) * 3,
    aten.native_group_norm: lambda x, *_: (_mix(x, (1,)),) * 3,
    aten.native_batch_norm: lambda x, *_: (_mix(x, (1,)),) * 3,
    aten.constant_pad_nd: lambda x, sides, *_: _Farthest(F.pad(x.seen, sides, value=NOTHING)),
    aten.new_zeros: lambda x, size: x.seen.new_zeros(size),
}
