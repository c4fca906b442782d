"""Where activations have outliers: the figures, and what `inspect --outliers` prints of them."""

from __future__ import annotations

import json

import pytest
import torch

from compress.cli import run
from compress.numerics.affine import affine
from compress.numerics.outliers import Spread, rounding_noise
from compress.outliers import outliers
from compress.passes.spreads import Place, spreads
from tests import tiny
from tests.zoo import build


def spread(*parts: torch.Tensor) -> Spread:
    found = Spread()
    for part in parts:
        found.see(part)
    return found


def test_figures_are_those_of_all_values_together():
    torch.manual_seed(0)
    values = 3 + 0.5 * torch.randn(1000, dtype=torch.float64).pow(3)
    centred = values - values.mean()
    expected = centred.pow(4).mean() / centred.square().mean() ** 2
    found = spread(values[:300], values[300:].reshape(7, 100))
    assert found.kurtosis == pytest.approx(float(expected), rel=1e-9)
    assert (found.count, found.largest) == (1000, float(values.abs().max()))


def test_kurtosis_is_three_of_a_normal_distribution_and_one_of_a_constant():
    torch.manual_seed(0)
    assert spread(torch.randn(200_000)).kurtosis == pytest.approx(3, abs=0.05)
    assert spread(torch.tensor([-1.0, 1.0])).kurtosis == 1
    assert spread(torch.full((5,), 0.3)).kurtosis == 1


def test_noise_is_what_rounding_adds():
    torch.manual_seed(0)
    values = torch.randn(100_000)
    values[0] = 50
    scale, zero, low, high = affine(float(values.min()), float(values.max()), "asymmetric")
    rounded = ((values / scale).round().add(zero).clamp(low, high) - zero) * scale
    measured = (rounded - values).square().mean() / values.square().mean()
    assert float(rounding_noise(values)) == pytest.approx(float(measured), rel=0.02)


def test_layers_that_are_called_by_keyword_are_heard():
    class Keyword(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(input=x)

    place, x = Place("map", "linear input"), torch.randn(3, 5, 4)
    found = spreads(Keyword().eval(), [place], [{"x": x}])
    assert found[place].largest == float(x.abs().max())


def test_noise_has_no_scale_and_gradients_at_the_ends_of_the_range():
    torch.manual_seed(0)
    values = torch.randn(1000).requires_grad_()
    assert rounding_noise(values).item() == pytest.approx(rounding_noise(1000 * values).item())
    rounding_noise(values).backward()
    assert values.grad[values.argmax()] > 0 > values.grad[values.argmin()]
    assert float(rounding_noise(torch.zeros(3))) == 0


def test_every_kind_of_place_is_watched():
    found = outliers(build("llama"))
    counts = {what: len([one for one in found if one.what == what]) for what in {one.what for one in found}}
    # Three blocks, two norms each and one at the end; four inputs a block: of queries, output, up and down.
    assert counts == {
        "residual": 3,
        "attention output": 3,
        "feed-forward output": 3,
        "norm output": 7,
        "linear input": 12,
    }


def test_a_planted_outlier_is_found_where_it_is():
    model = tiny.bert()
    with torch.no_grad():
        model.module.encoder.layer[1].output.LayerNorm.weight[3] = 60
    found = {(one.what, one.path): one for one in outliers(model)}
    planted = found["residual", "encoder.layer.1"]
    assert planted.largest > 20
    assert planted.kurtosis > 15
    assert found["residual", "encoder.layer.0"].kurtosis < 5


def test_padding_is_left_out():
    model = tiny.bert()
    with torch.no_grad():
        model.module.embeddings.word_embeddings.weight[0] = 0  # as different from others as it can be
    batch = model.example
    cut = [
        {
            name: value[row : row + 1, : int(batch["attention_mask"][row].sum())]
            for name, value in batch.items()
        }
        for row in range(2)
    ]
    for padded, alone in zip(outliers(model), outliers(model, cut), strict=True):
        assert padded.largest == pytest.approx(alone.largest, rel=1e-4)
        assert padded.kurtosis == pytest.approx(alone.kurtosis, rel=1e-4)


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    folder, texts = tiny.saved(tiny.bert(), tmp_path / "bert"), tmp_path / "texts.txt"
    texts.write_text("\n".join(tiny.sentences(8)))
    asked = [
        "inspect",
        str(folder),
        "--task",
        "feature-extraction",
        "--outliers",
        "--calibration",
        str(texts),
    ]
    assert run(asked) == 0
    shown = capsys.readouterr().out
    assert "residual, largest and mean" in shown
    assert "encoder.layer.1.attention.output.LayerNorm" in shown
    assert run([*asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0].keys() == {"what", "path", "largest", "kurtosis"}


def test_data_without_the_report_is_refused(capsys):
    assert run(["inspect", "nowhere", "--json"]) == 2
    assert "--json goes with --outliers.\nAdd --outliers, or leave --json out." in capsys.readouterr().err
