"""Published archives: fetch with resume, verify, extract safely. `scripts/` uses it.

A set is in one of three states, and every step between them can be interrupted and run again:
`name.part` (being fetched), `name` (whole and verified), `folder/.name.complete` (extracted).
"""

import contextlib
import filecmp
import hashlib
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from rpn_train.errors import DataError

TRIES = 5  # failures in a row, without a new byte, after which to give up
WAIT_S = 1.0  # after a failure; doubled after each further one in a row
TIMEOUT_S = 30.0  # longest silence of a server
MAX_FILES = 400_000  # in one archive; COCO train2017, the largest, holds 118,287
MAX_BYTES = 60_000_000_000  # of all files in one archive; those of COCO train2017 have 19.3e9

_CHUNK_BYTES = 1 << 20
_NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_PASSING_4XX = {408, 425, 429}  # timeout, too early, too many requests


@dataclass(frozen=True)
class Archive:
    """One published zip or uncompressed tar file, and the folder that it brings."""

    url_path: str  # below the base URL: "zips/val2017.zip"
    size: int  # bytes
    sha256: str  # hex digest
    folder: str  # below the root after extraction: "val2017"

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url_path).name


def install(archive: Archive, root: Path, *, base_url: str, keep_archive: bool = False) -> Path:
    """Fetch, verify and extract `archive` below `root`, unless that was done before.

    Args:
        archive: what to fetch and what it must be.
        root: folder for the archive and its content; made if absent. Needs room for both.
        base_url: where `archive.url_path` lies, at its home or at a mirror (http or https).
        keep_archive: leave the archive in `root` after extraction.

    Returns:
        `root / archive.folder`.

    Raises:
        DataError: as `download` and `extract` do.
    """
    folder = root / archive.folder
    # Inside the folder, so that whoever deletes the folder deletes the claim too.
    marker = folder / f".{archive.name}.complete"
    if not marker.exists():
        path = download(archive, root, base_url=base_url)
        extract(path, root, archive.folder)
        marker.touch()
        if not keep_archive:
            path.unlink()
    return folder


def download(archive: Archive, root: Path, *, base_url: str) -> Path:
    """Return the path of the verified archive in `root`; fetch only the bytes that are missing.

    Args: as for `install`. A `name.part` in `root` is resumed.

    Raises:
        DataError: not found, unreachable (run again to resume), or not the expected file.
    """
    if not re.match(r"https?://[^/]", base_url):
        raise DataError(f"base URL: expected http://... or https://..., got {base_url!r}")
    path, part = root / archive.name, root / f"{archive.name}.part"
    if path.exists():
        verify(path, archive)
        return path
    root.mkdir(parents=True, exist_ok=True)
    url = f"{base_url.rstrip('/')}/{archive.url_path}"
    failures, most = 0, _size(part)
    while _size(part) < archive.size:
        try:
            _fetch(url, part, archive)
        except _NETWORK_ERRORS as error:
            _judge(error, url, part)
            # Progress is more bytes than ever before: a server that ignores ranges and always
            # breaks off at the same place must not keep us here for ever.
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures >= TRIES:
                state = f"{_size(part)} of {archive.size} bytes are here, run again to resume"
                raise DataError(f"{url}: {error!r}; {state}") from error
            time.sleep(WAIT_S * 2 ** (failures - 1))
    verify(part, archive)
    os.replace(part, path)
    part.with_suffix(".version").unlink(missing_ok=True)
    return path


def verify(path: Path, archive: Archive) -> None:
    """Check size and SHA-256 of the file at `path`.

    Raises:
        DataError: they differ; the file was renamed to `archive.name` + ".bad", not deleted.
    """
    expected, got = f"{archive.size} bytes", f"{_size(path)} bytes"
    if expected == got:
        expected, got = f"SHA-256 {archive.sha256}", f"SHA-256 {_sha256(path)}"
    if expected != got:
        bad = path.with_name(f"{archive.name}.bad")
        os.replace(path, bad)
        raise DataError(f"{path}: expected {expected}, got {got}; the file was renamed to {bad}")


def extract(path: Path, root: Path, folder: str) -> None:
    """Extract a zip or uncompressed tar file below `root`.

    The files are written to a folder beside their destination and moved when all are there. What is
    in the destination already stays: the same file is skipped, a different one is an error.

    Args:
        path: the archive; ".zip" is read as zip, any other name as tar.
        root: where it goes.
        folder: below `root`, what the archive must bring.

    Raises:
        DataError: broken archive, more than `MAX_FILES` or `MAX_BYTES` (counted as they are
            written), a name that leads outside `root`, a link or device, `folder` missing, or a
            different file in the way. Then nothing was moved.
    """
    staging = root / f".{path.name}.extracting"
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        staging.mkdir(parents=True)
        _unpack(path, staging)
        if not (staging / folder).is_dir():
            raise DataError(f"{path}: expected the folder {folder} inside, found none")
        for source, target in list(_moves(staging, root)):  # list: all conflicts before any move
            os.replace(source, target)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: expected a zip or tar file, cannot read it: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(url: str, part: Path, archive: Archive) -> None:
    """One request: append to `part` what it lacks, or write it anew if the server sends the whole.

    If-Range (RFC 9110, 13.1.5) asks for the rest only of the very file that `part` began with.
    """
    have, version_file = _size(part), part.with_suffix(".version")
    version = version_file.read_text() if have and version_file.exists() else ""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if version:
        headers["If-Range"] = version
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as response:
        start, total = _span(response)
        if start not in (0, have) or (start and _version(response) != version):
            part.unlink(missing_ok=True)
            raise ConnectionError("the file on the server changed")
        if total not in (None, archive.size):
            raise DataError(f"{url}: expected {archive.size} bytes, the server has {total}")
        with open(part, "ab" if start else "wb") as file:
            version_file.write_text(_version(response))
            for chunk in _chunks(response.read1, archive.name, archive.size, start):
                file.write(chunk)
                if file.tell() > archive.size:  # whatever it sends, a server cannot fill the disk
                    break
            file.flush()
            os.fsync(file.fileno())
    if _size(part) < archive.size:  # http.client does not tell when a body ends early
        raise ConnectionError("the connection ended early")


def _judge(error: Exception, url: str, part: Path) -> None:
    """Raise if another try cannot help."""
    if isinstance(error, HTTPError):
        if error.code == 416:  # the server's file ends before ours: it changed
            part.unlink(missing_ok=True)
        elif 400 <= error.code < 500 and error.code not in _PASSING_4XX:
            raise DataError(f"{url}: expected the archive, got {error}") from error


def _span(response: HTTPResponse) -> tuple[int, int | None]:
    """First byte of the body, and size of the whole file where the server tells it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        return (int(match[1]), int(match[2])) if match else (-1, None)
    return 0, response.length


def _version(response: HTTPResponse) -> str:
    """What tells one version of a file from the next; If-Range does not take weak ETags."""
    etag: str = response.headers["ETag"] or "W/"
    return (response.headers["Last-Modified"] or "") if etag.startswith("W/") else etag


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in _chunks(file.read, f"verify {path.name}", _size(path)):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(read: Callable[[int], bytes], title: str, total: int, have: int = 0) -> Iterator[bytes]:
    # disable=None: no bar where there is no terminal.
    with tqdm(None, title, total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
        while chunk := read(_CHUNK_BYTES):
            bar.update(len(chunk))
            yield chunk


def _files(path: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    """Name and content of the regular files in an archive. Folders are skipped; links, devices and
    the like are an error."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)  # 0 where the maker knew no modes
                if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DataError(f"{path}: {info.filename!r} is not a plain file or folder")
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, content
    else:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{path}: {member.name!r} is not a plain file or folder")
                if member.isfile() and (reader := tar.extractfile(member)):
                    yield member.name, reader


def _unpack(path: Path, staging: Path) -> None:
    """Write every file ourselves: links, devices and modes of the archive's choice cannot arise."""
    num_bytes = 0
    with contextlib.closing(_files(path)) as files:
        bar = tqdm(files, f"extract {path.name}", unit=" files", disable=None)
        for num_files, (name, content) in enumerate(bar, start=1):
            if num_files > MAX_FILES:
                raise DataError(f"{path}: expected at most {MAX_FILES} files inside")
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or re.search(r"^/|[\\:\0]", name):
                raise DataError(f"{path}: {name!r} may lead outside the folder")
            target = staging.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                while chunk := content.read(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    if num_bytes > MAX_BYTES:
                        raise DataError(f"{path}: expected at most {MAX_BYTES} bytes inside")
                    file.write(chunk)


def _moves(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """The renames that merge `source` into `target`: a whole folder where there is none yet."""
    for entry in source.iterdir():
        place = target / entry.name
        if not os.path.lexists(place):
            yield entry, place
        elif entry.is_dir() and place.is_dir():
            yield from _moves(entry, place)
        elif not (entry.is_file() and place.is_file() and filecmp.cmp(entry, place, shallow=False)):
            raise DataError(f"{place}: differs from the archive's file; move it away and run again")
