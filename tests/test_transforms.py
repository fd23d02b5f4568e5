"""Reading and augmenting: boxes follow the pixels, and randomness follows the seed."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from rpn_train.data.transforms import fit_size, flip, photometric_jitter, read_image, resize
from rpn_train.errors import DataError


def picture(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    """A white box (x1, y1, x2, y2) on black."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    return image


def tight_box(image: Tensor) -> Tensor:
    """Edges of what is at least half white."""
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


# Boxes and pixels


@pytest.mark.parametrize("size", [(47, 61), (94, 122), (31, 29), (83, 40), (200, 97)])
def test_boxes_follow_the_pixels(size: tuple[int, int]) -> None:
    box = (13, 8, 37, 41)
    image, boxes = resize(picture(47, 61, box), torch.tensor([box]).float(), size)
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    assert_close(boxes[0], tight_box(image), atol=1.0, rtol=0)
    image, boxes = flip(image, boxes)
    assert_close(boxes[0], tight_box(image), atol=1.0, rtol=0)


def test_flip_is_exact_and_undoes_itself() -> None:
    box = (13, 8, 37, 41)
    image = picture(47, 61, box)
    flipped, boxes = flip(image, torch.tensor([box]).float())
    assert boxes.tolist() == [[61 - 37, 8, 61 - 13, 41]]
    assert_close(tight_box(flipped), boxes[0])
    again, boxes = flip(flipped, boxes)
    assert torch.equal(again, image)
    assert boxes.tolist() == [[*map(float, box)]]


def test_resizing_by_hand() -> None:
    """Twice as wide, half as high; the first box is cut at 0 and at the width of 20."""
    boxes = torch.tensor([[-3.0, 4, 12, 6], [1, 0, 2.5, 8]])
    image, boxes = resize(torch.zeros(3, 8, 10, dtype=torch.uint8), boxes, (4, 20))
    assert image.shape == (3, 4, 20)
    assert boxes.tolist() == [[0, 2, 20, 3], [2, 0, 5, 4]]


def test_the_same_size_changes_no_pixel_but_cuts_boxes() -> None:
    image = torch.randint(256, (3, 9, 7), generator=torch.Generator().manual_seed(0)).byte()
    same, boxes = resize(image, torch.tensor([[-1.0, 2, 8, 9.5]]), (9, 7))
    assert torch.equal(same, image)
    assert boxes.tolist() == [[0, 2, 7, 9]]


def test_without_boxes() -> None:
    image, boxes = resize(picture(9, 7, (0, 0, 1, 1)), torch.zeros(0, 4), (18, 14))
    assert boxes.shape == (0, 4)
    assert flip(image, boxes)[1].shape == (0, 4)


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # COCO: 640 * 800 / 480 = 1066.7
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),  # 1199.1
        ((300, 640), (625, 1333)),  # the longer side decides: 300 * 1333 / 640 = 624.8
        ((800, 800), (800, 800)),
        ((1, 5000), (1, 1333)),  # never 0
    ],
)
def test_fit_size_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_size(size, 800, 1333) == expected


@given(st.integers(1, 6000), st.integers(1, 6000), st.floats(16, 1600), st.integers(16, 2666))
def test_fit_size_keeps_its_limits(height: int, width: int, short: float, most: int) -> None:
    size = fit_size((height, width), short, most)
    assert min(size) >= 1
    assert max(size) <= most
    assert min(size) <= round(short)
    assert min(size) == round(short) or max(size) == most
    assert fit_size((width, height), short, most) == size[::-1]


# Reading


def jpeg(mode: str = "RGB", size: tuple[int, int] = (31, 17), **settings: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **settings)
    return file.getvalue()


def test_a_colour_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)  # RGB, not BGR


def test_a_grayscale_image_has_three_equal_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg("L"))
    image = read_image(path)
    assert image.shape == (3, 17, 31)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_pixels_stay_as_stored(tmp_path: Path) -> None:
    """COCO's boxes refer to them: EXIF orientation 6 (turned by 90 degrees) is not applied."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(exif=exif))
    assert read_image(path).shape == (3, 17, 31)


def test_pixels_are_turned_where_boxes_refer_to_them_so(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(exif=exif))
    turned = read_image(path, upright=True)
    assert torch.equal(turned, read_image(path).rot90(-1, (1, 2)))  # clockwise


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """By 255 / 65535 = 1 / 257 and rounded: 128.5 / 257 is half-way from 0 to 1."""
    values = np.array([[0, 128, 129, 257], [32767, 32896, 65406, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.dtype == torch.uint8
    assert image[0].tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_of_an_animation_it_is_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((7, 9, 3), 90 * (i + 1), np.uint8)) for i in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(tmp_path / "moving.gif"), torch.full((3, 7, 9), 90).byte())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg(size=(200, 200))[:3000], "a readable image, got: Image is incomplete or truncated"),
        (b"<html>404 Not Found</html>" * 50, "an image, got one not readable (cannot identify"),
        (b"", "an image, got one not readable (cannot identify image file"),
        (b"BM", "an image, got one not readable ("),
    ],
    ids=["truncated", "html", "empty", "two bytes"],
)
def test_a_broken_image_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: expected {reason}")
    assert "\n" not in str(caught.value)


def test_the_limit_of_pixels_is_the_largest_size_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(size=(31, 17)))
    assert read_image(path, max_pixels=31 * 17).shape == (3, 17, 31)
    with pytest.raises(DataError, match=r"a\.jpg: .* of too many pixels \(31 x 17, at most 526\)$"):
        read_image(path, max_pixels=31 * 17 - 1)


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.jpg: expected an image, got: No such file or director"
    ):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r": expected an image, got: Is a directory$"):
        read_image(tmp_path)


# Colours


def test_jitter_follows_the_seed_and_nothing_else() -> None:
    image = torch.randint(256, (3, 20, 23), generator=torch.Generator().manual_seed(0)).byte()
    kept = image.clone()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = photometric_jitter(image, 5)
    torch.rand(3)
    assert torch.equal(photometric_jitter(image, 5), first)
    assert not torch.equal(photometric_jitter(image, 6), first)
    assert torch.equal(image, kept)
    assert first.dtype == torch.uint8
    assert first.shape == image.shape
    torch.set_rng_state(torch_state)
    photometric_jitter(image, 2**62 - 1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_jitter_stays_in_its_range() -> None:
    """A gray patch keeps its colour, and its brightness times contrast is within 0.6 to 1.4."""
    gray = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    levels = []
    for seed in range(50):
        jittered = photometric_jitter(gray, seed)
        assert jittered.min() == jittered.max()
        levels.append(int(jittered[0, 0, 0]))
    assert 59 <= min(levels) < 75
    assert 125 < max(levels) <= 141
