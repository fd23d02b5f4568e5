"""Image and boxes together: reading, resizing, flipping, colour jitter. uint8 throughout."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from rpn_train.boxes import clip
from rpn_train.data.faults import FaultError
from rpn_train.data.headers import MAX_PIXELS, header_size, without_size_warning
from rpn_train.errors import DataError


def read_image(path: Path, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image file as uint8 [3, H, W] RGB: grey and palettes expanded, alpha left out.

    Pixels are as stored, to which COCO's and VOC's boxes refer; `upright` turns them as EXIF says,
    but those of WebP.
    16 bits per channel are scaled to 8. Of an animation it is the first frame.

    Raises:
        DataError: no such file, not a readable image, or one of more than `max_pixels`.
    """
    try:
        data = path.read_bytes()
        with without_size_warning():
            header_size(BytesIO(data), upright=upright, max_pixels=max_pixels)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
    except OSError as error:
        raise DataError(f"{path}: expected an image, got: {error.strerror}") from error
    except FaultError as error:
        raise DataError(f"{path}: expected an image, got one {error}") from error
    except RuntimeError as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])  # of torchvision's build
        raise DataError(f"{path}: expected a readable image, got: {reason}") from error
    if image.ndim == 4:
        image = image[0]
    if image.dtype == torch.uint16:
        image = ((image.int() * 255 + 32767) // 65535).to(torch.uint8)
    assert (image.ndim, image.dtype) == (3, torch.uint8), (image.shape, image.dtype)
    return image


def fit_size(size: tuple[int, int], short_side: float, max_side: int) -> tuple[int, int]:
    """(height, width) whose shorter side is short_side, unless the longer would exceed max_side."""
    scale = min(short_side / min(size), max_side / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Image uint8 [3, H, W] and boxes [G, 4] resized to `size`, boxes cut to the image."""
    old_height, old_width = image.shape[-2:]
    return resize_image(image, size), resize_boxes(boxes, (old_height, old_width), size)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of `resize` that concerns the image."""
    same = tuple(image.shape[-2:]) == size
    return image if same else F.resize(image, list(size), antialias=True)


def resize_boxes(boxes: Tensor, old: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The part of `resize` that concerns the boxes, of an image of size `old`."""
    factor = torch.tensor([size[1] / old[1], size[0] / old[0]] * 2, dtype=torch.float32)
    return clip(boxes * factor, torch.tensor(size))


def flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrored left to right."""
    width = image.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def photometric_jitter(image: Tensor, seed: int) -> Tensor:
    """Brightness, contrast, saturation (each x 0.6..1.4) and hue (+-18 degrees), from a seed."""
    brightness, contrast, saturation = np.random.default_rng(seed).uniform(0.6, 1.4, 3)
    hue = np.random.default_rng((seed, 1)).uniform(-0.05, 0.05)
    image = F.adjust_brightness(image, brightness)
    image = F.adjust_contrast(image, contrast)
    image = F.adjust_saturation(image, saturation)
    return F.adjust_hue(image, hue)
