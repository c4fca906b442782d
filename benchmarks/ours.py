"""How modelpress makes its artifacts: through the public API, with the shipped recipes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.builds import Build, Builder
from benchmarks.pictures import batches

if TYPE_CHECKING:
    from compress.model import Inputs, Model
    from compress.recipe import Recipe

FACTS = "facts.json"
"""Beside an artifact: the seconds that its passes took, and its MACs a token (of 512) or a picture."""

BATCH = 64
"""So many pictures are in a batch of calibration data."""

_ONNX = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_SOURCES = ("compress", "export", "recipes", "benchmarks.pictures")


def builds(make: Builder, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Build]:
    """A build by `make`, a function of this file, for the settings of each row."""
    return {name: Build(make, _ONNX, sources=_SOURCES, settings=settings) for name, settings in rows.items()}


def sentence_encoder_int8(model: Path, _: Sequence[str], into: Path) -> None:
    """The recipe `minilm-int8`, which names the calibration text itself, as ONNX for a CPU."""
    import compress
    import export

    loaded = compress.load_model(str(model), task="feature-extraction")
    outcome = compress.apply(loaded, "minilm-int8")
    export.Onnx(runtime="cpu").write(outcome.model, into)


def language_model(
    model: Path,
    text: Path,
    into: Path,
    recipe: str | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Passes as they stand in a recipe, then those of a shipped one, trained and calibrated on the file `text`."""
    import torch

    import compress

    loaded = compress.load_model(model, task="text-generation")
    done, seconds = _make(loaded, _recipe(loaded, recipe, passes).with_training(text), into)
    ids = torch.ones(1, 512, dtype=torch.long)
    window = replace(done, example={"input_ids": ids, "attention_mask": ids})
    _note(into, seconds, window.graph.macs[""] / 512)


def vision_model(
    model: Path,
    pictures: Path,
    into: Path,
    recipe: str | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
    calibrated: int = 0,
) -> None:
    """Passes, then those of a shipped recipe, calibrated on the first `calibrated` of the packed `pictures`."""
    import compress

    loaded = compress.load_model(model, task="image-classification")
    data = [{"pixel_values": pixels} for pixels in batches(pictures, model, BATCH, calibrated)]
    done, seconds = _make(loaded, _recipe(loaded, recipe, passes), into, data or None)
    _note(into, seconds, done.graph.macs[""] / len(done.example["pixel_values"]))


def _recipe(model: Model, name: str | None, passes: Sequence[Mapping[str, Any]]) -> Recipe:
    """`passes`, and then those of the shipped recipe `name` with its data, if one is named."""
    from compress.recipe import Recipe, load_recipe

    parts = {"summary": "A row", "model": {"task": model.task}, "export": [{"use": "onnx"}]}
    own = Recipe.model_validate({**parts, "passes": passes})
    if name is None:
        return own
    shipped = load_recipe(name)
    return shipped.model_copy(update={"passes": (*own.passes, *shipped.passes)})


def _make(
    model: Model, recipe: Recipe, into: Path, calibration: Sequence[Inputs] | None = None
) -> tuple[Model, float]:
    """Run the passes and write ONNX for a CPU. Gives the compressed model, and the seconds that the passes took."""
    import compress
    import export

    begun = time.perf_counter()
    outcome = compress.apply(model, recipe, calibration=calibration)
    seconds = time.perf_counter() - begun if recipe.passes else 0.0
    export.Onnx(runtime="cpu").write(outcome.model, into)
    return outcome.model, seconds


def facts(folder: Path) -> dict[str, float]:
    """What is noted beside the artifact in `folder`: `seconds` and `macs`."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def _note(into: Path, seconds: float, macs: float) -> None:
    (into / FACTS).write_text(json.dumps({"seconds": seconds, "macs": macs}), encoding="utf-8")
