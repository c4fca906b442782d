"""An artifact beside the uncompressed model: what is compared, and what `accept` demands."""

from pathlib import Path

import pytest
import torch

from compress.manifest import Verdict
from compress.recipe import Recipe
from compress.report import Parity
from compress.target import Artifact, File
from compress.timing import Spread
from compress.verdict import resized, rows, shortfalls


def verdict(**changes) -> Verdict:
    parity = Parity(0.1, 0.01, 0.98)
    artifact = Artifact(Path("onnx"), "onnx", {}, (File("model.onnx", 30, ""),), (), (), parity)
    values = {
        "artifact": artifact,
        "baseline_bytes": 100,
        "parity": parity,
        "speedup": Spread(2.0, 1.9, 2.1),
        "seconds": Spread(0.1, 0.1, 0.1),
        "baseline_seconds": Spread(0.2, 0.2, 0.2),
        "score": 85.0,
        "baseline_score": 86.0,
    }
    return Verdict(**{**values, **changes})


def recipe(**accept) -> Recipe:
    return Recipe.model_validate(
        {
            "summary": "x",
            "model": {"task": "feature-extraction"},
            "data": {
                "evaluation": {"tsv": "a.tsv", "columns": ["a", "b"], "label": "c", "metric": "spearman"}
            },
            "export": [{"use": "onnx"}],
            "accept": accept,
        }
    )


@pytest.mark.parametrize(
    ("accept", "problem"),
    [
        ({"min_speedup": 2.2}, "onnx: 2.00 times as fast, 2.2 demanded"),
        ({"min_cosine": 0.99}, "onnx: lowest cosine 0.9800, 0.99 demanded"),
        ({"max_drop": 0.5}, "onnx: spearman 86.000 -> 85.000, a drop of 1.000; at most 0.5 allowed"),
    ],
)
def test_what_is_not_met_is_said(accept, problem):
    assert shortfalls(recipe(**accept), [verdict()]) == (problem,)


def test_what_is_met_is_not_said():
    assert shortfalls(recipe(min_speedup=1.9, min_cosine=0.97, max_drop=1.5), [verdict()]) == ()


def test_a_gain_is_no_drop():
    assert shortfalls(recipe(max_drop=0.0), [verdict(score=87.0)]) == ()


def test_what_was_demanded_and_could_not_be_measured_is_said():
    unmeasured = verdict(speedup=None)
    assert shortfalls(recipe(min_speedup=1.0), [unmeasured]) == ()
    assert verdict().bytes == 30


def test_examples_are_repeated_to_the_shape():
    example = {"ids": torch.arange(6).view(2, 3), "pixels": torch.ones(2, 3, 4, 4)}
    made = resized(example, {"batch": 5, "sequence": 4})
    assert made["ids"].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0]]
    assert made["pixels"].shape == (5, 3, 4, 4)


def test_padding_is_left_out_of_what_is_compared():
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [99.0, 99.0]]])
    inputs = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert rows({"x": hidden}, inputs, "feature-extraction")["x"].tolist() == [[2.0, 0.0]]
    assert rows({"x": hidden}, inputs, "text-generation")["x"].tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert rows({"pooled": torch.ones(1, 2)}, inputs, "feature-extraction")["pooled"].shape == (1, 2)
    assert rows({"x": hidden}, {}, "feature-extraction")["x"] is hidden
