"""The bench of a vision transformer without norms, with a small one: what it trains on, writes and measures."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import nn

import compress
from benchmarks import norm_free, norm_free_measure, norm_free_train, pictures
from benchmarks.exported import Run
from compress.timing import Spread
from tests import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a random model in the folder `model`."""
    folder = tmp_path_factory.mktemp("norm_free")
    for seed, name in enumerate((norm_free.TRAINING, norm_free.TEST)):
        _pack(folder / name, np.random.default_rng(seed).integers(256, size=(20, 16, 16, 3), dtype=np.uint8))
    torch.manual_seed(0)
    config = tf.ViTConfig(**SIZES, image_size=tiny.SIZE, patch_size=8, num_labels=10, initializer_range=0.1)
    tf.ViTForImageClassification(config).eval().save_pretrained(folder / "model")
    facts = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "model" / "training.json").write_text(json.dumps(facts))
    return folder


def _pack(file: Path, images: np.ndarray) -> None:
    jpegs = []
    for one in images:
        packed = io.BytesIO()
        Image.fromarray(one).save(packed, "jpeg")
        jpegs.append(packed.getvalue())
    labels = np.arange(len(images), dtype=np.uint8) % 10
    data = np.frombuffer(b"".join(jpegs), np.uint8)
    np.savez(file, data=data, offsets=np.cumsum([0, *map(len, jpegs)]), labels=labels)


def settings(folder: Path, **more: object) -> argparse.Namespace:
    given = {
        "steps": 6,
        "batch": 8,
        "task": 0.5,
        "learning_rate": 1e-3,
        "precision": "float32",
        "keep_norms": False,
    }
    paths = {"data": folder, "model": folder / "model", "made": folder / "made"}
    return argparse.Namespace(**{**given, **paths, "device": "cpu", **more})


def test_it_trains_and_measures(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(norm_free_measure, "BATCH", 4)
    norm_free_train.train(settings(folder))
    assert "top-1 before: " in capsys.readouterr().out
    made = compress.load(folder / "made")
    assert {parameter.dtype for parameter in made.module.parameters()} == {torch.float16}
    assert not any(isinstance(part, nn.LayerNorm) for part in made.module.modules())
    facts = json.loads((folder / "made" / "training.json").read_text())
    assert facts.keys() == {"before", "after", "stored", "seconds"}
    rows = norm_free_measure.norm_free(run, folder, folder / "model", folder / "made")
    assert [row["variant"] for row in rows] == [
        "layer norms, not rewritten",
        "layer norms",
        "norm-free",
        "layer norms, int8",
        "norm-free, int8",
    ]
    assert [row["layer norms"] for row in rows] == ["5", "5", "0", "5", "0"]
    assert [row["points lost"] for row in rows[:2]] == ["0.00", "0.00"]
    assert [row["speed"] for row in rows] == [Spread(n, n, n) for n in (1, 2, 3, 4, 5)]
    twins = [row["speed against its layer norms"] for row in rows]
    assert twins == [Spread(n, n, n) for n in (1, 1, 3 / 2, 1, 5 / 4)]


def test_the_model_it_is_compared_with_keeps_its_norms(folder: Path) -> None:
    norm_free_train.train(settings(folder, keep_norms=True, made=folder / "kept"))
    made = compress.load(folder / "kept")
    assert [step.name for step in made.history] == ["distill"]
    assert sum(isinstance(part, nn.LayerNorm) for part in made.module.modules()) == 5


def test_batches_are_of_different_pictures(folder: Path) -> None:
    batches = norm_free_train.Varied(settings(folder, steps=3), "cpu")
    assert [tuple(one["pixel_values"].shape) for one in batches] == [(8, 3, tiny.SIZE, tiny.SIZE)] * 3
    every = torch.cat([one["pixel_values"] for one in batches]).flatten(1)
    assert len(every.unique(dim=0)) == 24
    assert torch.equal(batches[1]["pixel_values"], batches[1:][0]["pixel_values"])
    assert {tuple(one["labels"].shape) for one in batches} == {(8,)}
    with pytest.raises(IndexError):
        batches[3]


def test_pictures_are_shifted_and_mirrored() -> None:
    pixels = torch.arange(16 * 16, dtype=torch.uint8).view(1, 16, 16, 1).expand(3000, -1, -1, 3)
    found = norm_free_train.moved(pixels, torch.Generator().manual_seed(0))
    assert found.shape == pixels.shape
    # The middle is never cut away; the picture rises from left to right, or falls when mirrored.
    middle = found[:, 8, 7:9, 0].int()
    rises = middle[:, 1] - middle[:, 0]
    assert set(rises.tolist()) == {-1, 1}
    assert len({tuple(one.tolist()) for one in middle}) == 2 * 9 * 9


def test_all_pictures_of_a_file_are_decoded(folder: Path) -> None:
    found = pictures.pixels(folder / norm_free.TEST)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (20, 16, 16, 3))
    (wanted,) = pictures.batches(folder / norm_free.TEST, folder / "model", size=20)
    assert torch.equal(pictures.prepared(found, folder / "model"), wanted)


def test_training_needs_no_runtime_of_onnx() -> None:
    code = "import sys, benchmarks.norm_free_train; print({'onnx', 'onnxruntime', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
