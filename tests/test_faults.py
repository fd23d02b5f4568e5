"""Faults of a run: kills, signals, full and read-only disks, lost processes, stalled loaders."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from multiprocessing import active_children
from multiprocessing.context import ForkProcess, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
import torch
from kill_and_resume import difference
from small_run import processes
from torch import Tensor

from rpn_train import checkpoint, cli, evaluate, shell
from rpn_train import train as train_module
from rpn_train.config import TrainConfig
from rpn_train.data.batch import TrainBatches
from rpn_train.data.loading import StalledWarning, load
from rpn_train.data.sampler import Planner
from rpn_train.data.shapes import Style, draw_row, shapes_index
from rpn_train.distributed import MEETING, Ranks, start
from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.run_folder import make_folder
from rpn_train.run_state import last_of
from rpn_train.step import training_step
from rpn_train.stop import StopRequest
from rpn_train.train import train

TINY = {
    "schedule": "default",
    "backbone": "resnet18_c4",
    "anchors": "c4",
    "anchors.sizes": [[8, 16]],
    "method.channels": 32,
    "dataset.shapes.size": [32, 32],
    "dataset.shapes.train_images": 14,
    "dataset.shapes.val_images": 5,
    "image.short_side": 32,
    "image.max_side": 32,
    "schedule.batch_size": 6,
    "schedule.steps": 8,
    "eval.max_proposals": [10, 100],
    "eval.pictures": 0,
    "log_every": 1,
    "save_every": 2,
    "eval_every": 4,
    "workers": 0,
    "device": "cpu",
}
LAST = 8
ONE = Ranks(0, 1, torch.device("cpu"))
LIMIT_S = 60.0


def typed(folder: Path, **changes: Any) -> list[str]:
    """TINY with `changes` (dots as double underscores), as typed on the command line."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    written = {
        key: value if isinstance(value, str) else json.dumps(value).replace(" ", "")
        for key, value in values.items()
    }
    return [*(f"{key}={value}" for key, value in written.items()), f"output_dir={folder}"]


def config(folder: Path, **changes: Any) -> TrainConfig:
    return cli.compose_run(typed(folder, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any fault."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert train(config(folder), folder, ONE) is None
    return folder


def assert_same_run(whole: Path, folder: Path) -> None:
    """Bit for bit."""
    for name in ("metrics.jsonl", "recall.json"):
        assert (folder / name).read_text() == (whole / name).read_text()
    first, second = (checkpoint.load(last_of(path)) for path in (whole, folder))
    assert first["step"] == second["step"] == LAST
    for key, value in first["model"].items():
        assert torch.equal(second["model"][key], value), key


# Whole commands, in processes that have not to import torch first

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rpn_train.cli"])


def _begin(
    command: Callable[[Sequence[str]], int],
    arguments: list[str],
    environment: dict[str, str],
    log: str,
) -> None:
    """A command in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)  # as conftest: sums are ordered by the number of threads
    sys.exit(cli.guarded(command, arguments))


class Command:
    """`rpn-train`, or another, that can be watched, killed and waited for."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        command: Callable[[Sequence[str]], int] = cli._train,
        **environment: str,
    ) -> None:
        self.log = log
        self.process: ForkServerProcess = FORKS.Process(
            target=_begin, args=(command, arguments, environment, str(log))
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, seen: Callable[[], bool]) -> None:
        until(lambda: seen() or not self.process.is_alive())
        assert seen(), self.told()

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: f"\nstep {step}/" in self.told())

    def kill(self) -> None:
        """All of it at once."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """The exit code. No process is left, be it a zombie."""
        self.process.join(LIMIT_S)
        code = self.process.exitcode
        assert code is not None, f"it hangs: {self.told()}"
        until(lambda: not processes(self.pid))
        return code


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# Kills and signals


@pytest.mark.parametrize("moment", ["first line", "first write", "third write"])
def test_killed_at_any_moment_a_run_resumes(whole: Path, tmp_path: Path, moment: str) -> None:
    """`scripts/kill_and_resume.py` does it at random ones."""
    folder = tmp_path / "run"
    writing = folder / "checkpoints" / "last.pt.tmp"
    run = Command(typed(folder), tmp_path / "log")
    if moment == "first line":  # there is no checkpoint to say what this belongs to
        run.wait_for(lambda: (folder / "metrics.jsonl").exists())
    else:
        run.wait_for(lambda: moment != "third write" or last_of(folder).exists())
        run.wait_for(writing.exists)
    run.kill()
    assert train(config(folder, resume="auto"), folder, ONE) is None
    assert_same_run(whole, folder)


@pytest.mark.parametrize("moment", ["loader processes begin", "step 3"])
def test_sigterm_twice_is_sigterm(tmp_path: Path, moment: str) -> None:
    """To the whole group, as schedulers do: loader processes do not mind."""
    folder = tmp_path / "run"
    run = Command(typed(folder, workers=2, schedule__steps=1000), tmp_path / "log")
    if moment == "step 3":
        run.wait_for_step(3)
    else:
        run.wait_for(lambda: len(processes(run.pid)) == 3)
    for _ in range(2):
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.01)  # else the two may be one
    assert run.end() == 128 + signal.SIGTERM
    assert "stopped by signal 15 after step " in run.told().splitlines()[-1]
    assert checkpoint.load(last_of(folder))["step"] >= (3 if moment == "step 3" else 1)


def test_a_killed_parent_leaves_no_loader_processes(tmp_path: Path) -> None:
    run = Command(typed(tmp_path / "run", workers=2, schedule__steps=1000), tmp_path / "log")
    run.wait_for_step(1)
    assert len(processes(run.pid)) == 3
    run.process.kill()
    assert run.end() == -signal.SIGKILL  # looks for them


@contextmanager
def pressed(module: Any, name: str, plain: Callable[..., Any], times: int) -> Iterator[None]:
    """Ctrl-C comes so many times at once in the third call of a function."""
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(times if calls == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupted)
        yield


def test_ctrl_c_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    whole: Path, tmp_path: Path
) -> None:
    cfg = config(tmp_path, workers=2, eval__batch_size=2)  # three batches: the last of step 0
    with pressed(evaluate, "propose_batch", evaluate.propose_batch, times=1):
        assert train(cfg, tmp_path, ONE) == signal.SIGINT
    assert active_children() == []
    saved = checkpoint.load(last_of(tmp_path))
    assert saved["evaluated"] == -1
    assert not (tmp_path / "recall.json").exists()
    assert train(cfg, tmp_path, ONE) is None
    assert [line["step"] for line in lines(tmp_path) if "val/ar_10" in line] == [4, 8]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ctrl_c_twice_ends_at_once_and_spoils_nothing(whole: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, workers=2)
    with (
        pressed(train_module, "training_step", training_step, times=2),
        pytest.raises(KeyboardInterrupt),
    ):
        train(cfg, tmp_path, ONE)
    assert active_children() == []
    assert checkpoint.load(last_of(tmp_path))["step"] == 2
    assert train(cfg, tmp_path, ONE) is None
    assert_same_run(whole, tmp_path)


# Folders and files


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory there; skipped where it may not be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False)
    if done.returncode:
        pytest.skip("mount: not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Not by root either."""
    with pytest.raises(ConfigError, match=r"^output_dir: expected a folder .* /proc/run"):
        make_folder(Path("/proc/run"))
    with mounted(tmp_path / "disk", "ro"):
        run = Command(typed(tmp_path / "disk" / "run"), tmp_path / "log")
        assert run.end() == 2
    assert run.told() == (
        f"error: output_dir: expected a folder to write to, got {tmp_path}/disk/run: "
        "Read-only file system\n"
    )


def test_a_disk_that_is_full_at_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    """Room for best.pt, last.pt and a half; then the run goes on where there is more."""
    disk = tmp_path / "disk"
    folder = disk / "run"
    best, last = ((whole / "checkpoints" / name).stat().st_size for name in ("best.pt", "last.pt"))
    with mounted(disk, f"size={(2 * best + 3 * last) // 2}"):
        run = Command(typed(folder, keep_checkpoints=1), tmp_path / "log")
        assert run.end() == 2
        assert run.told().splitlines()[-1] == (
            f"error: {last_of(folder)}: cannot be written ([Errno 28] No space left on device); "
            "what was saved before is intact: make room and go on with resume=auto"
        )
        assert checkpoint.load(last_of(folder))["step"] == 2
        assert not list(folder.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        assert train(config(folder, resume="auto"), folder, ONE) is None
        assert_same_run(whole, folder)


def test_a_disk_that_is_full_at_any_other_file(capsys: pytest.CaptureFixture[str]) -> None:
    def write(arguments: Sequence[str]) -> int:
        return Path("/dev/full").write_text("a line")

    assert shell.guarded(write, []) == 2
    assert capsys.readouterr().err == (
        "error: a file cannot be written (No space left on device); what was saved before is "
        "intact: make room, and a run goes on with resume=auto\n"
    )


def test_a_file_that_may_not_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    def read(arguments: Sequence[str]) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "a.json")

    assert shell.guarded(read, []) == 2
    assert capsys.readouterr().err == "error: a.json: Permission denied\n"


def test_a_loader_process_killed_during_a_checkpoint_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        checkpoint.save({}, tmp_path / "last.pt")


def test_a_checkpoint_of_another_configuration(whole: Path, tmp_path: Path) -> None:
    """What can not be changed is named in one line, all of it; what can be is told."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    changes: dict[str, Any] = {"method__channels": 16, "anchors__ratios": [1.0], "seed": 1}
    with pytest.raises(CheckpointError) as caught:
        train(config(folder, **changes), folder, ONE)
    assert str(caught.value) == (
        "anchors.ratios: [0.5, 1.0, 2.0] -> [1.0]; method.channels: 32 -> 16: "
        f"{last_of(folder)} is of another network; start in another output_dir"
    )
    assert_same_run(whole, folder)


def test_a_changed_option_is_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train(config(folder, seed=1, schedule__lr=0.5), folder, ONE)
    told = capsys.readouterr().out
    assert "changed: seed: 0 -> 1\n" in told
    assert "changed: schedule.lr: 0.02 -> 0.5\n" in told


@pytest.mark.parametrize("other", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_by_name(
    whole: Path, tmp_path: Path, other: int
) -> None:
    """Whatever its keys are. It is whole: the one before it does not take its place."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    last = last_of(folder)
    assert last.with_name("last.1.pt").is_file()
    torch.save({"format": other, "weights": {}}, last)
    before = last.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        train(config(folder), folder, ONE)
    assert str(caught.value) == (
        f"{last}: expected checkpoint format 1, got {other}; "
        "use the version of rpn-train that wrote it"
    )
    assert last.read_bytes() == before


# Several processes


def members(world: int, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Log and environment of each of several processes, as `shell.launch` starts them."""
    for rank in range(world):
        yield (
            folder / f"{world}.{rank}",
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                MEETING: f"file://{folder}/{world}.meeting",
            },
        )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_any_number_resumes(
    tmp_path: Path, victim: int
) -> None:
    folder = tmp_path / "run"
    arguments = typed(folder, schedule__steps=1000)
    group = [Command(arguments, log, **variables) for log, variables in members(2, tmp_path)]
    group[0].wait_for_step(3)
    killed_at = time.monotonic()
    group[victim].kill()
    survivor = group[1 - victim]
    assert survivor.end() == 2
    assert time.monotonic() - killed_at < 30
    fault = survivor.told().splitlines()[-1]
    assert fault.startswith("error: another process of this command has ended, or has not answered")
    assert "Traceback" not in survivor.told()
    step = checkpoint.load(last_of(folder))["step"]
    for world in (1, 2, 3) if victim else ():
        copy = tmp_path / f"on_{world}"
        shutil.copytree(folder, copy)
        changes: dict[str, Any] = {"resume": "auto", "schedule__steps": step + 2}
        if world == 1:
            assert train(config(copy, **changes), copy, ONE) is None
        else:
            logs = tmp_path / f"logs_{world}"
            logs.mkdir()
            arguments = typed(copy, **changes)
            group = [Command(arguments, log, **own) for log, own in members(world, logs)]
            assert [process.end() for process in group] == [0] * world, group[0].told()
        assert checkpoint.load(last_of(copy))["step"] == step + 2


def deaf(arguments: Sequence[str]) -> int:
    """One of two processes, of which the second does not answer."""
    with start("cpu", timedelta(seconds=1)) as ranks:
        if not ranks.is_main:
            time.sleep(30)
        ranks.any(False)
    return 0


def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    main, other = (Command([], log, deaf, **variables) for log, variables in members(2, tmp_path))
    assert main.end() == 2
    assert main.told().startswith("error: another process of this command has ended, or has not")
    assert "for 1 s;" in main.told()
    assert main.told().count("\n") == 1
    other.kill()


def sleeping(seconds: float, code: int = 0) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["sh", "-c", f"sleep {seconds} & wait; exit {code}"])


def test_the_launcher_names_the_process_that_was_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = [sleeping(0, code=2), subprocess.Popen(["sleep", "60"])]
    group[1].kill()
    until(lambda: group[0].poll() is not None and group[1].poll() is not None)
    assert shell._exit_code(group, StopRequest()) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == (
        f"error: process 1 of 2 (pid {group[1].pid}) was ended by SIGKILL; the others stop; "
        "a run goes on with resume=auto\n"
    )


def test_the_launcher_passes_sigterm_on_and_ends_what_does_not_end() -> None:
    group = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    assert shell._exit_code(group, stop) == 128 + signal.SIGTERM
    shell_code = "trap '' TERM; echo ready; exec sleep 60"
    with subprocess.Popen(["sh", "-c", shell_code], stdout=subprocess.PIPE) as deaf_one:
        assert deaf_one.stdout is not None
        deaf_one.stdout.readline()
        deaf_one.terminate()
        shell._end(deaf_one, 0.1)
    assert deaf_one.returncode == -signal.SIGKILL


# Loader processes

STYLE = Style((32, 48), max_objects=3, extents=(0.08, 0.75), clutter=False)


def batches(read: Callable[[int], Tensor] | None = None) -> TrainBatches:
    index = shapes_index(0, 9, STYLE, first=0)
    planner = Planner(
        sizes=index.sizes,
        seed=0,
        batch_size=2,
        short_side=32,
        max_side=64,
        divisor=16,
        flip=0.5,
        scale=(1.0, 1.0),
        photometric=False,
    )

    def draw(row: int) -> Tensor:
        return draw_row(index, row, seed=0, style=STYLE)

    return TrainBatches(index, read or draw, planner, rank=0, world=1, accumulate=1)


def test_a_stalled_loader_is_reported_with_process_and_file_and_goes_on() -> None:
    plain = batches()
    row = plain.planner.plan(1).items[0].row

    def slow(wanted: int) -> Tensor:
        time.sleep(1.0 if wanted == row else 0)
        return plain.read(wanted)

    with (
        pytest.warns(StalledWarning) as caught,
        closing(load(batches(slow), range(1), workers=2, pin=False, patience_s=0.2)) as found,
    ):
        batch = next(found)
    assert torch.equal(batch.images, plain[0].images)
    first, second, *_ = [str(warning.message) for warning in caught]
    assert 2 <= len(caught) <= 3  # after 0.2, 0.4 and 0.8 s, or a little later
    assert first.startswith("no batch for 0 s: loader process ")
    assert first.split(" process ")[1].split()[0].isdigit()
    assert f"is reading {plain.index.root / plain.index.file_name(row)}; it goes on" in first
    assert "no loader" not in second


def test_without_processes_a_thread_may_load() -> None:
    """As a server does that proposes."""
    with ThreadPoolExecutor(1) as threads:
        found = list(threads.map(list, [load(batches(), range(2), workers=0, pin=False)]))
    assert [len(batch.images) for batch in found[0]] == [2, 2]


@pytest.mark.filterwarnings("ignore:.*_MultiProcessingDataLoaderIter.__del__")  # half made
def test_when_not_all_loader_processes_can_begin_none_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would not mind the SIGTERM that it gets when the program ends, and be waited for."""
    begin = ForkProcess.start

    def begin_one(process: ForkProcess) -> None:
        if active_children():
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        begin(process)

    monkeypatch.setattr(ForkProcess, "start", begin_one)
    with pytest.raises(OSError, match="unavailable"):
        next(load(batches(), range(2), workers=2, pin=False))
    assert active_children() == []


def test_a_stall_is_one_line_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: Sequence[str]) -> int:
        for _ in range(2):  # the same again
            warnings.warn("no batch", StalledWarning, stacklevel=1)
        return 0

    assert shell.guarded(command, []) == 0
    assert capsys.readouterr().err == "warning: no batch\nwarning: no batch\n"


def read_for_ever(arguments: Sequence[str]) -> int:
    with closing(load(batches(), range(10**6), workers=2, pin=False)) as found:
        for _ in found:
            print("\n".join(str(child.pid) for child in active_children()), flush=True)
    return 0


def test_a_killed_loader_process_never_hangs_the_run(tmp_path: Path) -> None:
    draws = random.Random(0)
    for attempt in range(5):
        reader = Command([], tmp_path / str(attempt), read_for_ever)
        reader.wait_for(lambda reader=reader: reader.told().count("\n") > 20)
        time.sleep(draws.uniform(0, 0.1))
        victim = int(draws.choice(reader.told().splitlines()[:2]))
        os.kill(victim, signal.SIGKILL)
        assert reader.end() == 2, reader.told()
        faults = [line for line in reader.told().splitlines() if not line.isdigit()]
        assert len(faults) == 1, faults
        assert faults[0].startswith("error: a loader process ended: DataLoader worker ")


# The scripts


def test_kill_and_resume_sees_a_difference() -> None:
    one = {"step": 3, "model": {"w": torch.ones(2)}, "history": [[0.5]]}
    same = {"step": 3, "model": {"w": torch.ones(2)}, "history": [[0.5]]}
    assert difference(one, same, "last.pt") is None
    same["model"] = {"w": torch.tensor([1.0, 1.0 + 1e-7])}
    assert difference(one, same, "last.pt") == "last.pt.model.w"
    assert difference(one, {**one, "history": [[0.25]]}, "a") == "a.history.0.0"


def test_soak_sees_what_grows() -> None:
    seconds = np.arange(100.0)
    rows = np.stack([seconds, 500 + 0.5 * seconds, 20 + (seconds > 80)], axis=1)
    grown = soak.figures(rows, seconds=100.0, steps=10_000)
    assert grown == pytest.approx(
        {
            "first_mb": 507.25,
            "last_mb": 547.25,
            "mb_per_1000_steps": 5.0,
            "first_files": 20,
            "last_files": 21,
        }
    )
    result = {"left": {7: "Z"}, "processes": {"parent": grown}}
    assert soak.faults(result, bound=39.0) == [
        "process 7 is left, state Z",
        "parent: memory grew by more than 39 MB",
        "parent: more files are open",
    ]
    assert soak.faults({**result, "left": {}}, bound=41.0) == ["parent: more files are open"]
