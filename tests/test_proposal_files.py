"""Proposals through files: nothing is lost, nothing is run, and every fault has a name."""

import itertools
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpn_train import coco_results
from rpn_train.data.index import Index, build_index
from rpn_train.errors import ConfigError, DataError
from rpn_train.proposal_files import WRITERS, NamedProposals, write_proposals
from rpn_train.read_proposals import Match, read_proposals
from rpn_train.recall import ObjectArrays, ProposalArrays, boxes_to_xywh, score_recall

NAMES = ("b.jpg", "sub/a.x.jpg", "c.png", "ü.jpg")
IDS = (7, 2**40, 3, 11)


def make_index(names: tuple[str, ...] = NAMES, ids: tuple[int, ...] = IDS) -> Index:
    """Images with two objects each."""
    rows = np.repeat(np.arange(len(names)), 2)
    corners = np.random.default_rng(0).uniform(0, 60, (len(rows), 2))
    return build_index(
        source=Path("annotations.json"),
        root=Path("images"),
        image_ids=np.array(ids, np.int64),
        file_names=names,
        sizes=np.full((len(names), 2), 101),
        box_rows=rows,
        box_ids=np.arange(len(rows)),
        boxes_xywh=np.concatenate([corners, np.full_like(corners, 31.7)], axis=1),
        areas=np.full(len(rows), np.nan),
        ignore=np.zeros(len(rows), np.bool_),
        keep_empty=True,
    )


INDEX = make_index()


def near_objects(index: Index, rows: list[int]) -> list[NamedProposals]:
    """37 proposals around the objects of each of these images, but none for image 2.

    The best logits differ only where their sigmoid is 1 in float64, the last where it is 0.
    """
    rng = np.random.default_rng(1)
    found = []
    for row in rows:
        count = 0 if row == 2 else 37
        boxes = index.boxes_xyxy(row)[rng.integers(2, size=count)]
        boxes += rng.normal(scale=5, size=boxes.shape).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, :2], boxes[:, 2:])
        logits = np.concatenate([[42, 41, 40, 38, 38], rng.normal(size=30), [-800, -801]])
        logits = np.sort(logits.astype(np.float32))[::-1][:count]
        found.append(NamedProposals(int(index.image_ids[row]), index.file_name(row), boxes, logits))
    return found


def direct(images: list[NamedProposals]) -> ProposalArrays:
    return ProposalArrays(
        boxes_to_xywh(np.concatenate([image.boxes for image in images])),
        np.concatenate([image.logits for image in images]).astype(np.float64),
        np.cumsum([0, *(len(image.logits) for image in images)]),
    )


@pytest.mark.parametrize(
    ("suffix", "match"), [(".json", "id"), (".npz", "id"), (".npz", "file_name"), (".pkl", "id")]
)
def test_the_round_trip_is_exact(tmp_path: Path, suffix: str, match: Match) -> None:
    """Boxes, ranking and recall, whatever the order of the images in the file."""
    images = near_objects(INDEX, [3, 2, 0, 1])
    path = tmp_path / "new" / f"proposals{suffix}"
    write_proposals(path, iter(images))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    proposals, missing = read_proposals(path, INDEX, match=match)
    expected = direct([images[2], images[3], images[1], images[0]])
    assert missing == ((2,) if suffix == ".json" else ())
    np.testing.assert_array_equal(proposals.offsets, [0, 37, 74, 74, 111])
    np.testing.assert_array_equal(proposals.boxes_xywh, expected.boxes_xywh)
    if suffix != ".json":
        np.testing.assert_array_equal(proposals.scores, expected.scores)
    objects = ObjectArrays(INDEX.boxes_xywh, INDEX.areas, INDEX.ignore, INDEX.box_offsets)
    ours, theirs = (
        score_recall(p, objects, max_proposals=(1, 2, 3, 37)) for p in (proposals, expected)
    )
    np.testing.assert_array_equal(ours.recall, theirs.recall)
    assert 0 < ours.recall[0, 0, 0] < ours.recall[0, 0, 3]


@pytest.mark.parametrize("suffix", WRITERS)
def test_no_images_and_no_proposals(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"proposals{suffix}"
    write_proposals(path, [])
    proposals, missing = read_proposals(path, INDEX, match="id")
    assert (proposals.boxes_xywh.shape, proposals.offsets.tolist()) == ((0, 4), [0] * 5)
    assert missing == (0, 1, 2, 3)


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    boxes = np.array([[1, 2, 4, 8], [0.1, 0, 1, 1]], np.float32)
    image = NamedProposals(7, "b.jpg", boxes, np.array([0, -np.log(3)], np.float32))
    for suffix in WRITERS:
        write_proposals(tmp_path / f"p{suffix}", [image])
    first, second = json.loads((tmp_path / "p.json").read_text())
    assert first == {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert second["score"] == pytest.approx(1 / (1 + np.exp(-float(image.logits[1]))), rel=1e-15)
    assert second["score"] == pytest.approx(0.25)
    assert second["bbox"][2] == 1 - float(np.float32(0.1))
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        assert (file["image_ids"].tolist(), file["offsets"].tolist()) == ([7], [0, 2])
        assert file["file_name_bytes"].tobytes() == b"b.jpg"
        assert file["boxes"].dtype == file["logits"].dtype == np.float32
        np.testing.assert_array_equal(file["boxes"], boxes)
    content = pickle.loads((tmp_path / "p.pkl").read_bytes())
    assert (content["ids"], content["bbox_mode"]) == ([7], 0)
    np.testing.assert_array_equal(content["boxes"], [boxes])
    np.testing.assert_array_equal(content["objectness_logits"], [image.logits])


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_is_no_file(tmp_path: Path, suffix: str, error: type) -> None:
    def broken() -> Iterator[NamedProposals]:
        yield from near_objects(INDEX, [0])
        raise error

    path = tmp_path / f"p{suffix}"
    path.write_text("the one before")
    with pytest.raises(error):
        write_proposals(path, broken())
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the one before"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    never = (pytest.fail("asked for an image") for _ in range(1))
    with pytest.raises(ConfigError, match=r"in \.json, \.npz, \.pkl, got .*p\.csv"):
        write_proposals(tmp_path / "p.csv", never)
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ConfigError, match="got a folder"):
        write_proposals(tmp_path / "p.json", never)
    for box, logit in ((np.nan, 0), (0, np.inf)):
        with pytest.raises(DataError, match=r"'b\.jpg': expected finite"):
            NamedProposals(
                7, "b.jpg", np.full((1, 4), box, np.float32), np.full(1, logit, np.float32)
            )


ROW = {"image_id": 7, "bbox": [1, 2.5, 3, 4], "score": 0.5}
MASK = {"size": [3, 4], "counts": 'a}, {"b\\'}
AWKWARD = [
    {**ROW, "score": 1, "segmentation": MASK, "category_id": None},
    {"attributes": [{"a": [{}, {}]}, {"b": "} ,{"}, {}], **ROW, "image_id": 3},
    {**ROW, "bbox": [0, 0, 0, 0], "more": [[{"x": 1}, {"y": [{}]}]] * 3},
    {"s": '"}\\', **ROW, "score": 2, "t": "},{" * 9},
]


@pytest.mark.parametrize("block", [1, 30, 150, 2**22])
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
def test_json_is_split_between_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, layout: dict[str, Any]
) -> None:
    """Braces within rows and within strings, and blocks that end at each of them."""
    monkeypatch.setattr(coco_results, "BLOCK_BYTES", block)
    path = tmp_path / "p.json"
    path.write_text("\n " + json.dumps(AWKWARD * 2, **layout) + " \n")
    proposals, missing = read_proposals(path, INDEX, match="id")
    assert missing == (1, 3)
    assert proposals.offsets.tolist() == [0, 6, 6, 8, 8]
    assert proposals.scores.tolist() == [2, 2, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert proposals.boxes_xywh[:, 1].tolist() == [2.5, 2.5, 2.5, 2.5, 0, 0, 2.5, 2.5]


def test_equal_scores_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{**ROW, "bbox": [x, 0, 1, 1]} for x in range(50)]))
    boxes = read_proposals(path, INDEX, match="id").proposals.boxes_xywh
    assert boxes[:, 0].tolist() == [*range(50)]


def test_memory_does_not_hold_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40,000 rows: 4 MB of text, as objects 12 MB more, as arrays 2 MB and their sorted copies."""
    monkeypatch.setattr(coco_results, "BLOCK_BYTES", 2**18)
    index = make_index(tuple(f"{i}.jpg" for i in range(40)), tuple(range(40)))
    boxes = np.tile(np.array([1 / 3, 1 / 7, 77.7, 99.9], np.float32), (1000, 1))
    logits = np.linspace(1, -1, 1000, dtype=np.float32)
    path = tmp_path / "p.json"
    tracemalloc.start()
    write_proposals(path, (NamedProposals(i, f"{i}.jpg", boxes, logits) for i in range(40)))
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    proposals, _ = read_proposals(path, index, match="id")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(proposals.scores) == 40_000
    assert written < 1e6
    assert read < 8e6


@pytest.mark.parametrize("name", ["sub/a.x.jpg", "a.x"])
def test_matching_by_file_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{**ROW, "image_id": name}]))
    assert read_proposals(path, INDEX, match="file_name").missing == (0, 2, 3)


def test_a_stem_of_two_images_is_no_name(tmp_path: Path) -> None:
    index = make_index(("1/a.jpg", "2/a.jpg", "a.b.png", "a.b"))
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{**ROW, "image_id": "a"}]))
    with pytest.raises(DataError, match="expected whole file names, got 'a'"):
        read_proposals(path, index, match="file_name")
    path.write_text(json.dumps([{**ROW, "image_id": "a.b"}]))  # a whole name comes first
    assert read_proposals(path, index, match="file_name").missing == (0, 1, 2)


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.x.npz", boxes=np.array([[1, 1, 3, 4], [0, 0, 9, 9.0]]), scores=[1, 2])
    np.savez(tmp_path / "ü.npz", boxes=np.empty((0, 4)), scores=np.empty(0))
    proposals, missing = read_proposals(tmp_path, INDEX, match="id")
    assert missing == (0, 2)
    assert proposals.offsets.tolist() == [0, 0, 2, 2, 2]
    assert proposals.boxes_xywh.tolist() == [[0, 0, 9, 9], [1, 1, 2, 3]]


BOXES = np.array([[1, 1, 3, 4], [0, 0, 9, 9]], np.float32)
SCORES = np.array([-1, 2.5])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("mode", [None, 0, 1])
def test_proposals_of_detectron2(tmp_path: Path, protocol: int, mode: int | None) -> None:
    content = {
        "ids": [np.int64(3), 7],
        "boxes": [np.empty((0, 4)), np.asfortranarray(BOXES).astype(">f4")],
        "objectness_logits": [np.empty(0), SCORES],
    }
    if mode is None:  # Detectron's names
        content["indexes"], content["scores"] = content.pop("ids"), content.pop("objectness_logits")
    else:
        content["bbox_mode"] = mode
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    proposals, missing = read_proposals(path, INDEX, match="id")
    assert missing == (1, 3)
    assert proposals.scores.tolist() == [2.5, -1]
    expected = BOXES if mode == 1 else boxes_to_xywh(BOXES)
    np.testing.assert_array_equal(proposals.boxes_xywh, expected[::-1])


@pytest.mark.parametrize("protocol", [2, 5])
def test_proposals_of_mmdetection(tmp_path: Path, protocol: int) -> None:
    rows = np.concatenate([BOXES, SCORES[:, None]], axis=1).astype(np.float32)
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps([rows[:0], rows, rows[:0], rows[1:]], protocol))
    proposals, missing = read_proposals(path, INDEX, match="file_name")
    assert missing == ()
    assert proposals.offsets.tolist() == [0, 0, 2, 2, 3]
    np.testing.assert_array_equal(proposals.boxes_xywh[2:], [[0, 0, 9, 9]])


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Whose arrays are text: {"ids": [7], "boxes": [[[0, 0, 1, 2]]], "scores": [[-1]]}."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content

    def float32(shape: bytes, values: list[float]) -> bytes:
        content = text(np.array(values, "<f4").tobytes())
        dtype = b"cnumpy\ndtype\n(" + text(b"f4") + b"K\0K\1tR(K\3" + text(b"<")
        dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
        return new + b"(K\1(" + shape + b"t" + dtype + b"\x89" + content + b"tb"

    content = b"\x80\2}(" + text(b"ids") + b"](K\7e" + text(b"boxes") + b"]("
    content += float32(b"K\1K\4", [0, 0, 1, -0.0 + 2]) + b"e" + text(b"scores") + b"]("
    path = tmp_path / "p.pkl"
    path.write_bytes(content + float32(b"K\1", [-1]) + b"eu.")
    proposals, _ = read_proposals(path, INDEX, match="id")
    assert (proposals.boxes_xywh.tolist(), proposals.scores.tolist()) == ([[0, 0, 1, 2]], [-1])


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def payloads(path: str) -> dict[str, Call]:
    """What would make a file, by the name that must be refused."""
    statement = f"open({path!r}, 'w').close()"
    array = f"{path}.npy"
    np.save(array, np.array([Call(eval, statement)], object), allow_pickle=True)
    return {
        "posix.system": Call(os.system, f"touch {path}"),
        "eval": Call(eval, statement),
        "exec": Call(exec, statement),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "numpy.load": Call(np.load, array, None, True),
        "io.open": Call(open, path, "w"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    made, path = tmp_path / "made", tmp_path / "p.pkl"
    for name, payload in payloads(str(made)).items():
        for content in (payload, [np.zeros((0, 5)), payload], {"ids": [{"a": (payload,)}]}):
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(DataError, match=rf"a pickle of arrays .* got (\w+\.)?_?{name}$"):
                read_proposals(path, INDEX, match="id")
            assert not made.exists()
    pickle.loads(pickle.dumps(payloads(str(made))["numpy.load"], protocol))
    assert made.exists(), "the payloads work"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (np.array([None]), "an array of dtype 'O8'"),
        (np.zeros(1, "i4,O"), "an array of dtype 'V12'"),
        (np.zeros(1, "U3"), "an array of dtype 'U3'"),
        (np.ma.zeros(1), r"numpy\.ma.*_mareconstruct"),
        (Path("x"), r"pathlib\.PosixPath"),
        (Call(bytes.fromhex, "00"), r"getattr"),
        (Call(np.ndarray, (1,), "O", b"12345678"), "broken or another file"),  # bytes as pointers
    ],
)
def test_a_pickle_of_anything_else(tmp_path: Path, protocol: int, content: Any, name: str) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps([content], protocol))
    with pytest.raises(DataError, match=f"p.pkl: expected a pickle of arrays.*{name}"):
        read_proposals(path, INDEX, match="id")


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


def npz(**changes: Any) -> dict[str, Any]:
    """Arrays of a sound file, but for these; None leaves one out."""
    arrays = {
        "image_ids": np.array([7, 3]),
        "offsets": np.array([0, 1, 2]),
        "boxes": BOXES,
        "logits": SCORES,
        **changes,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def detectron2(**changes: Any) -> bytes:
    return pickle.dumps(
        {"ids": [7], "boxes": [BOXES], "objectness_logits": [SCORES], "bbox_mode": 0} | changes
    )


NAN = BOXES * np.array([1, 1, np.nan, 1], np.float32)
INFINITE = np.full((2, 4), np.inf)
FAULTS: list[tuple[str, Any, str]] = [
    (".json", b"", "an empty one"),
    (".json", b" ", "a list of COCO results, got b' '"),
    (".json", text({"annotations": []}), 'a list of COCO results, got b\'{"annotations": '),
    (".json", text([ROW, ROW])[:-1], "between byte 1 and the end at 109"),
    (".json", text([ROW, ROW])[:-9], "between byte 1 and the end at 101"),
    (".json", text([ROW, ROW]).replace(b"0.5}]", b"NaN}]"), "byte 105, after .*: 7, .*malformed"),
    (".json", text([ROW]) + b" ]", "malformed: trailing"),
    (".json", text([ROW, 3]), "in row 1: Expected `object`, got `int`"),
    (".json", text([ROW, {"image_id": 7, "score": 1}]), "in row 1: .*missing .* `bbox`"),
    (".json", text([{**ROW, "bbox": [1, 2, 3]}]), r"in row 0\.bbox: .*of length 4"),
    (".json", text([{**ROW, "image_id": None}]), r"in row 0\.image_id: "),
    (".json", text([ROW, ROW]).replace(b"2.5", b"1e999"), r"in row 0\.bbox\[1\]"),
    (".json", text([{**ROW, "x": 0}]).replace(b"0}", b"[" * 9999), "recursion"),
    (".json", text([{**ROW, "bbox": [1, 2, -3, 4]}]), r"\(1, 2, -3, 4\) of score 0.5 for image 7"),
    (".json", text([ROW] + [{**ROW, "image_id": i} for i in (8, 9, 8)]), "got 2 .* first image 8"),
    (".json", text([{**ROW, "image_id": "b.jpg"}]), "expected int .* 'b.jpg'; try .* file_name"),
    (".npz", b"PK\3\4", "broken or another one"),
    (".npz", pickle.dumps([]), "broken or another one"),
    (".npz", npz(boxes=np.array([None])), "broken or another one"),
    (".npz", npz(logits=None), "logits is not a file"),
    (".npz", npz(boxes=BOXES[:, :3]), r"numbers \[K, 4\] as boxes, got float32 \[2, 3\]"),
    (".npz", npz(boxes=BOXES > 0), "as boxes, got bool"),
    (".npz", npz(logits=SCORES[:1]), r"numbers \[2\] as logits, got float64 \[1\]"),
    (".npz", npz(image_ids=SCORES), r"whole numbers \[K\] as image_ids, got float64"),
    (".npz", npz(offsets=np.array([0, 3, 2])), "offsets that rise from 0 to 2"),
    (".npz", npz(offsets=np.array([0, 3, 2], np.uint64)), "offsets that rise from 0 to 2"),
    (".npz", npz(offsets=np.array([0, 1])), "offsets that rise from 0 to 2"),
    (".npz", npz(offsets=np.array([], int)), "offsets that rise from 0 to 2"),
    (".npz", npz(offsets=np.array([0, 2])), "expected 3 offsets, got 2"),
    (".npz", npz(image_ids=np.array([7, 7])), "every image once, got 7 more"),
    (".npz", npz(image_ids=np.array([7, 8])), "got 1 of others, first image 8"),
    (".npz", npz(boxes=NAN), r"\(1, 1, nan, 3\) of score -1 for image 7"),
    (".npz", npz(boxes=INFINITE), "for image 7"),
    (".npz", npz(boxes=BOXES[:, [0, 1, 0, 3]] - [0, 0, 1, 0]), "-1, 3.* for image 7"),
    (".npz", npz(logits=np.array([0, np.nan])), "of score nan for image 3"),
    (".npz", npz(logits=np.array([0, -np.inf])), "of score -inf for image 3"),
    (".pkl", detectron2()[:-40], "broken or another"),
    (".pkl", pickle.dumps("proposals"), "list of proposals, got str"),
    (".pkl", pickle.dumps({}), "ids, boxes and objectness_logits, .* got nothing"),
    (".pkl", detectron2(ids=[7, 3]), "of the same length"),
    (".pkl", detectron2(boxes=BOXES), "Detectron2's lists"),
    (".pkl", detectron2(bbox_mode=4), r"bbox_mode 0 \(xyxy\) or 1 \(xywh\), got 4"),
    (".pkl", detectron2(ids=["7"]), "expected int .* got image '7'"),
    (".pkl", detectron2(boxes=[[[1, 2, 3, 4]]]), r"array \[K, 4\] of boxes of image 7, got list"),
    (".pkl", detectron2(objectness_logits=[SCORES[:1]]), r"\[2\] as objectness_logits of image 7"),
    (".pkl", detectron2(boxes=[NAN]), "for image 7"),
    (".pkl", pickle.dumps([BOXES]), "an entry for each of the 4 images, got 1"),
    (".pkl", pickle.dumps([BOXES] * 4), r"numbers \[K, 5\] as proposals of image 'b\.jpg'"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), FAULTS)
def test_faults_have_a_name(tmp_path: Path, suffix: str, content: Any, message: str) -> None:
    path = tmp_path / f"p{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(DataError, match=message) as error:
        read_proposals(path, INDEX, match="id")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_faults_of_names(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    for names, ends, message in (
        (b"b.jpgc.png", [0, 5, 11], "file_name_offsets that rise from 0 to 10"),
        (b"b.jpg", [0, 5], "expected 2 offsets, got 3"),
        (b"\xffb", [0, 1, 2], "in UTF-8"),
        (b"b.jpgb", [0, 5, 6], r"every image once, got 'b' more"),
    ):
        name_bytes = np.frombuffer(names, np.uint8)
        np.savez(path, **npz(file_name_bytes=name_bytes, file_name_offsets=np.array(ends)))
        with pytest.raises(DataError, match=message):
            read_proposals(path, INDEX, match="file_name")
    json_path = tmp_path / "p.json"
    json_path.write_text(json.dumps([ROW]))
    with pytest.raises(DataError, match=r"expected str .* got image 7; try matching by id"):
        read_proposals(json_path, INDEX, match="file_name")


def test_faults_of_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got nothing at"):
        read_proposals(tmp_path / "p.json", INDEX, match="id")
    with pytest.raises(DataError, match="got none in"):
        read_proposals(tmp_path, INDEX, match="id")
    (tmp_path / "p.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"in \.json, \.npz, \.pkl, or a folder of \.npz, got"):
        read_proposals(tmp_path / "p.csv", INDEX, match="id")
    np.savez(tmp_path / "b.npz", boxes=BOXES)
    with pytest.raises(DataError, match=r"b\.npz: .*scores is not a file"):
        read_proposals(tmp_path, INDEX, match="id")


def test_the_byte_of_a_fault_counts_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a later block, whose rows and bytes the decoder counts from 0."""
    path = tmp_path / "p.json"
    good = text([ROW] * 9)
    for block, broken in itertools.product((1, 100), (b"NaN", b'"x"')):
        monkeypatch.setattr(coco_results, "BLOCK_BYTES", block)
        at = good.rindex(b"0.5")
        path.write_bytes(good[:at] + broken + good[at + 3 :])
        place = f"at byte {at}, " if broken == b"NaN" else r"in row 8\.score"
        with pytest.raises(DataError, match=place):
            read_proposals(path, INDEX, match="id")
