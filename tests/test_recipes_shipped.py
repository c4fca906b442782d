"""Each shipped recipe, whole, on a tiny model of its kind; and what its file says about itself."""

import json
from pathlib import Path

import pytest
import torch

import compress.recipe
from compress.build import build
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
    tiny.saved(tiny.llama(), root / "text-generation")
    tiny.saved(tiny.vit(), root / "image-classification")
    tiny.pictures(root / "pictures", each=12)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_builds_and_proves_a_tiny_model(name, models, tmp_path):
    recipe = load_recipe(name)
    recipe = recipe.with_model(str(models / recipe.model.task))
    if recipe.data.calibration is None:
        recipe = recipe.with_calibration(models / "pictures")
    require_complete(recipe)
    shape = {**recipe.measure.shape, "batch": 2}
    quick = recipe.measure.model_copy(update={"rounds": 1, "calls": 1, "shape": shape})
    manifest = build(recipe.model_copy(update={"measure": quick}), tmp_path / "out")

    smooth, quantize = manifest.steps
    assert (smooth.name, quantize.name) == ("smooth", "quantize")
    assert smooth.parity.relative < 1e-4
    assert len(quantize.changes) >= 12
    assert quantize.bytes_after < 0.7 * quantize.bytes_before
    assert [verdict.artifact.target for verdict in manifest.verdicts] == [
        target.use for target in recipe.export
    ]
    for verdict in manifest.verdicts:
        assert verdict.artifact.parity.relative < 0.05
        written = {path.name for path in (tmp_path / "out" / verdict.artifact.target).iterdir()}
        assert FILES[verdict.artifact.target] <= written
        if verdict.artifact.target == "onnx":
            assert verdict.parity is not None
            assert verdict.parity.cosine > 0.9
            assert verdict.bytes < verdict.baseline_bytes
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [step["name"] for step in record["steps"]] == ["smooth", "quantize"]
    loaded = compress.load(tmp_path / "out" / "checkpoint")
    with torch.no_grad():
        outputs = loaded.module(**loaded.example)
    assert torch.isfinite(next(iter(outputs.values()))).all()


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
