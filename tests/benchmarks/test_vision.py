"""The table of a vision transformer: a short run of it gives true figures, and scores once."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from PIL import Image

from benchmarks import classifying, ours, vision
from benchmarks.pictures import batches, classes
from benchmarks.results import Table
from compress.errors import DataError, UsageError
from tests import tiny

COUNT = 12
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]
MERGED = "transform, 40 % fewer MACs"
WHOLE = 4 * (65 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 65 * 65 * 32) + 64 * 32 * 48 + 32 * 10
"""Multiply-accumulates of `model` on one picture: blocks, patches, classes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of four blocks on 65 tokens, with what says how its pictures are prepared."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = tf.ViTConfig(**sizes, image_size=tiny.SIZE, patch_size=4, num_labels=10)
    tf.ViTForImageClassification(config).eval().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate((vision.TRAINING, vision.TEST)):
        packed(folder / name, np.random.default_rng(seed).integers(256, size=(COUNT, 3), dtype=np.uint8))
    return folder


def packed(file: Path, colours: np.ndarray) -> None:
    """Pictures of 16 x 16 that are of one colour each; picture `number` is of the class `number` mod 10."""
    jpegs = [jpeg(np.broadcast_to(colour, (16, 16, 3))) for colour in colours]
    offsets = np.cumsum([0, *map(len, jpegs)])
    labels = np.arange(len(colours), dtype=np.uint8) % 10
    np.savez(file, data=np.frombuffer(b"".join(jpegs), np.uint8), offsets=offsets, labels=labels)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "jpeg", quality=100, subsampling=0)
    return file.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def table(model: Path, data: Path, cache: Path) -> Table:
    """A short run of two rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "ROWS", {vision.BASELINE: {}, MERGED: vision.ROWS[MERGED]})
        patch.setattr(vision, "VERSIONS", ("torch",))
        return vision.run(data, model, cache, rounds=1, calls=1, threads=1)


def test_the_rows() -> None:
    assert len(vision.ROWS) == 1 + 5 * 5 + 3
    for method in vision.METHODS:
        (merge,) = vision.ROWS[f"{method}, 30 % fewer MACs"]["passes"]
        assert merge == {"use": "merge_tokens", "method": method, "keep": 0.7}
    alone = [name for name, settings in vision.ROWS.items() if "calibrated" not in settings]
    assert len(alone) == 26
    both = vision.ROWS["int8 + transform, 40 % fewer MACs"]
    assert both == {**vision.ROWS["int8"], **vision.ROWS[MERGED]}


def test_pictures_are_prepared_as_the_model_was_trained(model: Path, tmp_path: Path) -> None:
    colours = np.array([[255, 0, 128], [10, 200, 60], [0, 0, 0]], np.uint8)
    packed(tmp_path / "three.npz", colours)
    first, second = batches(tmp_path / "three.npz", model, size=2)
    assert (first.shape, second.shape) == ((2, 3, tiny.SIZE, tiny.SIZE), (1, 3, tiny.SIZE, tiny.SIZE))
    expected = (torch.from_numpy(colours) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    found = torch.cat([first, second])
    assert (found - expected[:, :, None, None]).abs().max() < 2 / 255 / min(STD)
    assert torch.equal(torch.cat(list(batches(tmp_path / "three.npz", model, size=2, count=1))), found[:1])
    assert classes(tmp_path / "three.npz").tolist() == [0, 1, 2]


def test_what_is_missing_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a vision transformer"):
        vision.run(data, None, tmp_path, rounds=1, calls=1, threads=1)
    with pytest.raises(DataError, match=vision.TEST):
        vision.run(tmp_path, model, tmp_path, rounds=1, calls=1, threads=1)
    (tmp_path / "config.json").write_text('{"image_size": 8}')
    with pytest.raises(DataError, match="there is no .*training.json"):
        next(batches(data / vision.TEST, tmp_path, size=1))


def test_the_figures_of_a_short_run(table: Table) -> None:
    whole, merged = table.rows
    assert (whole.name, merged.name) == (vision.BASELINE, MERGED)
    assert (whole.figures[vision.SHARE], whole.figures[vision.LOST]) == (100, 0)
    assert whole.figures[vision.DIVERGENCE] == pytest.approx(0, abs=1e-12)
    assert whole.figures[vision.MACS] == pytest.approx(WHOLE / 1e6)
    assert 55 < merged.figures[vision.SHARE] <= 60
    assert merged.figures[vision.MACS] == pytest.approx(WHOLE / 1e8 * merged.figures[vision.SHARE])
    assert 0 < merged.figures[vision.DIVERGENCE] < 0.01
    lost = whole.figures[vision.TOP1] - merged.figures[vision.TOP1]
    assert merged.figures[vision.LOST] == pytest.approx(lost)
    assert whole.speedup[vision.SHAPE].median == 1


def test_the_answers_are_those_of_the_model_and_are_kept(
    table: Table, model: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = cache.glob("float32-*")
    (kept,) = folder.glob("logits-*")
    pixels = torch.cat(list(batches(data / vision.TEST, model, size=COUNT)))
    with torch.no_grad():
        logits = tf.ViTForImageClassification.from_pretrained(model)(pixels).logits
    assert torch.allclose(torch.from_numpy(np.load(kept)), logits, atol=1e-5)
    right = (logits.argmax(1) == classes(data / vision.TEST)).double().mean().item()
    assert table.rows[0].figures[vision.TOP1] == pytest.approx(100 * right)

    monkeypatch.setattr(classifying, "batches", forbidden)
    again = classifying.answers(folder, data / vision.TEST, model, threads=1)
    assert torch.equal(again, torch.from_numpy(np.load(kept)))
    with pytest.raises(AssertionError, match="scored again"):
        classifying.answers(folder, data / vision.TRAINING, model, threads=1)
    assert list(folder.glob("logits-*")) == [kept]


def forbidden(*_: object) -> None:
    raise AssertionError("scored again")


def test_the_picture_is_written(table: Table, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    vision.draw(table, tmp_path / "vision.png")
    with Image.open(tmp_path / "vision.png") as picture:
        assert picture.size == (1320, 1632)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_calibration_pictures_reach_the_passes(model: Path, data: Path, tmp_path: Path) -> None:
    settings = {"recipe": "vit-int8-cpu", "passes": vision.ROWS[MERGED]["passes"], "calibrated": 8}
    ours.vision_model(model, data / vision.TRAINING, tmp_path, **settings)
    logits = classifying.answers(tmp_path, data / vision.TEST, model, threads=1)
    assert logits.shape == (COUNT, 10)
    facts = json.loads((tmp_path / ours.FACTS).read_text())
    assert 0.55 * WHOLE < facts["macs"] <= 0.6 * WHOLE
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum("Integer" in node.op_type for node in nodes) >= 4 * 6


def test_top1_and_divergence() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert classifying.top1(logits, torch.tensor([1, 0, 0, 1])) == 75
    own, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert classifying.divergence(own.log() + 3, other.log()) == pytest.approx(expected)
