"""A long run on small drawn images: do memory, open files and processes stay as they were?

    python scripts/soak.py --steps 10000 [KEY=VALUE ...]

The overrides are those of `rpn-train`, over a run with loader processes, evaluations and
checkpoints. Every second each of its processes is looked at in /proc. A figure is the median of a
tenth of the run: the first is that of the second tenth, when all is warm, the last that of the last
tenth. Exit code 1 if the resident memory of a process grows by more than --bound MB between the
two, if it has more files open, or if a process is left when the run has ended, be it a zombie.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_run import ENVIRONMENT, SMALL, command, processes

from rpn_train.run_log import write_json

EVERY_S = 1.0


def look(process: int) -> tuple[float, int] | None:
    """Resident memory (MB) and number of open files of a process; None if it has ended."""
    folder = Path(f"/proc/{process}")
    try:
        status = (folder / "status").read_text()
        opened = len(list((folder / "fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None
    resident = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return None if resident is None else (int(resident.split()[1]) / 1024, opened)


def watch(run: subprocess.Popen[bytes]) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Look at a run until it ends.

    Returns:
        Of each of its processes the samples, float64 [T, 3] (s, MB, files), and of the whole run
        int64 [T', 2] (processes, zombies).
    """
    samples: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    counts = []
    started = time.monotonic()
    while run.poll() is None:
        now = time.monotonic() - started
        states = processes(run.pid)
        counts.append((len(states), [*states.values()].count("Z")))
        for process in states:
            if (seen := look(process)) is not None:
                samples[process].append((now, *seen))
        time.sleep(EVERY_S)
    return {process: np.array(rows) for process, rows in samples.items()}, np.array(counts)


def figures(rows: np.ndarray, seconds: float, steps: int) -> dict[str, float]:
    """First and last figures of a process that was there all the time."""
    tenth = (10 * rows[:, 0] / seconds).astype(int)
    first, last = (np.median(rows[tenth == number, 1:], axis=0).tolist() for number in (1, 9))
    warm = rows[tenth >= 1]
    slope = float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0]) * seconds / steps * 1000
    return {
        "first_mb": first[0],
        "last_mb": last[0],
        "mb_per_1000_steps": slope,
        "first_files": first[1],
        "last_files": last[1],
    }


def soak(typed: Sequence[str], steps: int, folder: Path) -> dict[str, Any]:
    """Run, watch, and sum up."""
    run_folder = folder / "run"
    started = time.monotonic()
    with open(folder / "log", "wb") as log:
        run = subprocess.Popen(
            command([*SMALL, f"schedule.steps={steps}", *typed, f"output_dir={run_folder}"]),
            env=ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            samples, counts = watch(run)
        finally:
            run.kill()
    seconds = time.monotonic() - started
    if run.returncode:
        raise SystemExit(
            f"error: the run ended with {run.returncode}: {(folder / 'log').read_text()}"
        )
    lasting = {p: rows for p, rows in samples.items() if rows[-1, 0] - rows[0, 0] > 0.8 * seconds}
    names = ["parent", *(f"loader process {number}" for number in range(1, len(lasting)))]
    per_process = [figures(lasting[process], seconds, steps) for process in sorted(lasting)]
    return {
        "steps": steps,
        "seconds": seconds,
        "samples": len(counts),
        "most_processes": int(counts[:, 0].max()),
        "processes_seen": len(samples),
        "zombies_seen": int((counts[:, 1] > 0).sum()),
        "left": processes(run.pid),
        "processes": dict(zip(names, per_process, strict=True)),
    }


def tell(result: dict[str, Any]) -> None:
    print(
        f"{result['steps']} steps in {result['seconds'] / 60:.1f} min, {result['samples']} samples"
    )
    print(
        f"{result['processes_seen']} processes seen, {result['most_processes']} at a time at "
        f"most, {len(result['left'])} left at the end; a zombie in {result['zombies_seen']} samples"
    )
    titles = ("first MB", "last MB", "per 1000 steps", "first files", "last files")
    print(f"{'':18}" + "".join(f"{title:>16}" for title in titles))
    for name, values in result["processes"].items():
        first_mb, last_mb, slope, *files = values.values()
        cells = (f"{first_mb:.1f}", f"{last_mb:.1f}", f"{slope:+.2f}", *(f"{n:.0f}" for n in files))
        print(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))


def faults(result: dict[str, Any], bound: float) -> list[str]:
    """What has grown or was left."""
    found = [f"process {p} is left, state {state}" for p, state in result["left"].items()]
    for name, f in result["processes"].items():
        if f["last_mb"] - f["first_mb"] > bound:
            found.append(f"{name}: memory grew by more than {bound:g} MB")
        if f["last_files"] > f["first_files"]:
            found.append(f"{name}: more files are open")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 if all is flat, else 1."""
    parser = argparse.ArgumentParser(description="Does a long run stay as small as it was?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-train")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--bound", type=float, default=16.0, metavar="MB", help="growth allowed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    args = parser.parse_intermixed_args(argv)
    often = ["log_every=100", "eval_every=250", "save_every=100"]
    with tempfile.TemporaryDirectory() as folder:
        result = soak([*often, *args.overrides], args.steps, Path(folder))
    tell(result)
    if args.json:
        write_json(args.json, result)
    found = faults(result, args.bound)
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    if not found:
        print(f"flat: no process grew by more than {args.bound:g} MB or opened more files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
