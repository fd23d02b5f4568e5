"""What an exported file computes, against the package itself."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import nms

from rpn_train.build import build_model
from rpn_train.cli import compose_run
from rpn_train.config import (
    EvalConfig,
    ProposalsConfig,
    TopNConfig,
    TrainConfig,
)
from rpn_train.errors import ConfigError
from rpn_train.evaluate import propose_batch
from rpn_train.export import ProposalNetwork, export_network, nms_at_once, nms_by_row
from rpn_train.model import RPN
from rpn_train.proposals import Proposals

# pre_nms is more than the last level of a pyramid has, post_nms both less and more than NMS leaves
PROPOSALS = ProposalsConfig(nms_iou=0.5, min_size=6.0, test=TopNConfig(60, 40))
# batch, height, width: multiples of 64
CANVASES = [(1, 128, 192), (2, 192, 128), (3, 256, 128)]

Run = Callable[[Tensor, Tensor], list[Tensor]]


def build(backbone: str, method: str = "faster_rcnn") -> tuple[RPN, TrainConfig]:
    """A network whose logits and deltas are spread as those of a trained one."""
    sizes = "[[16,32,64,128]]" if method == "faster_rcnn" else "[[64]]"
    c4 = [f"anchors.sizes={sizes}", "backbone.pyramid=p2_p6"] * backbone.endswith("c4")
    cfg = replace(
        compose_run(["dataset=coco", f"backbone={backbone}", f"method={method}", *c4]),
        proposals=PROPOSALS,
        eval=EvalConfig(max_proposals=(40,)),
    )
    model = build_model(cfg).eval()
    images = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model(images)
        head: Any = model.rpn["head"]
        head.cls_logits.weight *= 2 / outputs.logits.std()
        head.bbox_pred.weight *= 0.3 / outputs.deltas.std()
        if method == "cascade":
            head.first_bbox_pred.weight *= 20
    return model, cfg


def draw(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise, and sizes without padding of which the second is small."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([[height - 3, width - 29], [41, 30], [height, width]])[:batch]


def expected(
    model: RPN,
    cfg: TrainConfig,
    images: Tensor,
    sizes: Tensor,
    canvas: tuple[int, int] | None = None,
) -> list[Proposals]:
    batch: Any = SimpleNamespace(images=images, sizes=sizes, canvas=canvas or images.shape[2:])
    return propose_batch(model, batch, cfg)


def assert_same(outputs: list[Tensor], proposals: list[Proposals]) -> None:
    """Boxes to 1e-3 px, logits to 1e-4; an order that these leave open does not matter."""
    boxes, logits, num_valid = outputs
    assert boxes.shape == (len(proposals), 40, 4)
    assert num_valid.tolist() == [len(p.boxes) for p in proposals]
    for i, (one, n) in enumerate(zip(proposals, num_valid.tolist(), strict=True)):
        assert_close(logits[i, :n], one.logits, rtol=0, atol=1e-4)
        rows = torch.cat([boxes[i, :n], 10 * logits[i, :n, None]], dim=1)
        distance = torch.cdist(
            rows, torch.cat([one.boxes, 10 * one.logits[:, None]], 1), p=torch.inf
        )
        if n:
            nearest = distance.min(dim=1)
            assert nearest.values.max() <= 1e-3
            assert sorted(nearest.indices.tolist()) == list(range(n))
        assert (boxes[i, n:] == 0).all()
        assert (logits[i, n:] == -torch.inf).all()


@pytest.fixture(scope="module", params=["resnet18_fpn", "resnet18_c4"])
def onnx_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RPN, TrainConfig, Path]:
    pytest.importorskip("onnxscript", reason="torch writes ONNX with it: the extra `export`")
    path = tmp_path_factory.mktemp(request.param) / "rpn.onnx"
    model, cfg = build(request.param)
    export_network(model, cfg, path, step=7)
    return model, cfg, path


def onnx_session(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="runs the file: the extra `export`")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, and need not be printed too
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(path, options)


def onnx_run(session: Any) -> Run:
    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def test_onnx_gives_the_same_proposals(onnx_file):
    model, cfg, path = onnx_file
    session = onnx_session(path)
    assert [o.name for o in session.get_outputs()] == ["boxes", "logits", "num_valid"]
    assert session.get_inputs()[0].shape[0] == "batch"
    for canvas in [*CANVASES, (2, 64, 128)]:
        images, sizes = draw(*canvas)
        assert_same(onnx_run(session)(images, sizes), expected(model, cfg, images, sizes))


@pytest.mark.parametrize("method", ["atss", "cascade"])
def test_onnx_of_other_methods(method, tmp_path):
    """A root of two probabilities that ranks; points that a first stage puts anywhere."""
    pytest.importorskip("onnxscript", reason="torch writes ONNX with it: the extra `export`")
    model, cfg = build("resnet18_c4", method)
    export_network(model, cfg, tmp_path / "rpn.onnx", step=7)
    run = onnx_run(onnx_session(tmp_path / "rpn.onnx"))
    for canvas in CANVASES:
        images, sizes = draw(*canvas)
        proposals = expected(model, cfg, images, sizes)
        assert len(proposals[0].boxes) > 0
        assert_same(run(images, sizes), proposals)


def test_onnx_at_a_size_that_is_no_multiple(onnx_file):
    model, cfg, path = onnx_file
    run = onnx_run(onnx_session(path))
    images, sizes = draw(1, 128, 168)
    if len(model.grid.strides) > 1:
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            run(images, sizes)
    else:  # 10.5 cells of 16 px make 11
        assert_same(run(images, sizes), expected(model, cfg, images, sizes, (128, 176)))


def test_onnx_is_one_file_that_says_what_it_wants(onnx_file):
    model, _, path = onnx_file
    assert [*path.parent.iterdir()] == [path]
    assert b"site-packages" not in path.read_bytes()  # no paths of the machine that wrote it
    metadata = onnx_session(path).get_modelmeta().custom_metadata_map
    divisor = str(max(model.grid.strides))
    said = {k: metadata[k] for k in ("short_side", "max_side", "divisor", "step")}
    assert said == {"short_side": "800", "max_side": "1333", "divisor": divisor, "step": "7"}


def test_pt2_gives_the_same_proposals(tmp_path):
    model, cfg = build("resnet18_c4")
    model.train()  # and so it stays
    path = tmp_path / "rpn.pt2"
    export_network(model, cfg, path, step=7)
    assert model.training
    assert [*tmp_path.iterdir()] == [path]
    assert b"site-packages" not in path.read_bytes()
    extra: dict[str, Any] = {"rpn_train.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["rpn_train.json"])["divisor"] == "16"
    assert not any("rpn_train" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    for canvas in CANVASES:
        images, sizes = draw(*canvas)
        assert_same(run(images, sizes), expected(model.eval(), cfg, images, sizes))
    with pytest.raises(AssertionError, match="Guard failed"):
        run(*draw(1, 40, 48))


@torch.no_grad()
def test_levels_of_a_pyramid():
    """The network before it is exported; and the images do meet each of the limits."""
    model, cfg = build("resnet18_fpn")
    network = ProposalNetwork(model, cfg.proposals, nms_at_once)
    counts = []
    for canvas in CANVASES:
        images, sizes = draw(*canvas)
        proposals = expected(model, cfg, images, sizes)
        assert_same([*network(images, sizes)], proposals)
        counts += [len(p.boxes) for p in proposals]
    assert max(counts) == 40
    assert 0 < min(counts) < 30
    assert min(model.grid.level_lengths((256, 128))) < cfg.proposals.test.pre_nms


@torch.no_grad()
def test_nothing_left():
    model, cfg = build("resnet18_c4")
    limits = replace(cfg.proposals, min_size=300.0, test=TopNConfig(60, 75))
    boxes, logits, num_valid = ProposalNetwork(model, limits, nms_at_once)(*draw(2, 64, 64))
    assert num_valid.tolist() == [0, 0]
    assert (boxes == 0).all()
    assert (logits == -torch.inf).all()
    assert boxes.shape == (2, 60, 4)  # one level of 60: there are no 75


def test_rows_do_not_suppress_each_other():
    generator = torch.Generator().manual_seed(3)
    corners = 1333 * torch.rand(5, 37, 2, generator=generator)
    sides = 400 + 300 * torch.rand(5, 37, 2, generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=2)
    boxes[2] = boxes[2, :1]  # all the same: one is kept
    logits = torch.randn(5, 37, generator=generator)
    logits[2] = 1.0  # equal: the first is
    for suppress in (nms_at_once, nms_by_row):
        keep = suppress(boxes, logits, 0.3)
        for row in range(5):
            assert keep[row].nonzero()[:, 0].tolist() == sorted(
                nms(boxes[row], logits[row], 0.3).tolist()
            )
        assert keep[2].nonzero().tolist() == [[0]]
        assert keep.sum() < 5 * 37 - 60
    assert nms_at_once(boxes[2:3], logits[2:3], 0.3).sum() == 1


def test_errors(tmp_path, monkeypatch):
    model, cfg = build("resnet18_c4")
    with pytest.raises(ConfigError, match=r"in \.onnx or \.pt2, got 'rpn\.pth'"):
        export_network(model, cfg, tmp_path / "rpn.pth", step=0)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'rpn-train\[export\]'"):
        export_network(model, cfg, tmp_path / "rpn.onnx", step=0)
    assert not [*tmp_path.iterdir()]


def test_a_network_that_depends_on_the_size_is_refused(tmp_path):
    """Without this, ONNX would compute what is right for the size of the example alone."""
    model, cfg = build("resnet18_c4")
    old = tmp_path / "rpn.pt2"
    old.write_bytes(b"old")

    class Windows(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[2] % 7 == 0 else x

    model.backbone.body.layer3 = torch.nn.Sequential(model.backbone.body.layer3, Windows())
    with pytest.raises(ConfigError, match=r"resnet18_c4 cannot be exported to \.pt2: .*Guard"):
        export_network(model, cfg, old, step=0)
    assert old.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [old]
