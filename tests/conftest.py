"""What tests share: where they find the real images, and how they interrupt a run."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the networks here are tiny, and test processes run side by side


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with coco_mini, bccd_voc and voc_mini; skipped (an error in CI) where it is absent."""
    root = Path(os.environ.get("RPN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "coco_mini").is_dir():
        message = f"RPN_TEST_DATA: expected a folder with coco_mini, got {root}"
        if os.environ.get("RPN_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return root


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """SIGTERM comes in the middle of a training step."""
    from rpn_train import train  # here, as most tests need no run and its imports take seconds

    plain = train.training_step

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return plain(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_step", interrupted)
        yield
