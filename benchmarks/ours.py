"""How modelpress makes its artifacts: through the public API, with the shipped recipes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.model import Model
    from compress.recipe import Recipe

FACTS = "facts.json"
"""Beside an artifact of `language_model`: the seconds that its passes took, and its MACs a token at 512 tokens."""


def sentence_encoder_int8(model: Path, _: Sequence[str], into: Path) -> None:
    """The recipe `minilm-int8`, which names the calibration text itself, as ONNX for a CPU."""
    import compress
    import export

    loaded = compress.load_model(str(model), task="feature-extraction")
    outcome = compress.apply(loaded, "minilm-int8")
    export.Onnx(runtime="cpu").write(outcome.model, into)


def language_model(
    model: Path,
    texts: Sequence[str],
    into: Path,
    recipe: str | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A shipped recipe, or passes as they stand in one, trained and calibrated on `texts`, as ONNX for a CPU."""
    import compress
    import export

    loaded = compress.load_model(model, task="text-generation")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "training.txt"
        file.write_text("".join(texts), encoding="utf-8")
        wanted = _recipe(recipe, passes).with_training(file)
        begun = time.perf_counter()
        outcome = compress.apply(loaded, wanted)
        seconds = time.perf_counter() - begun if wanted.passes else 0.0
    export.Onnx(runtime="cpu").write(outcome.model, into)
    facts = {"seconds": seconds, "macs": _macs(outcome.model) / 512}
    (into / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _recipe(name: str | None, passes: Sequence[Mapping[str, Any]]) -> Recipe:
    from compress.recipe import Recipe, load_recipe

    if name is not None:
        return load_recipe(name)
    parts = {"summary": "A row", "model": {"task": "text-generation"}, "export": [{"use": "onnx"}]}
    return Recipe.model_validate({**parts, "passes": passes})


def _macs(model: Model) -> int:
    """Multiply-accumulates of one window of 512 tokens."""
    import torch

    ids = torch.ones(1, 512, dtype=torch.long)
    return replace(model, example={"input_ids": ids, "attention_mask": ids}).graph.macs[""]
