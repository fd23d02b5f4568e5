"""A trained network, wherever it comes from: a run, a checkpoint, a detector of torchvision's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rpn_train import checkpoint
from rpn_train.build import build_model
from rpn_train.config import TrainConfig
from rpn_train.detectors import read_detector
from rpn_train.model import RPN
from rpn_train.options import from_mapping, to_mapping
from rpn_train.weights import norms_fit

_TORCHVISION = "torchvision:"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights of a network and how it was made.

    name: what errors and reports call it. config: the whole configuration, plain. weights: those of
    `RPN`, averaged where the run averaged. step: steps trained, None if it does not say. folder:
    where results on it go unless something else is said.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    step: int | None
    folder: Path

    @property
    def brings_data(self) -> bool:
        """Whether the configuration says what the network was trained on."""
        return not self.name.startswith(_TORCHVISION)


def find_pretrained(where: str) -> Pretrained:
    """Read a run folder, a checkpoint or `torchvision:<builder>[:<weights name or file>]`.

    Raises:
        CheckpointError: nothing is there, or something else.
        ConfigError: no such builder.
    """
    if where.startswith(_TORCHVISION):
        builder, _, weights = where.removeprefix(_TORCHVISION).partition(":")
        changes, state = read_detector(builder, weights or None)
        config = to_mapping(TrainConfig())
        for section, values in changes.items():
            config[section].update(values)
        return Pretrained(where, config, state, None, Path(f"{builder}_recall"))
    path = checkpoint.find(Path(where).expanduser())
    saved = checkpoint.load(path)
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    config = {**saved["config"], "output_dir": None, "init_from": None}
    weights = saved["ema"] or saved["model"]
    return Pretrained(str(path), config, weights, saved["step"], run / "eval")


def trained_model(cfg: TrainConfig, source: Pretrained) -> RPN:
    """The network with the weights of `source`, for evaluation, on the CPU.

    Raises:
        CheckpointError: the weights are of another network than `cfg` describes.
    """
    # weights to start from are not needed any more, and may not be there
    cfg = replace(cfg, backbone=replace(cfg.backbone, weights=None))
    model = build_model(cfg)
    checkpoint.load_weights(model, norms_fit(model, source.weights), source.name)
    return model.eval()


def stored_config(source: Pretrained) -> TrainConfig:
    """The configuration of `source`, checked."""
    return from_mapping(TrainConfig, source.config)
