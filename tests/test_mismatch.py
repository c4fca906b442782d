"""Whether data speaks for other data: measured, said in the outcome, the manifest and the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import Context, Distill, Factorize, Model, Smooth
from compress.cli import run
from compress.errors import DataError
from compress.mismatch import BATCHES, mismatches, relative_error
from tests import tiny
from tests.zoo import build

Batch = dict[str, Tensor]
FACTORIZE = Factorize(multiple=1, method="svd_llm", ranks="uniform", keep=0.5)


def batches(low: int, high: int, count: int = 6) -> list[Batch]:
    """Batches of tokens from `low` to below `high`."""
    generator = torch.Generator().manual_seed(low)
    example = build("llama").example
    shape = example["input_ids"].shape
    return [
        {**example, "input_ids": torch.randint(low, high, shape, generator=generator)} for _ in range(count)
    ]


def test_data_of_another_kind_is_a_caution():
    model = build("llama")
    outcome = compress.apply(model, [FACTORIZE], calibration=batches(3, 12), heldout=batches(40, 90))
    near, far = (relative_error(model, outcome.model, data) for data in (batches(3, 12), batches(40, 90)))
    assert far > 2 * near
    (caution,) = outcome.warnings
    assert caution.fact == (
        "The squared error of the compressed model's outputs, relative to the original's, is "
        f"{far:.2g} on the held-out data and {near:.2g} on the calibration data, which does not speak for the other."
    )
    assert caution.remedy == (
        "Give calibration data like that which the model is used for, and more of it; or correct `data.heldout` if it "
        "is the one that is not like that."
    )


def test_data_of_one_kind_is_none():
    outcome = compress.apply(
        build("llama"), [FACTORIZE], calibration=batches(3, 90, 24), heldout=batches(4, 90)
    )
    assert outcome.warnings == ()


def test_labels_are_no_part_of_what_is_compared():
    model = build("llama")
    compressed = compress.apply(model, [FACTORIZE], calibration=batches(3, 12)).model
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches(3, 12)]
    assert relative_error(model, compressed, labelled) == relative_error(model, compressed, batches(3, 12))


@pytest.mark.parametrize("missing", ["calibration", "heldout"])
def test_without_either_data_there_is_nothing_to_say(missing):
    model, data = build("llama"), Context(calibration=batches(3, 12), heldout=batches(40, 90))
    compressed = compress.apply(model, [FACTORIZE], calibration=data.calibration).model
    assert mismatches(model, compressed, [FACTORIZE], data)
    assert mismatches(model, compressed, [FACTORIZE], replace(data, **{missing: None})) == ()


def test_without_a_pass_that_uses_data_there_is_nothing_to_say():
    model, data = build("llama"), Context(calibration=batches(3, 12), heldout=batches(40, 90))
    compressed = compress.apply(model, [FACTORIZE], calibration=data.calibration).model
    assert mismatches(model, compressed, [], data) == ()


def test_the_data_of_the_last_pass_counts():
    model = build("llama")
    data = Context(calibration=batches(40, 90), training=batches(3, 12), heldout=batches(40, 90))
    compressed = compress.apply(model, [FACTORIZE], calibration=data.training).model
    (caution,) = mismatches(model, compressed, [FACTORIZE, Distill(steps=1)], data)
    assert "on the training data, which does not speak for the other." in caution.fact
    assert caution.remedy.startswith("Give training data like that which the model is used for")
    assert mismatches(model, compressed, [Distill(steps=1), FACTORIZE], data) == ()


def test_rounding_is_no_mismatch():
    """An exact pass moves the outputs by rounding, and twice as much of that is nothing."""
    outcome = compress.apply(build("llama"), [Smooth()], calibration=batches(3, 12), heldout=batches(40, 90))
    assert outcome.warnings == ()


def test_heldout_data_must_fit():
    with pytest.raises(DataError, match="gives the arguments `pixels`"):
        compress.apply(
            build("llama"), [FACTORIZE], calibration=batches(3, 12), heldout=[{"pixels": torch.ones(1, 3)}]
        )


class Scale(nn.Module):
    """Gives its input times `factor`, and a second output that is always the same."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.batches = factor, 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        self.batches += 1
        noise = 0 if attention_mask is None else (1 - attention_mask)[..., None] * self.factor
        return {"scaled": x * self.factor + noise, "other": x}


def scales(*factors: float) -> Sequence[Model]:
    return [Model(Scale(factor), {"x": torch.ones(2, 3)}, "fill-mask") for factor in factors]


def test_the_error_is_relative_and_a_mean_over_outputs():
    original, compressed = scales(1.0, 1.1)
    data = [{"x": torch.randn(2, 3)}, {"x": 100 * torch.randn(200, 3)}]
    assert relative_error(original, compressed, data) == pytest.approx(0.01 / 2, rel=1e-4)


def test_a_few_batches_are_enough():
    original, compressed = scales(1.0, 1.1)
    relative_error(original, compressed, [{"x": torch.ones(2, 3)}] * 9)
    assert compressed.module.batches == BATCHES


def test_padding_is_left_out():
    original, compressed = scales(1.0, 1.1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    padded = {"x": torch.randn(2, 3, 4) * mask[..., None], "attention_mask": mask}
    assert relative_error(original, compressed, [padded]) == pytest.approx(0.01 / 2, rel=1e-4)


def test_masked_values_are_left_out():
    original, compressed = scales(1.0, 1.1)
    x = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert relative_error(original, compressed, [{"x": x}]) == pytest.approx(0.01 / 2, rel=1e-4)


def test_a_build_says_it_in_the_terminal_and_in_the_manifest(tmp_path: Path, capsys):
    model = tiny.saved(tiny.llama(), tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("the cat sat on the mat . " * 200)
    (tmp_path / "heldout.txt").write_text(" ".join(tiny.sentences(60)))
    recipe = {
        "summary": "a test",
        "model": {"name": str(model), "task": "text-generation"},
        "data": {name: {"text": f"{name}.txt", "max_length": 32} for name in ("calibration", "heldout")},
        "passes": [FACTORIZE.model_dump(mode="json", exclude={"scope"})],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["apply", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (warning,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
    assert "Warnings" in printed
    assert "on the calibration data, which does not speak for the other." in warning["fact"]
    assert warning["remedy"].startswith("Give calibration data like that")
    for word in (*warning["fact"].split(), *warning["remedy"].split()):
        assert word in printed
