"""Artifacts of the bench are made once, and again when what they were made from changes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.builds import Build, build_all


def copied(base: Path, texts: Sequence[str], into: Path) -> None:
    (into / "weights").write_text((base / "weights").read_text() + "+" + "".join(texts))


def halfway(base: Path, texts: Sequence[str], into: Path) -> None:
    (into / "weights").write_text("half")
    raise RuntimeError("no room")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("original")
    return tmp_path / "model"


BUILDS = {"first": Build(copied, ("numpy",)), "second": Build(copied, ("numpy",), on="first")}


def test_a_build_starts_from_the_one_it_is_on(model: Path, tmp_path: Path) -> None:
    made = build_all(BUILDS, model, ["a", "b"], tmp_path / "cache")
    assert (made["first"].folder / "weights").read_text() == "original+ab"
    assert (made["second"].folder / "weights").read_text() == "original+ab+ab"


def test_the_same_ingredients_are_not_built_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build_all(BUILDS, model, ["a"], tmp_path)
    assert capsys.readouterr().out.count("building") == 2
    assert build_all(BUILDS, model, ["a"], tmp_path) == first
    assert capsys.readouterr().out.count("as built before") == 2


def test_other_weights_texts_or_versions_are_built_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {build_all(BUILDS, model, ["a"], tmp_path)["second"].key}
    keys.add(build_all(BUILDS, model, ["b"], tmp_path)["second"].key)
    (model / "weights").write_text("trained further")
    keys.add(build_all(BUILDS, model, ["a"], tmp_path)["second"].key)
    monkeypatch.setattr("benchmarks.builds.version", lambda package: f"{package} of tomorrow")
    keys.add(build_all(BUILDS, model, ["a"], tmp_path)["second"].key)
    assert len(keys) == 4


def test_a_build_that_fails_leaves_nothing_to_be_reused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        build_all({"broken": Build(halfway, ("numpy",))}, model, [], tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.name == "weights"]
