"""Kill a run with SIGKILL at random moments: does it always resume to the result of a whole one?

    python scripts/kill_and_resume.py --kills 20 [KEY=VALUE ...]

The overrides are those of `rpn-train`, over a run of some seconds on drawn images. It runs once
undisturbed. Then runs are killed, the whole process group at once, every other one as soon as it
has begun to write a checkpoint, the others at any time between their first file and their last.
After each kill a copy of the folder is resumed to its end and compared with the undisturbed run:
metrics.jsonl and recall.json by their text, the last checkpoint by every bit of every tensor. The
folder itself is resumed to be killed once more, so that some kills meet a resumed run.

Exit code 1 if a run does not resume or its result differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_run import ENVIRONMENT, SMALL, command, processes

from rpn_train import checkpoint

LIMIT_S = 300.0  # of one run
OFTEN = ("schedule.steps=36", "log_every=4", "save_every=5", "eval_every=12")
OUTCOMES = ("metrics.jsonl", "recall.json")


@dataclass(frozen=True)
class Kill:
    """When to kill: `after_s` a run's first file, or after its write number `write` has begun."""

    after_s: float
    write: int = 0

    def __str__(self) -> str:
        return f"{self.after_s:.3f} s" + (f" of write {self.write}" if self.write else "")


def start(folder: Path, typed: Sequence[str]) -> subprocess.Popen[bytes]:
    """Begin the run of a folder, or go on with it, in a session of its own."""
    resumed = (folder / "config.yaml").is_file()  # else it was killed before it was a run
    options = ["resume=auto"] if resumed else typed
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(
            command([*options, f"output_dir={folder}"]),
            env=ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(folder: Path, typed: Sequence[str]) -> float:
    """Run to the end; seconds from its first file on."""
    run = start(folder, typed)
    try:
        wait_for(run, folder / "lock")
        began = time.monotonic()
        if run.wait(LIMIT_S):
            raise SystemExit(f"error: {folder} ended with {run.returncode}: {told(folder)}")
        return time.monotonic() - began
    finally:
        end(run)


def wait_for(run: subprocess.Popen[bytes], path: Path) -> None:
    """Until a file is there or the run has ended."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() and run.poll() is None:
        assert time.monotonic() < deadline, f"{path}: nothing in {LIMIT_S:.0f} s"
        time.sleep(0.0005)


def killed(folder: Path, typed: Sequence[str], kill: Kill) -> bool:
    """Start the run and kill it; whether it had not ended by itself before."""
    writing = folder / "checkpoints" / "last.pt.tmp"
    for before in (writing, folder / "lock"):  # of the kill before, which a copy went on from
        before.unlink(missing_ok=True)
    run = start(folder, typed)
    try:
        wait_for(run, folder / "lock")
        for number in range(kill.write):
            while number and writing.exists():
                time.sleep(0.0005)
            wait_for(run, writing)
        time.sleep(kill.after_s)
        return run.poll() is None
    finally:
        end(run)


def end(run: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a run, and see that nothing is left of it."""
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    deadline = time.monotonic() + 10
    while left := processes(run.pid):
        assert time.monotonic() < deadline, f"processes left: {left}"
        time.sleep(0.01)


def told(folder: Path) -> str:
    """The last line that the runs of a folder have written."""
    return Path(f"{folder}.log").read_text().splitlines()[-1]


def standing(folder: Path) -> str:
    """What a kill has left: the steps of the checkpoints, torn files, lines of figures."""
    if not (folder / "config.yaml").is_file():
        return "no configuration yet"
    found = []
    for path in sorted((folder / "checkpoints").glob("*")):
        whole = path.suffix == ".pt"
        told = f"step {checkpoint.load(path)['step']}" if whole else f"{path.stat().st_size} bytes"
        found.append(f"{path.name} {told}")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().count("\n") if metrics.is_file() else 0
    return ", ".join([*found, f"{lines} lines"])


def difference(a: Any, b: Any, where: str) -> str | None:
    """The first place in which two nested values are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = ((f"{where}.{key}", a[key], b[key]) for key in a)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = ((f"{where}.{i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return None if (torch.equal(a, b) if tensors else a == b) else where
    return next((found for name, x, y in pairs if (found := difference(x, y, name))), None)


def compare(a: Path, b: Path) -> str | None:
    """Where the results of two runs differ; None if nowhere."""
    for name in OUTCOMES:
        if (a / name).read_text() != (b / name).read_text():
            return name
    first, second = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (a, b))
    for saved in (first, second):
        del saved["config"]  # it holds the folder
    return difference(first, second, "last.pt")


def draw(number: int, seconds: float, draws: random.Random) -> Kill:
    """The moment of a kill; `seconds`: how long an undisturbed run takes."""
    if number % 4 in (0, 3):  # of a new run and of a resumed one
        return Kill(draws.uniform(0, seconds))
    return Kill(draws.uniform(0, 0.03), write=draws.randint(1, 4))


def survive(kills: int, seed: int, typed: Sequence[str], folder: Path) -> int:
    """Kill and resume; prints a line for each kill and returns how many results differ."""
    whole = folder / "whole"
    seconds = finish(whole, typed)
    print(f"undisturbed: {seconds:.1f} s from the first file on; {standing(whole)}", flush=True)
    draws, differing, generation = random.Random(seed), 0, 0
    run = folder / "0"
    for number in range(kills):
        kill = draw(number, seconds, draws)
        while not killed(run, typed, kill):  # it was done before: a new run, another moment
            generation += 1
            run = folder / str(generation)
            kill = draw(number, seconds, draws)
        left = standing(run)
        copy = folder / f"{run.name}_{number}"
        shutil.copytree(run, copy)
        finish(copy, typed)
        where = compare(whole, copy)
        differing += where is not None
        outcome = "equal" if where is None else f"DIFFERS in {where}"
        print(f"kill {number + 1:2} at {kill}: {left}; resumed, {outcome}", flush=True)
        shutil.rmtree(copy)
        if number % 2:
            shutil.rmtree(run)
            generation += 1
            run = folder / str(generation)
    return differing


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 if every result equals that of the undisturbed run, else 1."""
    parser = argparse.ArgumentParser(description="Does a killed run resume to the same result?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        typed = [*SMALL, *OFTEN, *args.overrides]
        differing = survive(args.kills, args.seed, typed, Path(folder))
    print(f"{args.kills} kills, {args.kills - differing} equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
