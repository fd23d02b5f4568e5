"""Downloads against a small server on this machine, and archives made to do harm."""

import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rpn_train import download as module
from rpn_train.download import Archive, download, extract, install, verify
from rpn_train.errors import DataError

REPOSITORY = Path(__file__).parents[1]
BODY = bytes(i * i % 251 for i in range(70_001))
NOISE = np.random.default_rng(0).bytes(500_000)  # does not compress


class Server(ThreadingHTTPServer):
    """Serves `files` with Range and If-Range; the attributes switch its faults on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/mirror"
        self.files: dict[str, bytes] = {}
        self.etag = '"v1"'
        self.knows_range = self.knows_if_range = self.tells_length = True
        self.statuses: list[int] = []  # of the next requests, instead of serving the file
        self.breaks: list[int] = []  # bytes after which the next responses end
        self.hold = threading.Event()  # a response waits for this before it breaks off
        self.hold.set()
        self.paths: list[str] = []
        self.sent = 0

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is part of the tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*args)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.paths.append(self.path)
        body = server.files.get(self.path.removeprefix("/mirror/"))
        if server.statuses or body is None:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        first = 0
        same = self.headers["If-Range"] in (None, server.etag) or not server.knows_if_range
        if server.knows_range and self.headers["Range"] and same:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if server.tells_length:
            self.send_header("Content-Length", str(len(body) - first))
        self.send_header("ETag", server.etag)
        self.end_headers()
        rest = body[first:][: server.breaks.pop(0) if server.breaks else None]
        server.sent += len(rest)
        self.wfile.write(rest)
        if first + len(rest) < len(body):
            server.hold.wait(20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.hold.set()
        server.shutdown()
        thread.join()


def archive_of(body: bytes, url_path: str = "zips/a.zip", folder: str = "a") -> Archive:
    return Archive(url_path, len(body), hashlib.sha256(body).hexdigest(), folder)


def serve(server: Server, body: bytes = BODY) -> Archive:
    server.files["zips/a.zip"] = body
    return archive_of(body)


def begin(root: Path, body: bytes, version: str = '"v1"') -> None:
    """What an earlier, interrupted run leaves."""
    (root / "a.zip.part").write_bytes(body)
    (root / "a.zip.version").write_text(version)


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes | tuple[bytes, str]]) -> bytes:
    """A tar; a value (type, target) makes a member of that type."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def names(root: Path) -> list[str]:
    """All files below `root`, hidden ones too."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


# Download


def test_download_fetches_once(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    root = tmp_path / "new" / "data"
    path = download(archive, root, base_url=server.url + "/")
    assert path.read_bytes() == BODY
    assert names(root) == ["a.zip"]
    assert download(archive, root, base_url=server.url) == path
    assert server.paths == ["/mirror/zips/a.zip"]


def test_resume_asks_only_for_the_rest(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    begin(tmp_path, BODY[:50_000])
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.sent == 20_001
    assert names(tmp_path) == ["a.zip"]


def test_a_whole_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, BODY)
    assert download(serve(server), tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.paths == []


def test_broken_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    """More breaks than `TRIES`, but each brings new bytes; no byte is sent twice."""
    archive = serve(server)
    server.breaks = [10_000] * 6
    server.statuses = [503, 429]
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.sent == len(BODY)
    assert len(server.paths) == 2 + 6 + 1


def test_server_without_range_starts_over(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    server.knows_range = False
    begin(tmp_path, b"x" * 500)
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.sent == len(BODY)


def test_server_that_always_breaks_off_is_given_up(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    server.knows_range = False
    server.breaks = [1000] * 20
    with pytest.raises(DataError, match=r"^[^\n]*1000 of 70001 bytes .* run again to resume$"):
        download(archive, tmp_path, base_url=server.url)
    assert len(server.paths) == module.TRIES
    assert (tmp_path / "a.zip.part").read_bytes() == BODY[:1000]


def test_silent_server_times_out(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = serve(server)
    server.breaks = [1000]
    server.hold.clear()
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    start = time.monotonic()
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY
    assert time.monotonic() - start < 10  # the server would be silent for 20 s
    assert server.sent == len(BODY)  # what came before the silence was kept
    assert len(server.paths) == 2


@pytest.mark.parametrize(("knows_if_range", "requests"), [(True, 1), (False, 2)])
def test_changed_file_starts_over(
    server: Server, tmp_path: Path, knows_if_range: bool, requests: int
) -> None:
    archive = serve(server)
    server.etag, server.knows_if_range = '"v2"', knows_if_range
    begin(tmp_path, b"x" * 500, version='"v1"')
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY
    assert len(server.paths) == requests


def test_file_that_became_shorter(server: Server, tmp_path: Path) -> None:
    """416, then the size is seen to be wrong."""
    archive = archive_of(BODY)
    server.files["zips/a.zip"] = BODY[:400]
    begin(tmp_path, BODY[:500])
    with pytest.raises(DataError, match=r"expected 70001 bytes, the server has 400$"):
        download(archive, tmp_path, base_url=server.url)


def test_version_is_a_strong_etag_or_a_date() -> None:
    class Response:
        def __init__(self, **headers: str) -> None:
            self.headers = {"ETag": None, "Last-Modified": None} | headers

    date = {"Last-Modified": "Tue, 01 Jan 2019 00:00:00 GMT"}
    assert module._version(Response(ETag='"e"', **date)) == '"e"'
    assert module._version(Response(ETag='W/"e"', **date)) == date["Last-Modified"]
    assert module._version(Response()) == ""


def test_not_found_is_final(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^http[^\n]*/zips/a\.zip: [^\n]*404[^\n]*$"):
        download(archive_of(BODY), tmp_path, base_url=server.url)
    assert len(server.paths) == 1


@pytest.mark.parametrize("url", ["", "images.example", "file:///etc", "ftp://x/y", "http://"])
def test_base_url_must_be_http(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="expected http://"):
        download(archive_of(BODY), tmp_path, base_url=url)


def test_wrong_size_on_the_server_is_not_fetched(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    server.files["zips/a.zip"] = BODY + b"!"
    with pytest.raises(DataError, match=r"expected 70001 bytes, the server has 70002$"):
        download(archive, tmp_path, base_url=server.url)
    assert names(tmp_path) == []


def test_wrong_checksum_is_set_aside(server: Server, tmp_path: Path) -> None:
    archive = serve(server)
    other = BODY[::-1]
    server.files["zips/a.zip"] = other
    digests = f"SHA-256 {archive.sha256}, got SHA-256 {hashlib.sha256(other).hexdigest()}"
    with pytest.raises(DataError, match=f"expected {digests}; the file was renamed to .*a.zip.bad"):
        download(archive, tmp_path, base_url=server.url)
    assert (tmp_path / "a.zip.bad").read_bytes() == other
    assert not (tmp_path / "a.zip").exists()
    server.files["zips/a.zip"] = BODY
    assert download(archive, tmp_path, base_url=server.url).read_bytes() == BODY


def test_endless_body_does_not_fill_the_disk(server: Server, tmp_path: Path) -> None:
    archive = archive_of(BODY)
    server.files["zips/a.zip"] = BODY * 200  # 14 MB
    server.tells_length = False
    with pytest.raises(DataError, match=r"expected 70001 bytes, got \d+ bytes"):
        download(archive, tmp_path, base_url=server.url)
    assert (tmp_path / "a.zip.bad").stat().st_size < 2_000_000


def test_verify_keeps_a_wrong_file_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"mine")
    with pytest.raises(DataError, match="expected 70001 bytes, got 4 bytes"):
        verify(tmp_path / "a.zip", archive_of(BODY))
    assert (tmp_path / "a.zip.bad").read_bytes() == b"mine"


# Extraction

LINK_ZIP = zipfile.ZipInfo("a/link")
LINK_ZIP.external_attr = 0o120777 << 16


def link_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(LINK_ZIP, "/etc")
    return buffer.getvalue()


HOSTILE = {
    "zip_parent.zip": zip_of({"a/1": b"", "../outside": b"x"}),
    "zip_inner_parent.zip": zip_of({"a/1": b"", "a/../../outside": b"x"}),
    "zip_absolute.zip": zip_of({"a/1": b"", "/tmp/outside": b"x"}),
    "zip_drive.zip": zip_of({"a/1": b"", "C:/outside": b"x"}),
    "zip_backslash.zip": zip_of({"a/1": b"", "a\\..\\..\\outside": b"x"}),
    "zip_link.zip": link_zip(),
    "tar_parent.tar": tar_of({"a/1": b"", "../outside": b"x"}),
    "tar_absolute.tar": tar_of({"a/1": b"", "/tmp/outside": b"x"}),
    "tar_symlink.tar": tar_of({"a/1": b"", "a/s": (tarfile.SYMTYPE, ".."), "a/s/outside": b"x"}),
    "tar_hardlink.tar": tar_of({"a/1": b"", "a/h": (tarfile.LNKTYPE, "a/1")}),
    "tar_device.tar": tar_of({"a/1": b"", "a/d": (tarfile.CHRTYPE, "")}),
    "tar_fifo.tar": tar_of({"a/1": b"", "a/p": (tarfile.FIFOTYPE, "")}),
    "not_a.zip": b"<html>",
    "not_a.tar": b"<html>",
    "truncated.zip": zip_of({"a/1": BODY})[:-30],
    "truncated.tar": tar_of({"a/1": BODY})[:30_000],
    "no_folder.zip": zip_of({"b/1": b""}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_leaves_nothing(tmp_path: Path, name: str) -> None:
    path, root = tmp_path / name, tmp_path / "in" / "root"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=r"\A[^\n]+\Z"):
        extract(path, root, "a")
    assert names(tmp_path) == [name]
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(("limit", "value"), [("MAX_FILES", 2), ("MAX_BYTES", 5_000_000)])
def test_bombs_stop_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, limit: str, value: int
) -> None:
    content = make({"a/1": bytes(2_500_000), "a/2": bytes(2_500_000), "a/3": b"x"})  # type: ignore[operator]
    path = tmp_path / f"bomb.{make.__name__[:3]}"  # type: ignore[attr-defined]
    path.write_bytes(content)
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(DataError, match=f"expected at most {value}"):
        extract(path, tmp_path, "a")
    assert names(tmp_path) == [path.name]
    monkeypatch.setattr(module, limit, value + 1)
    extract(path, tmp_path, "a")
    assert len(names(tmp_path)) == 4


def test_merge_keeps_what_is_there(tmp_path: Path) -> None:
    """Trainval and test of VOC 2007 share folders; the same file twice is no conflict."""
    first, second = tmp_path / "1.tar", tmp_path / "2.tar"
    first.write_bytes(tar_of({"V/a/1": b"one", "V/both": b"same"}))
    second.write_bytes(tar_of({"V/a/2": b"two", "V/both": b"same", "V/b/3": b"three"}))
    for path in (first, second):
        extract(path, tmp_path / "root", "V")
    assert names(tmp_path / "root") == ["V/a/1", "V/a/2", "V/b/3", "V/both"]


@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_conflict_moves_nothing(tmp_path: Path, place: str) -> None:
    root = tmp_path / "root"
    (root / "V").mkdir(parents=True)
    mine = root / "V" / "both"
    if place == "file":
        mine.write_bytes(b"MINE")
    elif place == "folder":
        mine.mkdir()
    else:
        mine.symlink_to(tmp_path / "nowhere")
    path = tmp_path / "2.tar"
    # Many files, as a folder is listed in no certain order.
    path.write_bytes(tar_of({f"V/{n}": b"" for n in range(50)} | {"V/both": b"same"}))
    with pytest.raises(DataError, match="V/both: differs"):
        extract(path, root, "V")
    assert list((root / "V").iterdir()) == [mine]
    assert list(root.iterdir()) == [root / "V"]


def test_interrupted_extraction_leaves_no_half_set(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = serve(server, zip_of({"a/1": b"one", "a/2": b"two"}))
    (tmp_path / ".a.zip.extracting" / "a").mkdir(parents=True)
    (tmp_path / ".a.zip.extracting" / "a" / "left").touch()  # by a run that was killed

    def interrupt(path: Path, staging: Path) -> None:
        unpack(path, staging)
        raise KeyboardInterrupt

    unpack = module._unpack
    monkeypatch.setattr(module, "_unpack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install(archive, tmp_path, base_url=server.url)
    assert names(tmp_path) == ["a.zip"]
    monkeypatch.setattr(module, "_unpack", unpack)
    install(archive, tmp_path, base_url=server.url)
    assert names(tmp_path) == ["a/.a.zip.complete", "a/1", "a/2"]
    assert len(server.paths) == 1


def test_install_once_and_again_if_the_folder_is_gone(server: Server, tmp_path: Path) -> None:
    archive = serve(server, zip_of({"a/1": b"one"}))
    for _ in range(2):
        folder = install(archive, tmp_path, base_url=server.url, keep_archive=True)
        assert folder == tmp_path / "a"
    assert names(tmp_path) == ["a.zip", "a/.a.zip.complete", "a/1"]
    assert len(server.paths) == 1
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    install(archive, tmp_path, base_url=server.url)
    assert names(tmp_path) == ["a/.a.zip.complete", "a/1"]


# Scripts


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def tiny_coco(server: Server) -> dict[str, Archive]:
    bodies = {
        "annotations/annotations_trainval2017.zip": zip_of({"annotations/i.json": b"{}"}),
        "zips/train2017.zip": zip_of({"train2017/": b"", "train2017/1.jpg": NOISE}),
        "zips/val2017.zip": zip_of({"val2017/2.jpg": BODY}),
    }
    server.files |= bodies
    return {
        folder: archive_of(body, url_path, folder)
        for (url_path, body), folder in zip(
            bodies.items(), ("annotations", "train2017", "val2017"), strict=True
        )
    }


def test_coco_layout(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, root = script("download_coco"), tmp_path / "my data"
    archives = tiny_coco(server)
    argv = ["--root", str(root), "--base-url", server.url]
    assert program.main([*argv, "--splits", "val2017"], archives) == 0
    assert not (root / "train2017").exists()
    assert "rpn-train" not in capsys.readouterr().out  # there is nothing to train on yet
    assert program.main(argv, archives) == 0
    visible = [name for name in names(root) if "/." not in name]
    assert visible == ["annotations/i.json", "train2017/1.jpg", "val2017/2.jpg"]
    assert f"rpn-train dataset=coco 'dataset.root={root}'\n" in capsys.readouterr().out
    assert len(server.paths) == 3


def test_voc_layout(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = script("download_voc")
    trainval, test = (
        tar_of({f"VOCdevkit/VOC2007/Annotations/{n}.xml": b"", "VOCdevkit/VOC2007/x": b"same"})
        for n in (1, 2)
    )
    server.files = {"voc2007/trainval.tar": trainval, "voc2007/test.tar": test}
    archives = {
        2007: [archive_of(v, k, "VOCdevkit/VOC2007") for k, v in server.files.items()],
    }
    argv = ["--root", str(tmp_path), "--years", "2007", "--base-url", server.url]
    assert program.main([*argv, "--keep-archives"], archives) == 0
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    assert names(folder / "Annotations") == ["1.xml", "2.xml"]
    assert (tmp_path / "test.tar").exists()
    assert capsys.readouterr().out == f"rpn-train dataset=voc dataset.root={folder}\n"
    assert program.main(argv, archives) == 0
    assert len(server.paths) == 2


@pytest.mark.parametrize("name", ["download_coco", "download_voc"])
def test_script_error_is_one_line(server: Server, tmp_path: Path, name: str) -> None:
    """The real table against a server that does not have the files."""
    command = [sys.executable, f"scripts/{name}.py", "--root", str(tmp_path)]
    result = subprocess.run(
        [*command, "--base-url", server.url],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: http://127.0.0.1")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_ctrl_c_then_the_same_command_resumes(server: Server, tmp_path: Path) -> None:
    archives = tiny_coco(server)
    code = (
        # a shell starts what runs in the background with SIGINT ignored, tests for example
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; sys.path.insert(0, 'scripts'); import download_coco\n"
        "from rpn_train.download import Archive\n"
        f"sys.exit(download_coco.main(sys.argv[1:], {archives!r}))"
    )
    command = [sys.executable, "-c", code, "--root", str(tmp_path), "--base-url", server.url]
    options = {"cwd": REPOSITORY, "env": os.environ | {"PYTHONPATH": "src"}, "text": True}
    part = tmp_path / "train2017.zip.part"
    size = archives["train2017"].size
    server.breaks = [10**9, size // 2]  # the annotations pass; the images stop half-way
    server.hold.clear()
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > 0):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "interrupted: run the same command again to resume\n"
    have = part.stat().st_size
    assert 0 < have <= size // 2
    server.hold.set()
    server.sent = 0
    result = subprocess.run(command, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr
    assert server.sent == size - have + archives["val2017"].size
    assert (tmp_path / "train2017" / "1.jpg").read_bytes() == NOISE


def test_published_addresses() -> None:
    coco, voc = script("download_coco"), script("download_voc")
    assert sorted(f"{coco.HOME}/{a.url_path}" for a in coco.ARCHIVES.values()) == [
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
    ]
    assert [f"{voc.HOME}/{a.url_path}" for year in (2007, 2012) for a in voc.ARCHIVES[year]] == [
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ]
    for archive in [*coco.ARCHIVES.values(), *voc.ARCHIVES[2007], *voc.ARCHIVES[2012]]:
        assert len(bytes.fromhex(archive.sha256)) == 32
