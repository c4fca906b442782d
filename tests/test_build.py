"""The whole flow on small models: recipe to folder, proof, resume, acceptance."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import compress
import export
from compress.build import artifact_names, build, require_accepted
from compress.compare import forward
from compress.errors import NotAccepted, OutputError, RecipeError
from compress.plan import plan
from compress.recipe import Recipe
from compress.summary import tables
from tests import tiny
from tests.zoo import build as zoo


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Smooth and quantize a small BERT for ONNX Runtime, calibrated on text through a word-piece tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    zoo("bert").module.save_pretrained(folder)
    write_tokenizer(folder)
    words = [f"w{number} w{number * 7 % 40} w{number * 3 % 50} w1 w2" for number in range(60)]
    (folder / "calibration.txt").write_text("\n".join(words[:40]))
    (folder / "heldout.txt").write_text("\n".join(words[40:]))
    return Recipe.model_validate(
        {
            "summary": "a test",
            "model": {"name": str(folder), "task": "feature-extraction"},
            "data": {
                "calibration": {"text": str(folder / "calibration.txt"), "max_length": 16},
                "heldout": {"text": str(folder / "heldout.txt"), "max_length": 16},
            },
            "passes": [{"use": "smooth"}, {"use": "quantize"}],
            "export": [{"use": "onnx"}],
            "measure": {"shape": {"batch": 2, "sequence": 8}, "rounds": 1, "calls": 1},
        }
    )


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def built(recipe, tmp_path_factory):
    into = tmp_path_factory.mktemp("build") / "out"
    return build(recipe, into)


def test_the_folder_holds_checkpoint_artifact_and_manifest(built):
    assert sorted(os.listdir(built.folder)) == ["checkpoint", "manifest.json", "onnx"]
    assert os.listdir(built.folder.parent) == ["out"]


def test_the_manifest_tells_what_was_done(built, recipe):
    record = json.loads((built.folder / "manifest.json").read_text())
    assert [step["name"] for step in record["steps"]] == ["smooth", "quantize"]
    assert record["recipe"]["passes"][1]["use"] == "quantize"
    assert record["versions"]["torch"] == torch.__version__
    assert record["processor"]["name"]
    (verdict,) = record["verdicts"]
    assert verdict["artifact"]["folder"] == "onnx"
    assert len(verdict["artifact"]["files"][0]["sha256"]) == 64
    assert verdict["speedup"]["median"] > 0
    assert record["model"] == recipe.model.name


def test_steps_and_verdict_are_measured(built):
    smooth, quantize = built.steps
    assert smooth.effect == "exact"
    assert smooth.parity.relative < 1e-4
    assert 1e-5 < quantize.parity.relative < 0.2
    assert quantize.bytes_after < quantize.bytes_before
    (verdict,) = built.verdicts
    assert verdict.parity.cosine > 0.98
    assert verdict.bytes < verdict.baseline_bytes
    assert verdict.score is None


def test_the_checkpoint_and_the_artifact_agree(built):
    model = compress.load(built.folder / "checkpoint")
    wanted = forward(model.module, model.example)["last_hidden_state"]
    given = export.load(built.folder / "onnx")(**model.example).last_hidden_state
    assert torch.nn.functional.cosine_similarity(wanted, given, dim=-1).min() > 0.999


def test_the_tables_name_steps_artifacts_and_skips(built):
    titles = [table.title for table in tables(built)]
    assert titles == ["Steps", "Artifacts, against the same export uncompressed (2 x 8)", "Left alone"]


def test_an_existing_folder_is_refused_before_any_work(built, recipe):
    begun = time.perf_counter()
    with pytest.raises(OutputError, match="exists and is not empty"):
        build(recipe, built.folder)
    assert time.perf_counter() - begun < 1


def test_what_is_not_accepted_is_built_all_the_same(recipe, tmp_path):
    from compress.recipe import Accept

    demanding = recipe.model_copy(update={"accept": Accept(min_cosine=1.0, min_speedup=1000)})
    manifest = build(demanding, tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()
    with pytest.raises(NotAccepted, match="lowest cosine .* 1.0 demanded") as caught:
        require_accepted(manifest)
    assert "1000.0 demanded" in caught.value.fact


def test_a_recipe_without_a_model_says_so(recipe, tmp_path):
    with pytest.raises(RecipeError, match="names no model") as caught:
        build(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": None})}),
            tmp_path / "out",
        )
    assert "--model" in caught.value.remedy


def test_a_killed_build_leaves_no_output_and_goes_on(recipe, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json(exclude_none=True))
    script = f"""
        from compress.build import build
        from compress.recipe import Recipe
        recipe = Recipe.model_validate_json(open({str(file)!r}).read())
        build(recipe, {str(tmp_path / "out")!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    steps = tmp_path / "out.partial" / "steps"
    deadline = time.monotonic() + 120
    # A kept step is renamed into place whole; until then its folder's name ends in .partial.
    while process.poll() is None and time.monotonic() < deadline:
        if steps.is_dir() and any(not entry.name.endswith(".partial") for entry in steps.iterdir()):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    manifest = build(recipe, tmp_path / "out")
    assert manifest.steps[0].resumed
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.json"]


def test_apply_gives_what_build_gives_and_writes_nothing(built, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = compress.load_model(recipe.model.name, task="feature-extraction")
    outcome = compress.apply(model, recipe)
    saved = compress.load(built.folder / "checkpoint")
    wanted, given = saved.module.state_dict(), outcome.model.module.state_dict()
    assert all(torch.equal(wanted[name], given[name]) for name in wanted)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["apply", "build", "take_part"])
def test_passes_run_on_the_device_that_is_given(recipe, tmp_path, monkeypatch, verb):
    seen = []

    def stop(model, passes, context, store=None):
        seen.append(context.device)
        raise ArithmeticError

    flow = sys.modules["compress.build"]
    monkeypatch.setattr(flow, "run", stop)
    model = compress.load_model(recipe.model.name, task="feature-extraction")
    arguments = (model, recipe) if verb == "apply" else (recipe, tmp_path / "out")
    with pytest.raises(ArithmeticError):
        getattr(flow, verb)(*arguments, device="cpu:0")
    assert seen == ["cpu:0"]


def test_a_plan_runs_the_passes_and_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(recipe)
    assert [step.name for step in found.steps] == ["smooth", "quantize"]
    assert all(step.changes for step in found.steps)
    assert found.seconds > 0
    assert found.disk_bytes > 0
    assert found.peak_bytes > found.disk_bytes
    assert os.listdir(tmp_path) == []


@pytest.fixture
def classifying(tmp_path) -> Recipe:
    """Train a small classifier on a table: whether a text has an even number of words, which it does not know."""
    model = tiny.saved(tiny.bert_classifier({0: "odd", 1: "even"}), tmp_path / "model")
    rows = [(text, "odd" if len(text.split()) % 2 else "even") for text in tiny.sentences(24)]
    (tmp_path / "train.tsv").write_text("text\tparity\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    table = {"tsv": str(tmp_path / "train.tsv"), "column": "text", "label": "parity"}
    return Recipe.model_validate(
        {
            "summary": "a test",
            "model": {"name": str(model), "task": "text-classification"},
            "data": {
                "training": {**table, "batch_size": 6},
                "heldout": {**table, "label": None},
                "evaluation": {**table, "metric": "accuracy"},
            },
            "passes": [
                {"use": "factorize", "multiple": 1, "keep": 0.9},
                {"use": "distill", "task": 10, "steps": 120, "learning_rate": 3e-3},
                {"use": "quantize"},
            ],
            "export": [{"use": "onnx"}],
            "measure": {"shape": {"batch": 2, "sequence": 8}, "rounds": 1, "calls": 1},
        }
    )


def test_a_build_learns_the_labels_that_a_recipe_names(classifying, tmp_path):
    manifest = build(classifying, tmp_path / "out")
    assert [step.name for step in manifest.steps] == ["factorize", "distill", "quantize"]
    assert manifest.steps[1].changes[0].what == "trained on logits and labels"
    (verdict,) = manifest.verdicts
    assert verdict.baseline_score is not None
    assert verdict.score is not None
    assert verdict.score > 85 > 70 > verdict.baseline_score


def test_folders_of_targets_of_one_kind_are_numbered():
    targets = [export.Onnx(), export.Onnx(), export.TensorRT(compute_capability=("8.6",)), export.Onnx()]
    assert artifact_names(targets) == ("onnx", "onnx-2", "tensorrt", "onnx-3")
