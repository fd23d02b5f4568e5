"""Logs that a resumed run continues, tables, and files written whole."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rpn_train.recall import ObjectArrays, ProposalArrays, score_recall
from rpn_train.recall_report import recall_table
from rpn_train.report import flatten
from rpn_train.run_log import RunLog, truncate_lines, write_json


def test_metrics_go_to_a_line_and_to_tensorboard_under_the_same_key(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total=10, first=1)
    log.metrics(4, {"train/loss": 0.5, "val/ar_100_large": math.nan})
    log.timing(4, {"train/images_per_s": 7.0})
    log.image("proposals/a", 4, torch.zeros(3, 5, 6, dtype=torch.uint8))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 4, "train/loss": 0.5, "val/ar_100_large": None}  # strict JSON
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/images_per_s"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 0.5)]
    assert events.Images("proposals/a")[0].height == 5


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None, total=10, first=1)
    log.line("no")
    log.metrics(1, {"train/loss": 1.0})
    log.progress(1, "no", 1.0)
    log.advance()
    log.close()
    assert capsys.readouterr() == ("", "")


def test_lines_to_be_written_again_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_lines(path, lambda line: line["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_lines(tmp_path / "absent.jsonl", lambda line: True)
    assert not (tmp_path / "absent.jsonl").exists()


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "recall.json", {"ar_100": 0.25, "ar_100_small": math.nan})
    assert json.loads((tmp_path / "recall.json").read_text()) == {
        "ar_100": 0.25,
        "ar_100_small": None,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["recall.json"]


def test_the_table_shows_each_size_and_a_dash_where_there_is_no_object() -> None:
    boxes = np.array([[0.0, 0, 20, 20], [50, 50, 200, 200]])
    objects = ObjectArrays(boxes, boxes[:, 2] * boxes[:, 3], np.zeros(2, bool), np.array([0, 2]))
    proposals = ProposalArrays(boxes[1:], np.ones(1), np.array([0, 1]))
    figures = score_recall(proposals, objects, max_proposals=(5,)).figures()
    table = recall_table(figures).splitlines()
    assert table[0].split() == "AR small medium large IoU .5 IoU .7 IoU .75".split()  # noqa: SIM905
    assert table[1].split() == ["@5", "0.5000", "0.0000", "-", "1.0000", *["0.5000"] * 3]
    assert table[-1].split() == ["objects", "2", "1", "0", "1"]


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": [2]}}}) == {"a": 1, "b.c.d": [2]}
