"""What a run says of itself at its start, along the way and at its end."""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.config import TrainConfig
from rpn_train.curves import figure_to_image
from rpn_train.data.batch import Batch, EvalBatches, Unread
from rpn_train.data.faults import counted
from rpn_train.data.image_cache import ImageCache
from rpn_train.data.index import Index
from rpn_train.data_report import FILE_NAME, DataReport
from rpn_train.distributed import Ranks
from rpn_train.evaluate import ImageProposals, as_arrays, evaluate, score
from rpn_train.figures import DRAWN_PROPOSALS, draw_anchors, draw_detections
from rpn_train.inspect.learning_figures import objectness_plate, read_plate
from rpn_train.inspect.walk import walk
from rpn_train.method_targets import method_at
from rpn_train.options import differences, to_mapping
from rpn_train.recall import Recall
from rpn_train.recall_report import recall_curves, recall_table
from rpn_train.run_log import RunLog, memory_mb, write_json, write_yaml
from rpn_train.run_state import RunState, save
from rpn_train.step import HISTORY, Clock
from rpn_train.stop import StopRequest
from rpn_train.targets import Picks


def record_run(folder: Path, cfg: TrainConfig, ranks: Ranks) -> None:
    """Write what is run, and on what: `config.yaml`, which a run goes on with, and the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "config.yaml", to_mapping(cfg))
    write_json(folder / "environment.json", environment(ranks))


def describe_run(
    log: RunLog,
    cfg: TrainConfig,
    state: RunState,
    changed: dict[str, str],
    index: Index,
    val_index: Index,
    caches: Sequence[ImageCache],
    ranks: Ranks,
) -> None:
    """A few lines on what is about to be trained, on what, and for how long."""
    schedule, grid = cfg.schedule, state.model.grid
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    start = f"weights {cfg.backbone.weights}" if cfg.backbone.weights else "from scratch"
    start = f"from {cfg.init_from}" if cfg.init_from else start
    rate = schedule.lr * schedule.batch_size / schedule.reference_batch
    log.line(
        f"network   {cfg.backbone.name}, {start}, {trained / 1e6:.1f} M trained parameters, "
        f"{grid.per_cell} anchors per cell on strides {', '.join(map(str, grid.strides))}"
    )
    for name, split in (("training", index), (cfg.eval.split, val_index)):
        objects = int((~split.ignore).sum())
        ignored = f", {int(split.ignore.sum())} ignored" if split.ignore.any() else ""
        log.line(f"{name:<9} {len(split)} images, {objects} objects{ignored}")
        if split.left_out:
            log.line(f"          left out: {counted(split.left_out)}; {FILE_NAME} names them")
    if caches:
        kept, rows = sum(c.num_kept for c in caches), sum(c.num_rows for c in caches)
        size = sum(c.num_bytes for c in caches) / 1e9
        where = f" in the first of {ranks.world} processes" if ranks.world > 1 else ""
        log.line(f"cached    {kept} of {rows} images, {size:.2g} GB{where}")
    log.line(
        f"schedule  {log.total} steps of {schedule.batch_size} images, {schedule.optimizer}, rate "
        f"{schedule.lr:g} x {schedule.batch_size} / {schedule.reference_batch} = {rate:g}"
    )
    compiled = ", compiled (the first steps take long)" * cfg.compile
    log.line(f"device    {device_name(ranks.device)} x {ranks.world}, {cfg.precision}{compiled}")
    if state.step:
        log.line(f"resuming  after step {state.step}")
    for key, change in changed.items():
        log.line(f"          changed: {key}: {change}")
    options = [f"    {key}: {value}" for key, value in flatten(to_mapping(cfg)).items()]
    log.text("config", "\n".join(options))


def log_step(
    log: RunLog,
    state: RunState,
    cfg: TrainConfig,
    lr: float,
    clock: Clock,
    device: torch.device,
) -> None:
    """Means of the steps since the last time, and how fast they went."""
    rows = np.array(state.history)
    done = rows[np.isfinite(rows).all(axis=1)]
    nothing = np.full(len(HISTORY), np.nan)
    means = dict(zip(HISTORY, (done.mean(axis=0) if len(done) else nothing).tolist(), strict=True))
    state.history = []
    loss = means["train/loss_objectness"] + means["train/loss_box"]
    skipped = {"train/skipped": len(rows) - len(done)} if len(done) < len(rows) else {}
    log.metrics(state.step, {"train/loss": loss, **means, "train/lr": lr, **skipped})
    seconds = time.perf_counter() - clock.started
    speed = clock.steps * cfg.schedule.batch_size / seconds
    timing = {
        "train/images_per_s": speed,
        "train/data_wait": clock.waited / seconds,
        "train/memory_mb": memory_mb(device),
    }
    log.timing(state.step, timing | compilations(cfg))
    left = (log.total - state.step) * cfg.schedule.batch_size / speed
    said = f"  {len(rows) - len(done)} steps skipped" if skipped else ""
    shown = f"loss {loss:.4f}  rate {lr:.2g}  {speed:.1f} images/s{said}"
    log.progress(state.step, shown, left)


def compilations(cfg: TrainConfig) -> dict[str, float]:
    """Graphs of the network that have been compiled: more for sizes that none of them serves."""
    if not cfg.compile:
        return {}
    from torch._dynamo.utils import counters  # here, as its import takes a second

    return {"train/compilations": counters["stats"]["unique_graphs"]}


def log_training_batch(
    log: RunLog, batch: Batch, picks: Picks, grid: AnchorGrid, step: int
) -> None:
    """The first image of a training batch with the positive anchors that the loss read.

    Those of a cascade where they were before its first stage moved them.
    """
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    height, width = batch.sizes[0].tolist()
    picture = draw_anchors(
        batch.images[0, :, :height, :width].cpu(),
        gt_boxes=batch.gt_boxes[0, batch.gt_valid[0]].cpu(),
        positives=anchors[picks.at[0, picks.positive[0]]].cpu(),
    )
    log.image("train/positives", step, picture)


def log_evaluation(
    log: RunLog,
    report: DataReport,
    state: RunState,
    cfg: TrainConfig,
    batches: EvalBatches,
    folder: Path,
    stop: StopRequest,
    ranks: Ranks,
) -> None:
    """Evaluate, tell and keep the result; nothing of it if a stop was requested meanwhile."""
    started = time.perf_counter()
    found = evaluate(state.judged, batches, cfg, stop, ranks)
    if found is None:
        return
    state.evaluated = state.step
    if not ranks.is_main:
        return
    report.note("evaluation", [Unread(one.row, one.fault) for one in found if one.fault])
    recall = score(as_arrays(found, batches.index), batches.index, cfg.eval)
    figures = recall.figures()
    log.metrics(state.step, {f"val/{k}": v for k, v in figures.items() if not k.startswith("num_")})
    log_pictures(log, recall, found, batches, cfg, state.step)
    if cfg.eval.pictures and not found[0].fault:
        log_walk(log, state, batches, cfg, state.step / log.total)
    write_json(folder / "recall.json", {"step": state.step, **figures})
    shown = "  ".join(f"AR@{n} {figures[f'ar_{n}']:.4f}" for n in cfg.eval.max_proposals)
    log.line(f"step {state.step}: {shown}  ({time.perf_counter() - started:.1f} s)")
    if figures["ar_100"] > state.best_ar_100:
        state.best_ar_100 = figures["ar_100"]
        save(state, cfg, folder, ranks, "best")


def log_pictures(
    log: RunLog,
    recall: Recall,
    found: list[ImageProposals],
    batches: EvalBatches,
    cfg: TrainConfig,
    step: int,
) -> None:
    """The curves of recall, and some images, the same each time, with their best proposals."""
    index, count = batches.index, cfg.eval.pictures
    if count:
        for name, picture in recall_curves({"": recall}, cfg.eval.protocol).items():
            log.image(f"curves/{name}", step, picture)
    for row in np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int)):
        if found[row].fault:
            continue
        objects = slice(index.box_offsets[row], index.box_offsets[row + 1])
        rank = recall.matched_rank[0, 0, objects]  # at IoU 0.5, all sizes
        picture = draw_detections(
            batches.read(int(row)),
            gt_boxes=torch.from_numpy(index.boxes_xyxy(row)),
            gt_ignore=torch.from_numpy(index.ignored(row)),
            proposals=torch.from_numpy(found[row].boxes[:DRAWN_PROPOSALS]),
            # by rank: early in a run all scores are low, and nothing would be seen
            scores=torch.linspace(1, 0.4, len(found[row].logits[:DRAWN_PROPOSALS])),
            found=torch.from_numpy((rank >= 0) & (rank < DRAWN_PROPOSALS)),
        )
        log.image(f"proposals/{index.file_name(row)}", step, picture)


def log_walk(
    log: RunLog, state: RunState, batches: EvalBatches, cfg: TrainConfig, progress: float
) -> None:
    """Of the first image: objectness on every level, and at the anchors that the loss would read.

    Where they follow from the boxes alone always the same ones, to be watched over time.

    Args:
        progress: share of the run that is done, 0..1.
    """
    cfg = replace(cfg, method=method_at(cfg.method, progress))
    seen = walk(state.judged, batches.index, batches.read, 0, cfg, truth=True, seed=cfg.seed)
    for plate in (objectness_plate(seen), read_plate(seen)):
        picture = figure_to_image(plate.figure)
        log.image(f"{plate.name}/{seen.name}", state.step, picture)


def finish_run(
    log: RunLog, state: RunState, cfg: TrainConfig, folder: Path, signal: int | None
) -> None:
    """Last lines: what came out, or how to go on."""
    if state.step < log.total and signal is not None:
        log.line(
            f"stopped by signal {signal} after step {state.step} of {log.total}; go on with: "
            f"rpn-train output_dir={folder} resume=auto"
        )
    elif log.enabled:
        changed = differences(to_mapping(TrainConfig()), to_mapping(cfg))
        options = flatten(to_mapping(cfg))
        log.hparams({key: options[key] for key in changed}, {"val/best_ar_100": state.best_ar_100})
        last = folder / "recall.json"
        if last.is_file():
            log.line(recall_table(json.loads(last.read_text(encoding="utf-8"))))
        log.line(f"best AR@100 {state.best_ar_100:.4f}; weights in {folder / 'checkpoints'}")
        log.line(f"look at it: tensorboard --logdir {folder / 'tensorboard'}")


def environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, device and commit, for the record."""
    packages = ("rpn-train", "torch", "torchvision", "pycocotools", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": device_name(ranks.device),
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of the source tree this runs from, '+' if it was changed; None outside of one."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run(
            (*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True
        )
        dirty = subprocess.run((*git, "diff", "--quiet", "HEAD"), capture_output=True)
    except OSError:  # no git
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "") if head.returncode == 0 else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mapping -> full key: value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{path}{key}."))
        else:
            flat[path + key] = value
    return flat
