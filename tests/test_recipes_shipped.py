"""Each shipped recipe, whole, on a tiny model of its kind; and what its file says about itself."""

import json
from pathlib import Path

import pytest
import torch

import compress.recipe
from compress.build import build
from compress.data import Source
from compress.recipe import load_recipe, require_complete, schema, shipped_recipes
from tests import tiny

FOLDER = Path(compress.recipe.__file__).parents[1] / "recipes"
FILES = {
    "onnx": {"model.onnx", "artifact.json", "config.json"},
    "tensorrt": {"model.engine", "engine.json"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each kind of model that the recipes are for, and pictures to calibrate on."""
    root = tmp_path_factory.mktemp("models")
    tiny.saved(tiny.bert(max_position_embeddings=512), root / "feature-extraction")
    tiny.saved(tiny.llama(num_hidden_layers=5), root / "text-generation")
    tiny.saved(tiny.vit(), root / "image-classification")
    tiny.pictures(root / "pictures", each=12)
    return root


def small(name, models, tmp_path):
    """The recipe `name` on a tiny model of its kind, timed once, and trained for a few steps on a text."""
    recipe = load_recipe(name)
    recipe = recipe.with_model(str(models / recipe.model.task))
    needs = {one.needs for one in recipe.passes}
    if "training" in needs:
        (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(400)))
        training = Source(text=tmp_path / "text.txt", max_length=32, samples=64)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"training": training})})
    if "calibration" in needs and recipe.data.source("calibration") is None:
        recipe = recipe.with_calibration(models / "pictures")
    require_complete(recipe)
    shape = {**recipe.measure.shape, "batch": 2}
    quick = recipe.measure.model_copy(update={"rounds": 1, "calls": 1, "shape": shape})
    # Random models answer nearly alike already: a higher learning rate takes them away from their teacher.
    gently = {"steps": 20, "learning_rate": 1e-5}
    # Two blocks leave little room for fewer tokens.
    fewer = {"merge_tokens": {"keep": 0.9}}
    passes = tuple(
        one.model_copy(update=gently if one.needs == "training" else fewer.get(one.use, {}))
        for one in recipe.passes
    )
    return recipe.model_copy(update={"measure": quick, "passes": passes})


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_builds_and_proves_a_tiny_model(name, models, tmp_path):
    recipe = small(name, models, tmp_path)
    manifest = build(recipe, tmp_path / "out")
    assert [step.name for step in manifest.steps] == [one.use for one in recipe.passes]
    assert manifest.steps[-1].bytes_after < manifest.steps[0].bytes_before
    targets = [verdict.artifact.target for verdict in manifest.verdicts]
    assert targets == [target.use for target in recipe.export]
    for verdict in manifest.verdicts:
        assert verdict.artifact.parity.relative < 0.05
        written = {path.name for path in (tmp_path / "out" / verdict.artifact.target).iterdir()}
        assert FILES[verdict.artifact.target] <= written
        if verdict.artifact.target == "onnx":
            assert verdict.parity is not None
            if "int8" in name:  # fewer blocks of a random model say nothing of a trained one
                assert verdict.parity.cosine > 0.9
            assert verdict.bytes < verdict.baseline_bytes
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [step["name"] for step in record["steps"]] == [one.use for one in recipe.passes]
    loaded = compress.load(tmp_path / "out" / "checkpoint")
    with torch.no_grad():
        outputs = loaded.module(**loaded.example)
    assert torch.isfinite(next(iter(outputs.values()))).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "int8" in name])
def test_a_shipped_int8_recipe_smooths_exactly_and_quantizes_all(name, models, tmp_path):
    recipe = small(name, models, tmp_path)
    model = compress.load_model(recipe.model.name, task=recipe.model.task)
    smooth, *_, quantize = compress.apply(model, recipe).steps
    assert smooth.parity.relative < 1e-4
    assert len(quantize.changes) >= 12
    assert quantize.bytes_after < 0.7 * quantize.bytes_before


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_names_its_schema_and_says_what_it_trades(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./recipe.schema.json"
    opening = " ".join(line.removeprefix("#").strip() for line in lines[1:8])
    assert "Trades: " in opening


def test_the_schema_beside_the_recipes_is_the_current_one():
    """Written by `modelpress schema > recipes/recipe.schema.json`."""
    assert json.loads((FOLDER / "recipe.schema.json").read_text()) == schema()


def test_the_calibration_texts_are_many_varied_and_apart():
    texts = {
        name: (FOLDER / "calibration" / f"{name}.txt").read_text().splitlines()
        for name in ("english", "heldout")
    }
    assert len(texts["english"]) == 200
    assert len(texts["heldout"]) == 64
    assert not set(texts["english"]) & set(texts["heldout"])
    lengths = [len(text.split()) for text in texts["english"]]
    assert len(set(texts["english"])) == 200
    assert min(lengths) < 5
    assert max(lengths) > 50
    assert sum(text.endswith("?") for text in texts["english"]) >= 15
