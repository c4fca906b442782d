"""The verbs that load a model, on a tiny one: what they print and write."""

import json

import pytest

import export
from compress.artifacts import read_artifact
from compress.cli import run
from compress.contest import inputs_for
from compress.errors import UsageError
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tiny.bert(), tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(tiny.sentences(24)))
    return path


@pytest.fixture(scope="module")
def exported(folder, texts, tmp_path_factory):
    """The float and the int8 export of one model."""
    root = tmp_path_factory.mktemp("exported")
    head = ["export", str(folder), "--task", "feature-extraction", "--to", "onnx"]
    assert run([*head, "--out", str(root / "float")]) == 0
    int8 = [
        "--precision",
        "int8",
        "--calibration",
        str(texts),
        "--set",
        "opset=23",
        "--out",
        str(root / "int8"),
    ]
    assert run([*head, *int8]) == 0
    return root / "float", root / "int8"


def test_export_writes_an_artifact_that_opens(exported):
    plain, int8 = (read_artifact(folder) for folder in exported)
    assert {spec.name for spec in plain.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert sum(file.bytes for file in int8.files) < sum(file.bytes for file in plain.files)
    inputs = inputs_for(plain, {"batch": 3, "sequence": 9})
    assert inputs["input_ids"].shape == (3, 9)
    assert inputs["input_ids"].max() < tiny.BODY["vocab_size"]
    assert (inputs["attention_mask"] == 1).all()
    assert export.load(exported[1])(**inputs).last_hidden_state.shape == (3, 9, 32)
    with pytest.raises(UsageError, match="has the dimension `sequence`, and the shape gives batch"):
        inputs_for(plain, {"batch": 3})


def test_export_refuses_an_existing_folder(folder, exported, capsys):
    assert run(["export", str(folder), "--to", "onnx", "--out", str(exported[0])]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_compare_prints_parity_speed_and_size(exported, capsys):
    arguments = ["compare", *map(str, reversed(exported)), "--shape", "2x8", "--rounds", "1", "--calls", "1"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for row in ("largest difference", "lowest cosine", "time of one call", "speed", "size"):
        assert row in shown


def test_compare_refuses_what_is_no_artifact(folder, exported, capsys):
    assert run(["compare", str(exported[0]), str(folder)]) == 3
    assert f"{folder} holds no artifact.json" in capsys.readouterr().err


def test_plan_says_what_would_change_and_writes_nothing(folder, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "bert-int8-cpu", "--model", str(folder), "--calibration", str(texts)]) == 0
    shown = capsys.readouterr().out
    assert "smooth" in shown
    assert "13 x quantized" in shown
    assert "an embedding; look-ups stay in float" in shown
    assert "A build takes about" in shown
    assert not list(tmp_path.iterdir())


def test_inspect_prints_the_structure(folder, capsys):
    assert run(["inspect", str(folder), "--task", "feature-extraction"]) == 0
    shown = capsys.readouterr().out
    assert "stack of 2 blocks" in shown
    assert "attention, 4 heads of 8" in shown


def test_apply_says_where_it_wrote_and_fails_what_is_not_accepted(folder, texts, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""\
summary: a demand that cannot be met
model: {{name: {folder}, task: feature-extraction}}
data: {{calibration: {{text: {texts}, max_length: 16}}}}
passes: [{{use: quantize}}]
export: [{{use: onnx}}]
measure: {{shape: {{batch: 2, sequence: 8}}, rounds: 1, calls: 1}}
accept: {{min_cosine: 1.0, min_speedup: 1000}}
"""
    )
    out = tmp_path / "out"
    assert run(["apply", str(recipe), "--out", str(out)]) == 4
    shown = capsys.readouterr()
    assert f"Written to {out}." in shown.out
    assert f"error: Everything is built in {out}, but not accepted: onnx: " in shown.err
    assert "1000.0 demanded" in shown.err
    assert json.loads((out / "manifest.json").read_text())["failures"]
