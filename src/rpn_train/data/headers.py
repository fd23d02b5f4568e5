"""What the headers of image files say, read without decoding a pixel."""

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rpn_train.data.faults import FaultError
from rpn_train.data.index import Index
from rpn_train.errors import DataError

READ_FORMATS = {"JPEG", "MPO", "PNG", "GIF", "WEBP"}  # of `read_image`, as Pillow calls them
MAX_PIXELS = 178_956_970  # of RGB 0.5 GB; Pillow refuses more
_TURNED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
_TURNED_FORMATS = READ_FORMATS - {"GIF", "WEBP"}  # what torchvision's decoder turns
_ORIENTATION = 0x0112  # the EXIF tag
_THREADS = 8  # a network disk answers many at a time


@contextmanager
def without_size_warning() -> Iterator[None]:
    """Pillow warns of images that it finds large; the limit is `max_pixels`, which raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def header_size(file: Path | BytesIO, *, upright: bool, max_pixels: int) -> tuple[int, int]:
    """(height, width) of an image in pixels: as stored or, `upright`, turned as EXIF says.

    WebP is never turned: `read_image` does not either.

    Raises:
        FaultError: no such file, no image of a format that is read, or more than `max_pixels`.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            may_turn = upright and image.format in _TURNED_FORMATS
            turned = may_turn and image.getexif().get(_ORIENTATION) in _TURNED
    except FileNotFoundError:
        raise FaultError("missing") from None
    except UnidentifiedImageError:  # Pillow's words hold the path, or an address in memory
        raise FaultError("not readable", "cannot identify image file") from None
    except Image.DecompressionBombError as error:
        raise FaultError("of too many pixels", str(error)) from error
    except Exception as error:  # a broken file can break Pillow's readers in any way
        raise FaultError("not readable", str(error)[:200]) from error
    if image.format not in READ_FORMATS:
        raise FaultError("not readable", f"{image.format} instead of JPEG, PNG, WebP or GIF")
    if height * width > max_pixels:
        raise FaultError("of too many pixels", f"{width} x {height}, at most {max_pixels}")
    return (width, height) if turned else (height, width)


def header_faults(
    index: Index, rows: Iterable[int], *, upright: bool, max_pixels: int
) -> dict[int, FaultError]:
    """What is wrong with the files of some images of an index, as far as their headers say."""
    rows = list(rows)

    def fault(row: int) -> FaultError | None:
        try:
            size = header_size(index.path(row), upright=upright, max_pixels=max_pixels)
        except FaultError as error:
            return error
        except DataError:
            return FaultError("a link out of the image folder")
        return size_fault(index, row, size)

    with without_size_warning(), ThreadPoolExecutor(_THREADS) as threads:
        faults = zip(rows, threads.map(fault, rows), strict=True)
        return {row: found for row, found in faults if found is not None}


def size_fault(index: Index, row: int, size: tuple[int, ...]) -> FaultError | None:
    """What is wrong with an image of this (height, width), if it is not that of the annotations."""
    height, width = index.sizes[row].tolist()
    if size == (height, width):
        return None
    hint = "; data.exif says whether images are turned" if size == (width, height) else ""
    found = f"{size[1]} x {size[0]} px, annotated as {width} x {height}{hint}"
    return FaultError("of another size than annotated", found)
