"""The command `rpn-eval`: the recall of a trained network on a split."""

from pathlib import Path
from typing import Any

from rpn_train import checkpoint
from rpn_train.build import build_eval_batches, build_model, open_split
from rpn_train.config import TrainConfig
from rpn_train.distributed import Ranks
from rpn_train.evaluate import evaluate, score
from rpn_train.report import recall_table
from rpn_train.run_log import write_json
from rpn_train.stop import stop_on_signals


def evaluate_checkpoint(
    cfg: TrainConfig, saved: dict[str, Any], path: Path, folder: Path, ranks: Ranks
) -> None:
    """Score a checkpoint on `cfg.eval.split`, print the table and write recall.json to `folder`.

    Averaged weights are scored where the checkpoint has some.

    Raises:
        UserError: a fault of the data or of the checkpoint.
    """
    index, read = open_split(cfg.dataset, cfg.eval.split, cfg.seed)
    model = build_model(cfg)
    checkpoint.load_weights(model, saved["ema"] or saved["model"], path)
    model.to(ranks.device).eval()
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), ranks)
    with stop_on_signals() as stop:
        found = evaluate(model, batches, cfg, stop, ranks)
    if found is None or not ranks.is_main:
        return
    recall = score(found, index, cfg.eval.max_proposals)
    print(f"{path}, step {saved['step']}, {len(index)} images of {cfg.eval.split}")
    figures = recall.figures()
    print(recall_table(figures))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recall.json", {"step": saved["step"], **figures})
    print(f"written to {folder / 'recall.json'}")
