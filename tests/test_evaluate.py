"""Evaluation end to end: the figures are COCOeval's and do not depend on how images are batched."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rpn_train.build import build_eval_batches, build_model
from rpn_train.config import TrainConfig
from rpn_train.distributed import Ranks
from rpn_train.evaluate import ImageProposals, as_arrays, evaluate, score
from rpn_train.options import from_mapping
from rpn_train.recall import boxes_to_xywh
from rpn_train.splits import open_split
from rpn_train.stop import StopRequest

ONE = Ranks(0, 1, torch.device("cpu"))


def config(data_root: Path, batch_size: int = 8, name: str = "coco_mini") -> TrainConfig:
    """Real images at a size that a CPU scores in seconds."""
    split = "val2017" if name == "coco_mini" else "val"
    return from_mapping(
        TrainConfig,
        {
            "workers": 0,
            "image": {"short_side": 64, "max_side": 96},
            "anchors": {"sizes": [[8], [16], [32], [64], [128]]},
            "dataset": {
                "format": name[:4].removesuffix("_"),
                "root": str(data_root / name),
                "val": {"split": split},
            },
            "eval": {"batch_size": batch_size, "max_proposals": [10, 100]},
        },
    )


def propose(cfg: TrainConfig) -> tuple[list[ImageProposals], object]:
    index, read = open_split(cfg, "val", "score")
    model = build_model(cfg).eval()
    batches = build_eval_batches(cfg, index, read, 64, ONE)
    found = evaluate(model, batches, cfg, StopRequest(), ONE)
    assert found is not None
    return found, index


def test_figures_are_those_of_cocoeval(data_root: Path) -> None:
    """Real images, crowds and all, with the proposals of an untrained network."""
    cfg = config(data_root)
    found, index = propose(cfg)
    ours = score(as_arrays(found, index), index, cfg.eval).recall
    results = [
        {"image_id": int(index.image_ids[f.row]), "category_id": 1, "bbox": box, "score": s}
        for f in found
        for box, s in zip(boxes_to_xywh(f.boxes).tolist(), f.logits.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(data_root / "coco_mini" / "annotations" / "instances_val2017.json")
        scorer = COCOeval(truth, truth.loadRes(results), "bbox")
        scorer.params.useCats = 0
        scorer.params.maxDets = list(cfg.eval.max_proposals)
        scorer.evaluate()
        scorer.accumulate()
    theirs = scorer.eval["recall"][:, 0]  # [T, A, N]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert 0.01 < ours[:, 0, 1].mean() < 0.9  # there was something to compare


def test_proposals_do_not_depend_on_the_batch_size(data_root: Path) -> None:
    one, _ = propose(config(data_root, 1, "voc_mini"))
    many, _ = propose(config(data_root, 8, "voc_mini"))
    for a, b in zip(one, many, strict=True):
        assert a.row == b.row
        # a different order of sums may swap two proposals of nearly equal logit: compare the best
        np.testing.assert_allclose(b.logits[:50], a.logits[:50], atol=1e-4)


def test_a_stop_request_ends_an_evaluation(data_root: Path) -> None:
    cfg = config(data_root)
    index, read = open_split(cfg, "val", "score")
    stop = StopRequest()
    stop.signal = 15
    batches = build_eval_batches(cfg, index, read, 64, ONE)
    assert evaluate(build_model(cfg), batches, cfg, stop, ONE) is None


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_of_the_model(data_root: Path, training: bool) -> None:
    cfg = config(data_root)
    index, read = open_split(cfg, "val", "score")
    stop = StopRequest()
    stop.signal = 15  # after the first image
    model = build_model(cfg).train(training)
    evaluate(model, build_eval_batches(cfg, index, read, 64, ONE), cfg, stop, ONE)
    assert model.training is training
