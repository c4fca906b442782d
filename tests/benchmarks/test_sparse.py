"""The bench of zeros, on a tiny model: its rows, and what it says of them."""

from __future__ import annotations

import gzip
from argparse import Namespace
from pathlib import Path

import pytest

import compress
from benchmarks import exported, sparse
from compress.progress import SILENT
from compress.timing import Timings
from tests import tiny


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    for number, name in enumerate((sparse.CALIBRATION, *sparse.TEXTS.values())):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(tiny.sentences(100 + number)))
    monkeypatch.setattr(sparse, "WINDOW", 32)
    monkeypatch.setattr(sparse, "TOKENS", 16)
    few = {"calibration": 4, "windows": 2, "samples": 4, "steps": 3}
    return Namespace(data=tmp_path, device="cpu", rounds=1, calls=1, threads=1, **few)


def model() -> compress.Model:
    return tiny.llama(initializer_range=0.3)


def test_each_score_and_form_has_a_row(asked: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    table = sparse.quality(model(), asked, SILENT).splitlines()
    assert table[0] == "| variant | lm_dev | wikitext2 | seconds |"
    names = [line.split("|")[1].strip() for line in table[2:]]
    pruned = [f"{form}, {score}" for form in sparse.FORMS for score in sparse.SCORES]
    healed = [f"{form}, sparsegpt, distilled" for form in sparse.FORMS]
    assert names == ["uncompressed", *pruned, *healed]
    assert capsys.readouterr().out.count("50.0 % of the pruned weights are zeros") == len(names) - 1


def test_zeros_are_stored(asked: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(variants: list, rounds: int, calls: int, baseline: str, **_: object) -> Timings:
        return Timings(baseline, calls, 1, {one.name: (1.0,) * rounds for one in variants})

    monkeypatch.setattr(exported, "measure", measured)
    rows = [line.split("|") for line in sparse.speed(model(), asked, SILENT).splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["uncompressed", *sparse.FORMS]
    assert len({row[2] for row in rows}) == 1
