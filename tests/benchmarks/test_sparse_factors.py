"""The benchmark of sparse factors, on a small classifier and few sentences."""

from __future__ import annotations

import copy
import gzip
import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import sparse_factors
from tests import tiny

HEAD = ["variant", "MB", "GMACs", "accuracy, %", "divergence", "ms", "speed"]


def test_each_variant_has_its_row(tmp_path, monkeypatch, capsys):
    folder = tiny.saved(tiny.bert_classifier({0: "negative", 1: "positive"}), tmp_path / "model")
    for name in (sparse_factors.TRAINING, sparse_factors.TEST):
        lines = [f"{text}\t{int(number % 4 == 0)}" for number, text in enumerate(tiny.sentences(64))]
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(["sentence\tlabel", *lines]) + "\n")
    given = f"--data {tmp_path} --model {folder} --steps 32 --learning-rate 1e-3 --batch 16 --samples 64 --keep 0.5"
    timing = "--rounds 1 --calls 1 --threads 1 --timed 2 --seeds 0 1"
    only = ["--only", "factorize", "factorize_sparse"]
    monkeypatch.setattr(sys, "argv", ["sparse_factors", *given.split(), *timing.split(), *only])
    assert sparse_factors.main() == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert head == HEAD
    assert [row[0] for row in rows] == ["original", "factorize", "factorize_sparse"]
    sizes = [float(row[1]) for row in rows]
    assert sizes[2] < 1.02 * sizes[1] < sizes[0]
    for row in rows:
        mean, *ends = [float(one) for one in re.findall(r"[\d.]+", row[3])]
        assert 0 <= min(ends, default=0) <= mean <= max(ends, default=100) <= 100
    assert "to" in rows[1][3]
    assert "to" not in rows[0][3]
    assert all(float(row[4].split()[0]) >= 0 for row in rows)


def test_divergence_is_that_of_the_classes(tmp_path):
    """Logits that are moved by a constant say the same; one class more likely does not."""
    model = tiny.bert_classifier({0: "negative", 1: "positive"})
    file = tmp_path / "sentences.tsv"
    file.write_text("\n".join(["sentence", *tiny.sentences(8)]) + "\n", encoding="utf-8")
    moved = {shift: replace(model, module=copy.deepcopy(model.module)) for shift in ((1.0, 1.0), (1.0, 0.0))}
    for shift, other in moved.items():
        other.module.classifier.bias.data += torch.tensor(shift)
    same, leaning = (sparse_factors.divergence(model, other, file) for other in moved.values())
    assert same == pytest.approx(0, abs=1e-6)
    assert leaning > 0.05
