"""A trained RPN for use from Python: images in, proposals out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from rpn_train.build import build_eval_batches
from rpn_train.config import TrainConfig
from rpn_train.data.files import index_images
from rpn_train.data.transforms import read_image
from rpn_train.detectors import Transfer, load_into
from rpn_train.distributed import Ranks
from rpn_train.errors import DataError
from rpn_train.evaluate import propose_split
from rpn_train.model import RPN
from rpn_train.options import from_mapping, to_mapping
from rpn_train.pretrained import find_pretrained, stored_config, trained_model
from rpn_train.proposals import Proposals


def load(checkpoint: str | Path, *, device: str = "cpu", top: int | None = None) -> "Proposer":
    """A trained network, ready to propose.

    Args:
        checkpoint: a run folder, a checkpoint in one, or `torchvision:<builder>[:<weights>]`.
        device: "cpu", "cuda", "cuda:1" ...
        top: most proposals of an image; None: as the run says (2000 if it does not).

    Raises:
        UserError: there is no such network; the message says what was expected.
    """
    source = find_pretrained(str(checkpoint))
    values = to_mapping(stored_config(source))
    values["workers"] = 0
    if top is not None:
        values["proposals"]["test"]["post_nms"] = top
        values["eval"] = {**values["eval"], "split": "val", "max_proposals": [top]}
    cfg = from_mapping(TrainConfig, values)
    return Proposer(trained_model(cfg, source).to(device), cfg, torch.device(device))


class Proposer:
    """A network with the sizes and numbers it proposes with.

    Attributes:
        network: the `RPN`, in evaluation mode.
        cfg: the configuration it was trained with.
    """

    def __init__(self, network: RPN, cfg: TrainConfig, device: torch.device) -> None:
        self.network, self.cfg, self.device = network, cfg, device

    def propose(self, images: Sequence[str | Path | Tensor | ArrayLike]) -> list[Proposals]:
        """Proposals of each image, best first, in its pixels, on the CPU: those of `rpn-propose`.

        Images are resized as in training (`cfg.image`), padded each as if alone, and computed in
        batches of `cfg.eval.batch_size`.

        Args:
            images: each a file, turned upright as EXIF says; an RGB uint8 tensor [3, H, W]; or
                anything that numpy sees as RGB uint8 [H, W, 3], such as a PIL image.

        Raises:
            DataError: one of them is none of these.
        """
        if not len(images):
            return []
        pixels = [_pixels(image, i) for i, image in enumerate(images)]
        index = index_images([tuple(image.shape[1:]) for image in pixels])
        divisor = max(self.network.grid.strides)
        ranks = Ranks(0, 1, self.device)
        batches = build_eval_batches(self.cfg, index, pixels.__getitem__, divisor, ranks)
        found = propose_split(self.network, batches, self.cfg, self.device)
        in_order = sorted(found, key=lambda image: image.row)
        return [Proposals(torch.from_numpy(f.boxes), torch.from_numpy(f.logits)) for f in in_order]

    def load_into(self, detector: FasterRCNN) -> Transfer:
        """Copy backbone and RPN into a detector of torchvision's (see `detectors.load_into`)."""
        return load_into(detector, self.network)


def _pixels(image: Any, number: int) -> Tensor:
    if isinstance(image, str | Path):
        return read_image(Path(image), upright=True)
    if isinstance(image, Tensor):
        pixels, axis = image.cpu(), 0
    else:
        array = np.asarray(image)
        numbers = array.dtype == np.uint8  # torch does not know all that numpy does
        pixels, axis = torch.from_numpy(array.copy()) if numbers else torch.zeros(0), 2
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[axis] != 3:
        raise DataError(
            f"image {number}: expected a file, an RGB uint8 tensor [3, H, W] or array [H, W, 3], "
            f"got {type(image).__name__} {tuple(getattr(image, 'shape', ()))} "
            f"{getattr(image, 'dtype', getattr(image, 'mode', ''))}"
        )
    return pixels if axis == 0 else pixels.permute(2, 0, 1).contiguous()
