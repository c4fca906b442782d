"""The bench of folded batch norms, with a small model: its rows, and what its graphs hold."""

from __future__ import annotations

import pytest
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import ResNetConfig

from benchmarks import folded
from benchmarks.exported import Run
from compress.timing import Spread

SMALL = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 5}


def test_a_batch_norm_is_left_only_behind_a_quantized_convolution(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded, "SIDE", 32)
    rows = folded.folded(run, folded.classifier(ResNetConfig(**SMALL)))
    assert [row["variant"] for row in rows] == list(folded.VARIANTS)
    assert [row["batch norms"] for row in rows] == ["0", "0", "6", "0"]
    assert [float(row["error"]) < limit for row, limit in zip(rows, (1e-5, 1e-5, 0.1, 0.1), strict=True)] == [
        True
    ] * 4
    assert float(rows[2]["error"]) > 1e-4
    assert rows[3]["speed"] == Spread(4, 4, 4)
    assert int(rows[3]["operators"]) == int(rows[2]["operators"]) - 6


def test_the_statistics_are_not_those_of_a_new_model() -> None:
    module = folded.classifier(ResNetConfig(**SMALL)).module
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    assert len(norms) == 9
    assert all(float((norm.running_var - 1).abs().max()) > 0.01 for norm in norms)
    assert all(float(norm.running_mean.abs().max()) > 0.01 for norm in norms)
