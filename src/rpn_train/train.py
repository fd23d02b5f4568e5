"""The run. `train` reads from top to bottom: build, loop, evaluate, save."""

from contextlib import closing
from functools import partial
from pathlib import Path

from rpn_train.build import add_caches, build_eval_batches, build_planner, build_train_batches
from rpn_train.checkpoint import kept
from rpn_train.config import TrainConfig
from rpn_train.data.loading import load
from rpn_train.data_report import DataReport
from rpn_train.distributed import Ranks
from rpn_train.report import (
    describe_run,
    finish_run,
    log_evaluation,
    log_step,
    log_training_batch,
    record_run,
)
from rpn_train.run_log import RunLog
from rpn_train.run_state import build_state, last_of, resume, save
from rpn_train.schedule import lr_at
from rpn_train.splits import open_split
from rpn_train.step import Clock, drain, prepare_network, training_step
from rpn_train.stop import stop_on_signals


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step % every == 0 or step == last


def train(cfg: TrainConfig, folder: Path, ranks: Ranks) -> int | None:
    """Train in a run folder; go on from its last checkpoint if it has one.

    Returns:
        None when the run is complete, else the signal that stopped it.

    Raises:
        UserError: a fault of the configuration, the data or the checkpoint, or a loss that is not
            finite.
    """
    index, read = open_split(cfg, "train", "train")
    val_index, val_read = open_split(cfg, cfg.eval.split, "score")
    initial = cfg.init_from is None and not kept(last_of(folder))
    state = build_state(cfg, ranks.device, initial=initial)
    divisor = max(state.model.grid.strides)
    planner = build_planner(cfg, index, divisor)
    epoch = planner.steps_per_epoch
    total = cfg.schedule.steps or max(1, round(cfg.schedule.epochs * epoch))
    eval_every, save_every = cfg.eval_every or epoch, cfg.save_every or epoch
    changed = resume(state, cfg, folder, ranks)
    first, pieces = state.step + 1, cfg.schedule.accumulate
    if ranks.is_main:  # not before: a folder that cannot be resumed stays as it was
        record_run(folder, cfg, ranks)
    main_folder = folder if ranks.is_main else None
    log = RunLog(main_folder, total=total, first=first)
    eval_batches = build_eval_batches(cfg, val_index, val_read, divisor, ranks)
    batches = build_train_batches(cfg, index, read, planner, ranks)
    caches = add_caches(cfg, batches, eval_batches, folder, ranks)
    describe_run(log, cfg, state, changed, index, val_index, caches, ranks)
    limit, resumed = cfg.data.max_bad_fraction, state.step > 0
    report = DataReport(log, main_folder, index, val_index, limit, resumed=resumed)
    network = prepare_network(state.model, cfg, ranks)
    keys = range((first - 1) * pieces, total * pieces)
    loader = load(batches, keys, workers=cfg.workers, pin=ranks.device.type == "cuda")
    clock = Clock()
    with closing(log), closing(loader), stop_on_signals() as stop:
        judge = partial(log_evaluation, log, report, state, cfg, eval_batches, folder, stop, ranks)
        owed = due(state.step, eval_every, total) if state.step else cfg.eval_at_start
        if owed and state.evaluated < state.step:
            judge()
            if state.step:
                save(state, cfg, folder, ranks)
        for step in range(first, total + 1):
            lr = lr_of(cfg, step, total)
            done = (step - 1) / total
            batch, picks = training_step(state, network, loader, cfg, lr, done, clock, ranks)
            log.advance()
            stopping = ranks.any(bool(stop))
            evaluates = due(step, eval_every, total) and not stopping
            saves = due(step, save_every, total) or evaluates or stopping
            if due(step, cfg.log_every, total) or saves:
                drain(state, cfg, planner, index, lr, ranks)  # waits for the device
                for unread in ranks.gather(clock.take_unread()) or []:
                    report.note("training", unread)
            if due(step, cfg.log_every, total):
                log_step(log, state, cfg, lr, clock, ranks.device)
                clock = Clock()
            if saves:
                save(state, cfg, folder, ranks)
            if evaluates:
                log_training_batch(log, batch, picks, state.model.grid, step)
                judge()
                save(state, cfg, folder, ranks)
                clock = Clock()
            if stopping:
                break
        finish_run(log, state, cfg, folder, stop.signal)
    return stop.signal if state.step < total else None


def lr_of(cfg: TrainConfig, step: int, total: int) -> float:
    """The rate of a step, scaled linearly to the batch size (Goyal et al. 2017)."""
    schedule = cfg.schedule
    return lr_at(
        step,
        total=total,
        peak=schedule.lr * schedule.batch_size / schedule.reference_batch,
        warmup=schedule.warmup,
        decay=schedule.decay,
        milestones=schedule.milestones,
        gamma=schedule.gamma,
    )
