"""What a run tells: terminal, `metrics.jsonl`, `timing.jsonl` and TensorBoard.

`metrics.jsonl` holds only what follows from (seed, step), so that a resumed run writes the very
lines of an uninterrupted one. What the clock and the machine say stands in `timing.jsonl`.
"""

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rpn_train.whole_file import replacing

Scalars = Mapping[str, float]


class RunLog:
    """The log of one run folder; without a folder (processes other than the first) it is silent.

    total: steps of the run.
    """

    def __init__(self, folder: Path | None, *, total: int, first: int) -> None:
        """Open for steps first..total; what TensorBoard has from step `first` on is discarded."""
        self.total = total
        self._folder = folder
        self._files: dict[str, IO[str]] = {}
        self._writer = self._bar = None
        if folder is None:
            return
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=first - 1, unit="step", dynamic_ncols=True)

    @property
    def enabled(self) -> bool:
        """Whether this process tells anything."""
        return self._folder is not None

    def line(self, text: str) -> None:
        """A line on the terminal, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def progress(self, step: int, text: str, seconds_left: float) -> None:
        """The state of the run: beside the bar, or as a line where there is no terminal."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            left = tqdm.format_interval(seconds_left)
            self.line(f"step {step}/{self.total}  {text}  left {left}")

    def metrics(self, step: int, values: Scalars) -> None:
        """What follows from (seed, step), to `metrics.jsonl` and TensorBoard."""
        self._write("metrics.jsonl", step, values)

    def timing(self, step: int, values: Scalars) -> None:
        """What the clock and the machine say, to `timing.jsonl` and TensorBoard."""
        self._write("timing.jsonl", step, values)

    def image(self, tag: str, step: int, image: Tensor) -> None:
        """A picture, uint8 [3, H, W], to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step)

    def text(self, tag: str, text: str) -> None:
        """A text in Markdown, to TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(tag, text)

    def hparams(self, options: Mapping[str, Any], results: Scalars) -> None:
        """Options and final figures, so that TensorBoard can compare the runs of a sweep."""
        if self._writer is not None:
            plain = {
                k: v if isinstance(v, bool | int | float | str) else str(v)
                for k, v in options.items()
            }
            self._writer.add_hparams(plain, dict(results), run_name=".")

    def close(self) -> None:
        """Finish the files and the bar."""
        for file in self._files.values():
            file.close()
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, name: str, step: int, values: Scalars) -> None:
        if self._folder is None or self._writer is None:
            return
        if name not in self._files:
            self._files[name] = open(self._folder / name, "a", encoding="utf-8")  # noqa: SIM115
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # strict JSON
        self._files[name].write(json.dumps({"step": step, **finite}) + "\n")
        self._files[name].flush()
        for key, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(key, value, step)


def truncate_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a JSONL file that a resumed run will write again, and a torn last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if keep(json.loads(line)):
                kept.append(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
    write_text(path, "".join(kept))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a YAML file whole or not at all."""
    write_text(path, yaml.safe_dump(dict(values), sort_keys=False))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; NaN (no such object) and infinity become null."""
    write_text(path, json.dumps(_finite(values), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_mb(device: torch.device) -> float:
    """Most memory used so far, MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
