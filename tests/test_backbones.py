import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

from rpn_train.backbones import BACKBONES, Backbone, build_backbone
from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.norms import NORMS, Norm


def build(name: str, **options: object) -> Backbone:
    return build_backbone(name, **{"weights": None, "frozen_stages": 0, "norm": "bn", **options})


def shapes(name: str, **options: object) -> tuple[Backbone, list[tuple[int, ...]]]:
    """Build and run without numbers: meta tensors have shapes alone."""
    with torch.device("meta"):
        backbone = build(name, **options)
        return backbone, [tuple(m.shape) for m in backbone(torch.empty(2, 3, 64, 128))]


def with_numbers(module: nn.Module) -> nn.Module:
    """Fill a module built on the meta device: quicker than its own initialisation."""
    module.to_empty(device="cpu")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(len(key)))
            tensor.add_(0.8 if key.endswith("running_var") else 0)
        else:
            tensor.zero_()
    return module


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[models.ResNet, str]:
    """A classifier with batch norm statistics of its own, and the file it was saved to."""
    network = models.resnet18(num_classes=7)
    network(torch.rand(2, 3, 40, 40))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return network.eval(), str(path)


@pytest.mark.parametrize("name", BACKBONES)
def test_levels(name: str) -> None:
    backbone, levels = shapes(name)
    if name.endswith("_fpn"):
        assert backbone.out_channels == 256
        assert backbone.strides == (4, 8, 16, 32, 64)
        assert levels == [(2, 256, 64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    else:
        channels = {"resnet18_c4": 256, "resnet34_c4": 256, "vgg16": 512}.get(name, 1024)
        assert (backbone.out_channels, backbone.strides) == (channels, (16,))
        assert levels == [(2, channels, 4, 8)]


def test_torchvision_detector_weights_fit_and_agree() -> None:
    with torch.device("meta"):
        detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    theirs = with_numbers(detector.backbone).eval()
    images = torch.rand(1, 3, 75, 101)  # a multiple of nothing: the same roundings
    with torch.no_grad():
        expected = list(theirs(images).values())
        assert len(expected) == 5
        assert all(0.1 < level.std() < 10 for level in expected)
        tolerance = 1e-4  # norms are folded into convolutions, which round differently
        for norm in ("bn", "frozen_bn"):
            with torch.device("meta"):
                ours = build("resnet50_fpn", norm=norm).eval()
            ours.load_state_dict(theirs.state_dict(), assign=True)
            assert_close(ours(images), expected, atol=tolerance, rtol=tolerance)


def test_other_keys_are_torchvisions() -> None:
    with torch.device("meta"):
        detector = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        mobilenet = build("mobilenet_v3_large_fpn").body
        vgg16 = build("vgg16")
        features = models.vgg16().features
    assert mobilenet.state_dict().keys() == detector.backbone.body.state_dict().keys()
    assert vgg16.state_dict().keys() == {f"body.{key}" for key in features.state_dict()}
    assert list(vgg16.body) == [str(i) for i in range(30)]  # without "30", the last pooling
    assert isinstance(vgg16.body["29"], nn.ReLU)


def test_mobilenet_keeps_its_epsilon(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = models.mobilenet_v3_large()
    with_numbers(network)
    network.features[0][1].running_var.fill_(1e-3)  # as large as epsilon, which then counts
    torch.save(network.state_dict(), tmp_path / "net.pth")
    network.eval()
    images = torch.rand(1, 3, 32, 32)
    for norm in ("bn", "frozen_bn"):
        backbone = build("mobilenet_v3_large_fpn", weights=str(tmp_path / "net.pth"), norm=norm)
        with torch.no_grad():
            assert_close(backbone.eval().body(images)["3"], network.features[:4](images))


@pytest.mark.parametrize("name", ["convnext_tiny_fpn", "swin_t_fpn"])
def test_training_draws_nothing(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name).train()
    with_numbers(backbone)
    state = torch.get_rng_state()
    backbone(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


NORM_CLASSES = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": nn.GroupNorm,
}


@pytest.mark.parametrize("norm", get_args(Norm))
def test_norm_replaces_every_batch_norm(norm: Norm) -> None:
    backbone, _ = shapes("resnet18_fpn", norm=norm)
    found = [m for m in backbone.modules() if isinstance(m, tuple(NORM_CLASSES.values()))]
    assert len(found) == 20
    assert all(isinstance(m, NORM_CLASSES[norm]) for m in found)


@pytest.mark.parametrize("name", ["vgg16", "convnext_tiny_fpn", "swin_t_fpn"])
def test_norm_is_ignored_without_batch_norm(name: str) -> None:
    backbone, _ = shapes(name, norm="gn")
    assert not any(isinstance(m, nn.GroupNorm) for m in backbone.modules())


def test_group_norm_groups_divide_the_channels() -> None:
    backbone, _ = shapes("mobilenet_v3_large_fpn", norm="gn")
    groups = {m.num_channels: m.num_groups for m in backbone.modules() if type(m) is nn.GroupNorm}
    assert {c: groups[c] for c in (16, 40, 112, 200, 960)} == {
        16: 16,
        40: 20,
        112: 28,
        200: 25,
        960: 32,
    }


# The first key of each stage, in order.
STAGES = {
    "resnet18_fpn": ["conv1.", "layer1.", "layer2.", "layer3.", "layer4."],
    "resnet18_c4": ["conv1.", "layer1.", "layer2.", "layer3."],
    "vgg16": ["0.", "5.", "10.", "17.", "24."],
    "mobilenet_v3_large_fpn": ["0.", "2.", "4.", "7.", "13."],
    "convnext_tiny_fpn": ["0.", "1.", "2.", "4.", "6."],
    "swin_t_fpn": ["0.", "1.", "2.", "4.", "6."],
}


@pytest.mark.parametrize("name", STAGES)
def test_frozen_stages(name: str) -> None:
    starts = STAGES[name]
    for stages in range(len(starts) + 1):
        with torch.device("meta"):
            backbone = build(name, frozen_stages=stages)
        keys = [key for key, _ in backbone.body.named_parameters()]
        end = len(keys)
        if stages < len(starts):
            end = next(i for i, key in enumerate(keys) if key.startswith(starts[stages]))
        trained = [p.requires_grad for p in backbone.body.parameters()]
        assert trained == [False] * end + [True] * (len(keys) - end)
        if backbone.fpn is not None:
            assert all(p.requires_grad for p in backbone.fpn.parameters())


@pytest.mark.parametrize(("name", "stages"), [("vgg16", 6), ("resnet18_c4", 5), ("vgg16", -1)])
def test_frozen_stages_out_of_range(name: str, stages: int) -> None:
    most = len(STAGES[name])
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=rf"frozen_stages: expected 0 to {most} .* got {stages}$"),
    ):
        build(name, frozen_stages=stages)


def test_a_norm_of_a_pyramid_that_is_not_there() -> None:
    expected = "fpn_norm: expected null for resnet18_c4, which has no pyramid, got bn$"
    with torch.device("meta"), pytest.raises(ConfigError, match=expected):
        build("resnet18_c4", fpn_norm="bn")


def test_frozen_stages_keep_their_statistics() -> None:
    backbone = build("resnet18_fpn", frozen_stages=2)
    assert backbone.training
    means = {k: v.clone() for k, v in backbone.state_dict().items() if k.endswith("running_mean")}
    for _ in range(2):  # as built, and after a round of evaluation
        backbone(torch.rand(2, 3, 64, 64))
        backbone.eval()
        backbone.train()
    state = backbone.state_dict()
    changed = {key for key, mean in means.items() if not torch.equal(mean, state[key])}
    assert changed == {
        key for key in means if key.startswith(("body.layer2", "body.layer3", "body.layer4"))
    }
    assert not backbone.eval().body["layer4"].training


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
def test_weights_file(resnet18_file: tuple[models.ResNet, str], norm: Norm) -> None:
    network, path = resnet18_file
    images = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        c4 = network.layer3(network.layer2(network.layer1(x)))
        assert_close(build("resnet18_c4", weights=path, norm=norm).eval()(images), [c4])
        fpn = build("resnet18_fpn", weights=path, norm=norm).eval()
        assert_close(fpn.body(images)["layer4"], network.layer4(c4))


def test_weights_by_name(
    resnet18_file: tuple[models.ResNet, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = resnet18_file
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "resnet18-f37072fd.pth").symlink_to(path)
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        backbone = build("resnet18_fpn", weights=name)
        assert_close(backbone.body["conv1"].weight.data, network.conv1.weight.data)
    (checkpoints / "resnet34-b627a593.pth").write_text("half a download")
    with pytest.raises(CheckpointError, match=r"cannot read .*resnet34-b627a593\.pth"):
        build("resnet34_fpn", weights="DEFAULT")


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(CheckpointError) as caught:
        build("resnet50_fpn", weights="IMAGENET1K_V1")
    path = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    assert str(caught.value) == (
        f"backbone.weights: 'IMAGENET1K_V1' is not at {path} and cannot be downloaded "
        "(<urlopen error no route to host>): "
        "put resnet50-0676ba61.pth there, or give a file instead of the name"
    )


@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        ("resnet18_fpn", "gn", r"resnet18 with norm 'gn': Unexpected .*bn1\.running_mean"),
        ("resnet34_fpn", "bn", r"Missing .*layer1\.2\.conv1\.weight"),
        ("mobilenet_v3_large_fpn", "bn", r"Missing .*features\.0\.0\.weight"),
        (
            "resnext50_32x4d_fpn",
            "bn",
            r"Missing .*conv3\.weight.*size mismatch for layer1\.0\.conv1",
        ),
    ],
)
def test_weights_of_another_network(
    resnet18_file: tuple[models.ResNet, str], name: str, norm: Norm, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        build(name, weights=resnet18_file[1], norm=norm)
    assert "\n" not in str(caught.value)


def test_larger_network_does_not_pass_for_a_smaller_one(
    resnet18_file: tuple[models.ResNet, str], tmp_path: Path
) -> None:
    larger = resnet18_file[0].state_dict() | {"layer1.2.conv1.weight": torch.ones(1)}
    torch.save(larger, tmp_path / "larger.pth")
    with pytest.raises(CheckpointError, match=r"Unexpected .*layer1\.2\.conv1\.weight"):
        build("resnet18_fpn", weights=str(tmp_path / "larger.pth"))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>not found</html>"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, path),
        lambda path: torch.save({0: torch.ones(1)}, path),
    ],
)
def test_not_a_state_dict(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"^backbone\.weights: expected a state dict.*\.pth"):
        build("resnet18_fpn", weights=str(tmp_path / "weights.pth"))


def test_unknown_weights_and_names() -> None:
    with pytest.raises(CheckpointError) as weights:
        build("resnet50_fpn", weights="IMAGENET")
    assert str(weights.value) == (
        "backbone.weights: expected 'IMAGENET1K_V1' | 'IMAGENET1K_V2' | 'DEFAULT' or a file, "
        "got 'IMAGENET'"
    )
    with pytest.raises(ConfigError) as name:
        build("vgg19")
    assert str(name.value).startswith("backbone.name: expected 'resnet18_fpn' | 'resnet34_fpn' | ")
    assert str(name.value).endswith(" | 'timm:<name>', got 'vgg19' (did you mean 'vgg16'?)")
    with pytest.raises(ConfigError, match=r"got 'zzz'$"):
        build("zzz")


def test_norms_are_the_literal() -> None:
    assert set(NORMS) == set(get_args(Norm)) == set(NORM_CLASSES)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'rpn-train\[timm\]'$"):
        build("timm:resnet18")


class FakeTimmBody(nn.Module):
    """Four channels-last features of 3 x stride channels."""

    output_fmt = "NHWC"

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.feature_info = SimpleNamespace(
            reduction=lambda: strides, channels=lambda: [3 * s for s in strides]
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        strides = self.feature_info.reduction()
        return [images[..., ::s, ::s].repeat(1, s, 1, 1).permute(0, 2, 3, 1) for s in strides]


def test_timm_is_asked_and_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def create_model(name: str, **options: object) -> nn.Module:
        calls.append((name, options["pretrained"], options["pretrained_cfg_overlay"]))
        if name == "nothing":
            raise RuntimeError("Unknown model\n(nothing)")
        return FakeTimmBody([2, 4, 8, 16] if name == "fine" else [4, 8, 16, 32])

    layers = SimpleNamespace(
        freeze_batch_norm_2d=lambda m: m, convert_sync_batchnorm=lambda m: m, DropPath=nn.Dropout
    )
    fake = SimpleNamespace(create_model=create_model, layers=layers)
    monkeypatch.setitem(sys.modules, "timm", fake)
    backbone = build("timm:net.tag")
    sizes = [tuple(m.shape) for m in backbone(torch.rand(1, 3, 64, 128))]
    assert sizes == [(1, 256, 64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    build("timm:net", weights="DEFAULT")
    build("timm:net", weights="net.pth")
    assert calls == [
        ("net.tag", False, None),
        ("net", True, None),
        ("net", True, {"file": "net.pth"}),
    ]
    with pytest.raises(ConfigError, match=r"expected 'frozen_bn' | 'bn' | 'sync_bn' for timm"):
        build("timm:net", norm="gn")
    with pytest.raises(ConfigError, match=r"frozen_stages: expected 0 to 0"):
        build("timm:net", frozen_stages=1)
    with pytest.raises(ConfigError, match=r"strides \[4, 8, 16, 32\], fine has \[2, 4, 8, 16\]"):
        build("timm:fine")
    with pytest.raises(ConfigError, match=r"RuntimeError: Unknown model \(nothing\)$"):
        build("timm:nothing")
    with pytest.raises(CheckpointError, match="weights 'DEFAULT': RuntimeError"):
        build("timm:nothing", weights="DEFAULT")


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_timm(name: str) -> None:
    pytest.importorskip("timm")
    backbone = build(f"timm:{name}", norm="frozen_bn").eval()
    side = 224 if name.startswith("swin") else 64  # timm's swin takes the size it is named for
    with torch.no_grad():
        levels = backbone(torch.rand(1, 3, side, side))
    strides = (4, 8, 16, 32, 64)
    assert backbone.strides == strides
    assert [tuple(m.shape) for m in levels] == [
        (1, 256, -(-side // s), -(-side // s)) for s in strides
    ]
