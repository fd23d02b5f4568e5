"""Pretrained weights of classification networks: found, read and fitted to a body."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from rpn_train.errors import CheckpointError


def read_weights(arch: str, weights: str, *, key: str = "backbone.weights") -> dict[str, Tensor]:
    """Read the state dict that a file holds or a name of torchvision's stands for.

    Args:
        arch: a network or detector of torchvision's.
        weights: a file, or a name of torchvision's for weights of `arch`.
        key: what errors call it.

    Raises:
        CheckpointError: neither, or it cannot be read or downloaded.
    """
    named = get_model_weights(arch).__members__
    if weights not in named:
        if not Path(weights).is_file():
            expected = " | ".join(map(repr, named))
            raise CheckpointError(f"{key}: expected {expected} or a file, got '{weights}'")
        return _read_state_dict(Path(weights), key)
    url = named[weights].url
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if path.is_file():
        return _read_state_dict(path, key)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network; a wrong hash
        raise CheckpointError(
            f"{key}: '{weights}' is not at {path} and cannot be downloaded ({error}): "
            f"put {path.name} there, or give a file instead of the name"
        ) from error


def _read_state_dict(path: Path, what: str) -> dict[str, Tensor]:
    """Read a file that holds nothing but names and tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can break the reader in any way
        raise CheckpointError(
            f"{what}: expected a state dict, cannot read {path} ({type(error).__name__})"
        ) from error
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise CheckpointError(
            f"{what}: expected a state dict, names to tensors and no more, in {path}"
        )
    return state


def load_body(body: nn.ModuleDict, state: Mapping[str, Tensor], *, trunk: str, what: str) -> None:
    """Copy the weights of the body's own children; those of a classifier, say, are left over."""
    children = tuple(f"{trunk}.{child}.".removeprefix(".") for child in body)
    whole = nn.ModuleDict({trunk: body}) if trunk else body
    try:
        whole.load_state_dict({k: v for k, v in state.items() if k.startswith(children)})
    except RuntimeError as error:
        reasons = "; ".join(textwrap.shorten(line, 150) for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"backbone.weights: cannot load {what}: {reasons}") from error


_COUNTER = "num_batches_tracked"


def norms_fit(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a module whose batch norms may be frozen where the others' were not, or not.

    They differ in a counter that nothing depends on: it is left out, or kept as the module has it.
    """
    known = module.state_dict()
    fitting = {k: v for k, v in weights.items() if k in known or not k.endswith(_COUNTER)}
    return {k: v for k, v in known.items() if k.endswith(_COUNTER)} | fitting
