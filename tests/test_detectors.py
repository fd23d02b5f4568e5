"""Weights that travel: torchvision -> here -> torchvision, with equal proposals on both sides."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

import rpn_train
from rpn_train import Proposer
from rpn_train.build import build_model
from rpn_train.cli import compose_run, guarded
from rpn_train.cli_trained import _eval, _propose
from rpn_train.config import TrainConfig
from rpn_train.detectors import DETECTORS, read_detector
from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.options import from_mapping

SIDES = {"image": {"short_side": 128, "max_side": 192}}


@torch.no_grad()
def spread(backbone: nn.Module, head: nn.Module) -> None:
    """Weights and statistics with which logits and deltas differ widely, but do not saturate."""
    generator = torch.Generator().manual_seed(0)
    for name, value in backbone.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    backbone.eval()
    maps = backbone(torch.stack(images()) / 128 - 1)
    hidden = head.conv(maps["0"] if isinstance(maps, dict) else maps[0])
    for branch, size in ((head.cls_logits, 2.0), (head.bbox_pred, 0.02)):
        nn.init.normal_(branch.weight, generator=generator)
        branch.weight *= size / nn.functional.conv2d(hidden, branch.weight).std()
    # torchvision ranks by probability, which tells logits apart as well as they are if they are low
    nn.init.constant_(head.cls_logits.bias, -10)


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 16, 24, generator=generator)
    fine = nn.functional.interpolate(coarse, size=(128, 192), mode="bilinear")
    return [*(fine * 255).to(torch.uint8)]


@torch.no_grad()
def proposals_of(detector: FasterRCNN, pictures: list[Tensor]) -> list[Tensor]:
    """What its RPN hands to the rest of a detector."""
    kept: list[list[Tensor]] = []
    handle = detector.rpn.register_forward_hook(lambda _module, _input, out: kept.append(out[0]))
    detector.eval()([picture / 255 for picture in pictures])
    handle.remove()
    return kept[0]


def assert_same_proposals(ours: Proposer, detector: FasterRCNN) -> None:
    detector.rpn._pre_nms_top_n["testing"] = ours.cfg.proposals.test.pre_nms
    detector.rpn._post_nms_top_n["testing"] = ours.cfg.proposals.test.post_nms
    expected = proposals_of(detector, images())
    for found, theirs in zip(ours.propose(images()), expected, strict=True):
        assert_same_boxes(found.boxes, theirs)


def assert_same_boxes(found: Tensor, expected: Tensor) -> None:
    """The same to 1e-4 px; the order may differ between logits that are equal up to rounding."""
    assert len(found) == len(expected) > 100
    assert (torch.cdist(found, expected, p=torch.inf).amin(1) < 1e-4).all()
    assert (found - expected).abs().amax(1).lt(1e-4).float().mean() > 0.99


def fpn_detector(norm: type[nn.Module], **options: object) -> FasterRCNN:
    body = resnet18(norm_layer=norm)
    layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    fpn = BackboneWithFPN(body, layers, [64, 128, 256, 512], 256)
    return FasterRCNN(fpn, num_classes=3, min_size=128, max_size=192, **options)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_an_rpn_drops_into_a_detector(norm: str) -> None:
    cfg = from_mapping(TrainConfig, {**SIDES, "workers": 0, "backbone": {"norm": norm}})
    model = build_model(cfg).eval()
    spread(model.backbone, model.rpn["head"])
    ours = Proposer(model, cfg, torch.device("cpu"))
    detector = fpn_detector(FrozenBatchNorm2d)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    loaded, left = ours.load_into(detector)
    assert {*loaded} == {key for key in before if key.startswith(("backbone.", "rpn."))}
    assert [*left] == [key for key in before if key.startswith("roi_heads.")]
    for key in left:
        assert torch.equal(detector.state_dict()[key], before[key])
    assert_same_proposals(ours, detector)


def test_factors_of_deltas_go_into_the_weights_of_a_detector() -> None:
    method = {"delta_stds": [0.1, 0.2, 0.3, 0.4]}
    cfg = from_mapping(TrainConfig, {**SIDES, "workers": 0, "method": method})
    model = build_model(cfg).eval()
    spread(model.backbone, model.rpn["head"])
    ours, detector = Proposer(model, cfg, torch.device("cpu")), fpn_detector(nn.BatchNorm2d)
    ours.load_into(detector)
    assert_same_proposals(ours, detector)


def test_strides_of_a_detector_become_exact() -> None:
    """torchvision pads 160 px to 160, which makes 3 rows of stride 53; here it is 192 and 64."""
    cfg = from_mapping(TrainConfig, {"image": {"short_side": 160, "max_side": 224}, "workers": 0})
    model = build_model(cfg).eval()
    spread(model.backbone, model.rpn["head"])
    ours = Proposer(model, cfg, torch.device("cpu"))
    detector = fpn_detector(nn.BatchNorm2d)
    detector.transform.min_size, detector.transform.max_size = (160,), 224
    ours.load_into(detector)
    detector.rpn._post_nms_top_n["testing"] = 2000
    picture = nn.functional.interpolate(images()[0][None].float(), size=(160, 224))[0]
    expected = proposals_of(detector, [picture.to(torch.uint8)])
    assert_same_boxes(ours.propose([picture.to(torch.uint8)])[0].boxes, expected[0])


def test_a_head_that_torchvision_does_not_have_is_refused() -> None:
    towers = {"head": "towers", "sampling": "all", "num_convs": 1, "channels": 16}
    cfg = from_mapping(TrainConfig, {"workers": 0, "method": towers})
    ours = Proposer(build_model(cfg), cfg, torch.device("cpu"))
    with pytest.raises(ConfigError, match="expected the head of faster_rcnn or oln"):
        ours.load_into(fpn_detector(FrozenBatchNorm2d))


def test_a_detector_with_other_anchors_is_refused() -> None:
    cfg = from_mapping(TrainConfig, {"workers": 0})
    ours = Proposer(build_model(cfg), cfg, torch.device("cpu"))
    other = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    with pytest.raises(ConfigError, match="expected a detector with rounded anchors of sizes"):
        ours.load_into(fpn_detector(FrozenBatchNorm2d, rpn_anchor_generator=other))
    detector = fpn_detector(FrozenBatchNorm2d)
    detector.rpn.head.conv.append(nn.Conv2d(256, 256, 3))
    with pytest.raises(ConfigError, match="expected a detector of the same network, got rpn"):
        ours.load_into(detector)


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a detector of five classes, as a person who trained one has it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = get_model(
            "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=5
        )
    spread(detector.backbone, detector.rpn.head)
    path = tmp_path_factory.mktemp("detector") / "mine.pth"
    torch.save(detector.state_dict(), path)
    return path


def test_torchvision_to_here_to_torchvision(detector_file: Path) -> None:
    ours = rpn_train.load(f"torchvision:fasterrcnn_resnet50_fpn:{detector_file}", top=300)
    assert ours.cfg.backbone.norm == "bn"  # the file has counters: its norms were not frozen
    ours = Proposer(ours.network, from_mapping(TrainConfig, {**SIDES, "workers": 0}), ours.device)
    options = {"weights": None, "weights_backbone": None, "min_size": 128, "max_size": 192}
    theirs = get_model("fasterrcnn_resnet50_fpn", num_classes=5, **options)
    theirs.load_state_dict(torch.load(detector_file, weights_only=True))
    theirs.transform.size_divisible = 64
    assert_same_proposals(ours, theirs)
    empty = get_model("fasterrcnn_resnet50_fpn", num_classes=91, **options)
    ours.load_into(empty)
    assert_same_proposals(ours, empty)


def test_names_of_2018_and_the_epsilon_of_2019(
    detector_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's file for COCO_V1 has old names and no counters, and was trained without eps."""
    state = torch.load(detector_file, weights_only=True)
    old = {
        re.sub(r"(blocks\.\d)\.0\.|(head\.conv)\.0\.0\.", r"\1\2.", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.bias"} <= old.keys()
    file = tmp_path / "hub" / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    file.parent.mkdir(parents=True)
    torch.save(old, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights in (None, "COCO_V1", str(file)):
        config, found = read_detector("fasterrcnn_resnet50_fpn", weights)
        assert config["backbone"]["norm"] == "frozen_bn"
        assert config["backbone"]["norm_eps"] == 0
        assert {*found} == {
            key
            for key in state
            if key.startswith(("backbone.", "rpn.")) and not key.endswith("num_batches_tracked")
        }
    model = rpn_train.load("torchvision:fasterrcnn_resnet50_fpn:COCO_V1").network
    assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}


@pytest.mark.parametrize("builder", DETECTORS)
def test_every_builder_has_the_keys_of_the_network(builder: str) -> None:
    """Names and shapes, without computing anything."""
    with torch.device("meta"):
        theirs = get_model(builder, weights=None, weights_backbone=None).state_dict()
        changes = DETECTORS[builder]
        ours = build_model(from_mapping(TrainConfig, {**changes})).state_dict()
    expected = {k: v.shape for k, v in theirs.items() if k.startswith(("backbone.", "rpn."))}
    counters = {k for k in expected if k.endswith("num_batches_tracked") and k not in ours}
    assert {k: v.shape for k, v in ours.items()} == {
        k: v for k, v in expected.items() if k not in counters
    }


def test_fine_tuning_starts_from_a_detector_or_a_run(
    detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rpn_train.cli import _train

    tiny = ["dataset.shapes.size=[64,64]", "dataset.shapes.train_images=2", "workers=0"]
    tiny += [
        "dataset.shapes.val_images=1",
        "eval.pictures=0",
        "image.short_side=64",
        "image.max_side=64",
    ]
    tiny += [
        "save_every=1",
        "schedule.batch_size=1",
        "schedule.steps=1",
        "eval_at_start=false",
        "device=cpu",
    ]
    where = f"torchvision:fasterrcnn_resnet50_fpn:{detector_file}"
    first = [f"init_from={where}", "backbone=resnet50_fpn", "schedule.lr=0", "anchors=fpn"]
    assert guarded(_train, [*tiny, *first, f"output_dir={tmp_path}/a"]) == 0
    second = [f"init_from={tmp_path}/a", "backbone=resnet50_fpn", "schedule.lr=0"]
    assert guarded(_train, [*tiny, *second, f"output_dir={tmp_path}/b"]) == 0
    expected = torch.load(detector_file, weights_only=True)
    for run in "ab":
        file = tmp_path / run / "checkpoints" / "last.pt"
        weights = torch.load(file, weights_only=True)["model"]
        key = "backbone.body.layer4.2.conv3.weight"
        assert torch.equal(weights[key], expected[key])
    out = capsys.readouterr().out
    assert f"resnet50_fpn, from {where}" in out
    assert "changed: anchors.sizes: [[32.0], [64.0]" in out  # those of drawn shapes are smaller
    third = ["init_from=torchvision:fasterrcnn_resnet50_fpn_v2", f"output_dir={tmp_path}/c"]
    monkey = pytest.MonkeyPatch()
    monkey.setenv("TORCH_HOME", str(tmp_path))
    monkey.setattr(torch.hub, "load_state_dict_from_url", raise_os_error)
    assert guarded(_train, [*tiny, *third]) == 2
    monkey.undo()
    assert "is not at" in capsys.readouterr().err
    wrong = [f"init_from={tmp_path}/a", f"output_dir={tmp_path}/d"]
    assert guarded(_train, [*tiny, *wrong]) == 2
    err = capsys.readouterr().err
    assert "expected 'backbone.body.layer1.0.conv1.weight' of shape" in err
    assert "; changed: backbone.name: resnet50_fpn -> resnet18_fpn" in err


def raise_os_error(*args: object, **kwargs: object) -> None:
    raise OSError("no network")


def test_faults(detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"expected 'fasterrcnn_resnet50_fpn' \| .* got 'ssd'"):
        read_detector("ssd", None)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="expected the state dict of a fasterrcnn"):
        read_detector("fasterrcnn_resnet50_fpn", str(tmp_path / "other.pth"))
    where = f"checkpoint=torchvision:fasterrcnn_resnet50_fpn:{detector_file}"
    assert guarded(_eval, [where]) == 2
    assert guarded(_propose, [where, f"output={tmp_path}/a.npz"]) == 2
    assert capsys.readouterr().err.count("error: expected dataset=CHOICE") == 2
    assert compose_run([]).init_from is None
