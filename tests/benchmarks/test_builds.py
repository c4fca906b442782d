"""Artifacts of the bench are made once, and again when what they were made from changes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.builds import Build, build_all
from compress.errors import DataError


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


def named(_: Path, data: Path, into: Path) -> None:
    (into / "weights").write_text(data.name)


def test_data_in_a_file_is_known_by_its_bytes(model: Path, tmp_path: Path) -> None:
    builds = {"first": Build(named, ("numpy",))}
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    with pytest.raises(DataError, match="one.txt does not exist"):
        build_all(builds, model, one, tmp_path / "cache")
    one.write_text("a")
    made = build_all(builds, model, one, tmp_path / "cache")["first"]
    assert (made.folder / "weights").read_text() == "one.txt"
    other.write_text("a")
    assert build_all(builds, model, other, tmp_path / "cache")["first"] == made
    other.write_text("b")
    assert build_all(builds, model, other, tmp_path / "cache")["first"].key != made.key


def test_sources_are_packages_or_single_modules(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("package/__init__.py", "package/part.py", "alone.py", "stranger.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    builds = {"first": Build(copied, (), sources=("package", "alone"))}
    keys = [build_all(builds, model, [], tmp_path / "cache")["first"].key]
    for name in ("stranger.py", "package/part.py", "alone.py"):
        (tmp_path / name).write_text("changed = True")
        keys.append(build_all(builds, model, [], tmp_path / "cache")["first"].key)
    assert [one == other for one, other in pairwise(keys)] == [True, False, False]


def test_a_build_that_fails_leaves_nothing_to_be_reused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        build_all({"broken": Build(halfway, ("numpy",))}, model, [], tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.name == "weights"]
