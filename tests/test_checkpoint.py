"""Checkpoints: whole or not at all, nothing in them is run, faults are one line."""

import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rpn_train import checkpoint, whole_file
from rpn_train.errors import CheckpointError


def state(step: int = 3) -> dict[str, Any]:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "evaluated": -1,
        "best_ar_100": 0.25,
        "history": [[0.5, 1.0]],
        "config": {"seed": 0, "anchors": {"sizes": [[32.0]]}, "name": "rpn", "resume": None},
        "model": model.state_dict(),
        "ema": None,
        "optimizer": optimizer.state_dict(),
        "scaler": {},
    }


def fault(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_there_and_back(tmp_path: Path) -> None:
    saved = state()
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(saved, path)
    loaded = checkpoint.load(path)
    assert loaded.keys() == {"format", *saved}
    assert loaded["format"] == checkpoint.FORMAT
    for key in saved.keys() - {"model", "optimizer"}:
        assert loaded[key] == saved[key]
    for key, value in saved["model"].items():
        assert torch.equal(loaded["model"][key], value)
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, saved["optimizer"]["state"][0]["momentum_buffer"])
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_crash_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(state(step=3), path)
    before = path.read_bytes()

    def full_disk(values: Any, file: Any) -> None:
        file.write(before[: len(before) // 2])
        file.flush()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        expected = "cannot be written .*No space left on device.*; what was saved before is intact"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.save(state(step=4), path)
    assert path.read_bytes() == before
    checkpoint.save(state(step=5), path)  # over the torn rest of the crash
    assert checkpoint.load(path)["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_an_interrupt_while_writing_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer ends its file on the way out, and hides the interrupt behind what it finds."""

    def interrupted(values: Any, file: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:863] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(state(step=3), tmp_path / "last.pt")
    assert not [*tmp_path.iterdir()]


def test_the_file_is_on_the_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty file under the right name."""
    events: list[str] = []
    synced, replaced = whole_file.os.fsync, whole_file.os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda f: (events.append("fsync"), synced(f)))
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (events.append("replace"), replaced(a, b))
    )
    checkpoint.save(state(), tmp_path / "last.pt")
    assert events == ["fsync", "replace"]


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch"])
def test_code_in_a_file_is_not_run(tmp_path: Path, plain: bool) -> None:
    path, touched = tmp_path / "last.pt", tmp_path / "touched"
    content = {"format": 1, **state(), "config": Trap(touched)}
    if plain:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    expected = "FILE: expected a checkpoint of rpn-train, got a broken or another file"
    assert fault(path) == f"{expected} ({'BadZipFile' if plain else 'UnpicklingError'})"
    assert not touched.exists()
    pickle.loads(pickle.dumps(Trap(touched)))  # it would have
    assert touched.exists()


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert fault(path) == "expected a checkpoint, got nothing at FILE"
    checkpoint.save(state(), path)
    whole = path.read_bytes()
    expected = "FILE: expected a checkpoint of rpn-train, got a broken or another file ("
    for content in (
        *(whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)),
        b"hello world\n" * 3,
        b"<html>404</html>",
        b"\xff\xd8\xff\xe0" * 100,
    ):
        path.write_bytes(content)
        assert fault(path).startswith(expected), content[:20]
    for other in ([1, 2], {"weight": torch.ones(2)}, torch.ones(2)):
        torch.save(other, path)
        assert fault(path) == "FILE: expected a checkpoint of rpn-train, got another file"


@pytest.mark.parametrize("key", state().keys())
def test_a_key_is_missing(tmp_path: Path, key: str) -> None:
    values = state()
    del values[key]
    checkpoint.save(values, tmp_path / "last.pt")
    expected = "FILE: expected a checkpoint of rpn-train, got another file"
    assert fault(tmp_path / "last.pt") == expected


def test_another_format(tmp_path: Path) -> None:
    torch.save({**state(), "format": 99}, tmp_path / "last.pt")
    assert fault(tmp_path / "last.pt") == (
        "FILE: expected checkpoint format 1, got 99; use the version of rpn-train that wrote it"
    )


def test_find(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    checkpoint.save(state(), last)
    best = checkpoint.find(last).with_name("best.pt")
    best.touch()
    assert checkpoint.find(tmp_path / "run") == last
    assert checkpoint.find(best) == best
    for path, message in (
        (tmp_path, f"{tmp_path}: expected a run folder, got no checkpoints/last.pt in it"),
        (
            tmp_path / "nowhere",
            f"expected a run folder or a checkpoint, got nothing at {tmp_path / 'nowhere'}",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.find(path)
        assert str(caught.value) == message


def test_weights_into_a_model() -> None:
    given, model = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_weights(model, given.state_dict(), Path("a.pt"))
    assert torch.equal(model.weight, given.weight)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"bias": torch.zeros(3)},
            "a.pt: expected weights 'weight', got none of that name",
        ),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)},
            "a.pt: weights 'extra' have no place in this network",
        ),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)},
            "a.pt: expected 'weight' of shape (3, 2), got (2, 2)",
        ),
    ],
)
def test_weights_of_another_network(weights: dict[str, Any], message: str) -> None:
    """The first key that is wrong is named, and no weight of the model has changed."""
    model = nn.Linear(2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, weights, Path("a.pt"))
    assert str(caught.value) == message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_any_damaged_byte_of_a_tensor_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(state(), path)
    content = bytearray(path.read_bytes())
    weight = state()["model"]["weight"].numpy().tobytes()
    saved = checkpoint.load(path)["model"]["weight"].numpy().tobytes()
    place = bytes(content).index(saved)
    content[place + len(weight) // 2] ^= 1
    path.write_bytes(content)
    assert fault(path).startswith("FILE: expected a checkpoint of rpn-train, got a broken or")


def test_older_checkpoints_stay_and_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in range(1, 6):
        checkpoint.save(state(step=step), path, keep=3)
    assert {p.name: checkpoint.load(p)["step"] for p in tmp_path.iterdir()} == {
        "last.pt": 5,
        "last.1.pt": 4,
        "last.2.pt": 3,
    }
    saved, taken, wrong = checkpoint.load_newest(path)
    assert (saved["step"], taken, wrong) == (5, path, None)
    path.write_bytes(path.read_bytes()[:1000])
    saved, taken, wrong = checkpoint.load_newest(path)
    assert (saved["step"], taken.name) == (4, "last.1.pt")
    assert wrong is not None
    assert wrong.startswith(f"{path}: expected a checkpoint of rpn-train, got a broken")
    path.unlink()
    assert checkpoint.load_newest(path)[0]["step"] == 4
    for older in tmp_path.iterdir():
        older.write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a checkpoint of rpn-train, got a broken"):
        checkpoint.load_newest(path)
    with pytest.raises(CheckpointError, match="got nothing at"):
        checkpoint.load_newest(tmp_path / "other.pt")


def test_a_full_disk(tmp_path: Path) -> None:
    """A real write that fails: no file may be longer than what was written before."""
    path = tmp_path / "last.pt"
    checkpoint.save(state(step=3), path)
    before = path.read_bytes()
    large = state(step=4) | {"history": [[0.5] * 100_000]}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            checkpoint.save(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
