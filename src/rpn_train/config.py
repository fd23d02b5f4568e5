"""Every option of the program: its default, type, legal range and meaning, each in one place.

Files in `configs/` and what a person types hold only differences from this. Lengths are in pixels
of the resized image, shares are 0..1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rpn_train.backbones import Pyramid
from rpn_train.data.headers import MAX_PIXELS
from rpn_train.errors import ConfigError
from rpn_train.method_config import MethodConfig
from rpn_train.options import option


@dataclass(frozen=True)
class SplitConfig:
    split: str | None = option(None, "name: coco 'train2017', voc 'trainval' (ImageSets/Main)")
    images: str | None = option(None, "image folder; null: from root")
    annotations: str | None = option(None, "COCO file or VOC XML folder; null: from root")


@dataclass(frozen=True)
class ShapesConfig:
    size: tuple[int, int] = option((128, 128), "height and width of a drawn image, px", low=32)
    train_images: int = option(1600, "different training images", low=1)
    val_images: int = option(200, "different validation images", low=1)
    max_objects: int = option(8, "most objects in one image", low=1)
    extents: tuple[float, float] = option(
        (0.08, 0.75),
        "smallest and largest object, as shares of the image's shorter side",
        above=0,
        high=1,
    )
    clutter: bool = option(
        False, "draw distractors that are not objects, and hide more of the objects"
    )


@dataclass(frozen=True)
class DatasetConfig:
    format: Literal["shapes", "coco", "voc"] = option("shapes", "how images and boxes are stored")
    root: str | None = option(None, "folder in the standard layout of the format")
    train: SplitConfig = SplitConfig()
    val: SplitConfig = SplitConfig()
    shapes: ShapesConfig = ShapesConfig()
    categories: tuple[str, ...] | None = option(None, "keep only these categories; null: all")
    cache: str | None = option(
        None, "folder where large COCO annotations are kept as arrays; null: ~/.cache/rpn-train"
    )
    keep_empty: bool = option(True, "train on images without objects too, as background")


@dataclass(frozen=True)
class DataConfig:
    on_error: Literal["skip", "raise"] = option(
        "skip", "faulty boxes and images: leave them out and name them, or stop at the first"
    )
    max_bad_fraction: float = option(
        0.01, "a larger share of images that cannot be used is an error", low=0, high=1
    )
    exif: Literal["ignore", "apply"] = option(
        "ignore", "orientation in image files: boxes refer to pixels as stored, or as turned"
    )
    max_pixels: int = option(
        MAX_PIXELS, "larger images are faulty (bombs; Pillow's limit)", low=1, high=MAX_PIXELS
    )
    cache: Literal["ram", "disk"] | None = option(
        None, "in training, keep resized images for the next epoch: in memory or the run folder"
    )
    cache_gb: float = option(8.0, "at most so much of them, 1e9 bytes over all processes", above=0)


@dataclass(frozen=True)
class ImageConfig:
    short_side: int = option(800, "shorter side after resizing, px", low=16)
    max_side: int = option(1333, "longer side after resizing at most, px", low=16)


@dataclass(frozen=True)
class AugmentConfig:
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    scale: tuple[float, float] = option(
        (1.0, 1.0), "short_side is multiplied by a number drawn from this range", above=0, high=4
    )
    photometric: float = option(
        0.0, "probability of brightness, contrast, saturation and hue jitter", low=0, high=1
    )


@dataclass(frozen=True)
class BackboneConfig:
    name: str = option("resnet18_fpn", "network, e.g. resnet50_fpn, vgg16, timm:<name>")
    weights: str | None = option(
        None, "torchvision weights name (IMAGENET1K_V1), a file, or null: from scratch"
    )
    frozen_stages: int = option(
        0, "stages that do not train: 1 the stem, 2 also the first residual stage", low=0
    )
    norm: Literal["bn", "frozen_bn", "sync_bn", "gn"] = option(
        "bn", "normalisation; frozen_bn belongs to pretrained weights and small batches"
    )
    norm_eps: float | None = option(
        None, "added to the variance by batch norm; null: as the network was made", low=0
    )
    pyramid: Pyramid = option(
        "p2_p6", "levels of the feature pyramid: strides 4 to 64, or 8 to 128 (RetinaNet)"
    )
    fpn_norm: Literal["bn", "frozen_bn", "sync_bn", "gn"] | None = option(
        None, "normalisation of the feature pyramid; null: none (the paper)"
    )


@dataclass(frozen=True)
class AnchorsConfig:
    sizes: tuple[tuple[float, ...], ...] = option(
        ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
        "square roots of anchor areas, px: one list for each level, or one for all",
        above=0,
    )
    ratios: tuple[float, ...] = option((0.5, 1.0, 2.0), "height / width", above=0)
    strides: tuple[int, ...] | None = option(
        None, "distance of neighbouring anchors of each level, px; null: the backbone's", low=1
    )
    rounded: bool = option(
        True, "cell anchors in whole pixels as in torchvision (needed to exchange weights)"
    )


@dataclass(frozen=True)
class TopNConfig:
    pre_nms: int = option(1000, "proposals of each level and image that go into NMS", low=1)
    post_nms: int = option(1000, "proposals of each image that are kept", low=1)


@dataclass(frozen=True)
class ProposalsConfig:
    nms_iou: float = option(0.7, "of two proposals above this IoU the weaker goes", low=0, high=1)
    min_size: float = option(0.001, "smaller proposals are dropped, px of the resized image", low=0)
    train: TopNConfig = TopNConfig(2000, 2000)
    test: TopNConfig = TopNConfig(1000, 2000)


@dataclass(frozen=True)
class ScheduleConfig:
    epochs: float = option(12.0, "length of the run in passes over the training images", above=0)
    steps: int | None = option(None, "length of the run in steps; overrides epochs", low=1)
    batch_size: int = option(16, "images per step, over all processes and accumulation", low=1)
    accumulate: int = option(1, "pieces a step's batch is computed in, to save memory", low=1)
    lr: float = option(0.02, "learning rate at the reference batch", low=0)
    reference_batch: int = option(
        16, "linear scaling: the rate used is lr * batch_size / this", low=1
    )
    optimizer: Literal["sgd", "adamw"] = option("sgd", "torch's own")
    momentum: float = option(0.9, "of SGD; the first beta of AdamW", low=0, high=1)
    weight_decay: float = option(1e-4, "of weights; norms and biases have none", low=0)
    warmup: float = option(0.01, "share of the run in which the rate rises linearly", low=0, high=1)
    decay: Literal["multistep", "cosine", "constant"] = option("multistep", "after the warm-up")
    milestones: tuple[float, ...] = option(
        (2 / 3, 11 / 12), "shares of the run at which multistep lowers the rate", low=0, high=1
    )
    gamma: float = option(0.1, "by this factor", above=0, high=1)
    clip_norm: float | None = option(None, "largest gradient norm; null: no clipping", above=0)
    ema: float | None = option(
        None, "decay of averaged weights used in evaluation; null: none", above=0, high=1
    )


@dataclass(frozen=True)
class EvalConfig:
    split: Literal["train", "val"] = option("val", "which split of the data set is scored")
    max_proposals: tuple[int, ...] = option(
        (10, 100, 300, 1000, 2000), "the N of recall@N; training needs 100 among them", low=1
    )
    protocol: Literal["coco", "greedy"] = option(
        "coco", "how proposals and objects are matched: as COCOeval does, or by IoU alone"
    )
    match: Literal["id", "file_name"] = option(
        "id", "how the entries of a proposal file name their images"
    )
    batch_size: int = option(
        8, "images per process at a time; the figures do not depend on it", low=1
    )
    pictures: int = option(
        8, "validation images drawn in TensorBoard; by rpn-eval, of those with most misses", low=0
    )
    verify: bool = option(False, "rpn-eval: score a second time, with pycocotools, and compare")


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a run."""

    name: str = option("rpn", "part of the default folder name")
    output_dir: str | None = option(None, "run folder; null: runs/<date>_<time>_<name>")
    resume: Literal["auto"] | None = option(None, "auto: go on with the run in output_dir")
    init_from: str | None = option(
        None, "trained network to start from: run folder, checkpoint, torchvision:<builder>"
    )
    seed: int = option(
        0, "weights, order, augmentation and sampling follow from it", low=0, high=2**32 - 1
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")
    devices: int | None = option(None, "processes, one per GPU; null: all GPUs of the box", low=1)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the network (autocast)")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(True, "memory layout of the network")
    workers: int = option(2, "loader processes per training process; 0: none", low=0)
    log_every: int = option(20, "steps", low=1)
    eval_every: int | None = option(None, "steps; null: once per epoch", low=1)
    save_every: int | None = option(None, "steps; null: once per epoch", low=1)
    keep_checkpoints: int = option(
        2, "newest checkpoints that stay: last.pt, last.1.pt (which stands in for it) ...", low=1
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "a step whose gradient is not finite ends the run, or is left out (always in fp16)"
    )
    max_skipped: int = option(20, "steps in a row that may be left out", low=1)
    eval_at_start: bool = option(True, "score the untrained network first, as the baseline")
    dataset: DatasetConfig = DatasetConfig()
    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    backbone: BackboneConfig = BackboneConfig()
    anchors: AnchorsConfig = AnchorsConfig()
    method: MethodConfig = MethodConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        for holds, message in (*self._image_rules(), *self._eval_rules()):
            if not holds:
                raise ConfigError(message)

    def _image_rules(self) -> Iterator[tuple[bool, str]]:
        image, scale, schedule = self.image, self.augment.scale, self.schedule
        yield (
            image.max_side >= image.short_side,
            f"image.max_side: expected at least image.short_side = {image.short_side}, "
            f"got {image.max_side}",
        )
        yield scale[0] <= scale[1], f"augment.scale: expected (lowest, highest), got {scale}"
        yield (
            self.data.cache is None or scale == (1, 1),
            f"augment.scale: expected (1.0, 1.0) with data.cache={self.data.cache}, which keeps "
            f"images at one size, got {scale}; data.cache=null keeps none",
        )
        extents = self.dataset.shapes.extents
        yield (
            extents[0] <= extents[1],
            f"dataset.shapes.extents: expected (lowest, highest), got {extents}",
        )
        yield (
            schedule.batch_size % schedule.accumulate == 0,
            f"schedule.batch_size: expected a multiple of schedule.accumulate = "
            f"{schedule.accumulate}, got {schedule.batch_size}",
        )

    def _eval_rules(self) -> Iterator[tuple[bool, str]]:
        yield (
            not self.eval.verify or self.eval.protocol == "coco",
            "eval.verify: expected false with eval.protocol=greedy, which pycocotools has not",
        )
        of = "train" if self.eval.split == "train" else "test"
        post_nms = getattr(self.proposals, of).post_nms
        most = max(self.eval.max_proposals)
        yield (
            most <= post_nms,
            f"eval.max_proposals: expected at most proposals.{of}.post_nms = {post_nms}, "
            f"got {most}",
        )
