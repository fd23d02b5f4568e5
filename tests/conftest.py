"""Where the tests find the real images, and what happens where there are none."""

import os
from pathlib import Path

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
