"""The benchmark of trained ranks, on a small classifier and few sentences."""

from __future__ import annotations

import gzip
import sys

from benchmarks import ranks
from tests import tiny


def test_each_size_stands_beside_truncation(tmp_path, monkeypatch, capsys):
    folder = tiny.saved(tiny.bert_classifier({0: "negative", 1: "positive"}), tmp_path / "model")
    for name in (ranks.TRAINING, ranks.TEST):
        lines = [f"{text}\t{number % 2}" for number, text in enumerate(tiny.sentences(64))]
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(["sentence\tlabel", *lines]) + "\n")
    given = f"--data {tmp_path} --model {folder} --steps 32 --learning-rate 1e-3 --batch 16 --samples 64"
    more = "--rounds 1 --calls 1 --keep 0.7 0.5"
    monkeypatch.setattr(sys, "argv", ["ranks", *given.split(), *more.split()])
    assert ranks.main() == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[2].strip() for row in rows] == [
        "original",
        *(2 * ["slice of one training", *ranks.UNTRAINED]),
    ]
    assert [row[1].strip() for row in rows] == ["100", *(4 * ["70"]), *(4 * ["50"])]
    assert all(0 <= float(row[5]) <= 100 for row in rows)
    for column in (3, 4):
        sizes = [float(row[column]) for row in rows]
        assert sizes[0] > sizes[1] > sizes[5]
    assert all(float(row[6].split()[0]) > 0 for row in rows)
