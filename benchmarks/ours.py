"""How modelpress makes its artifacts: through the public API, with the shipped recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def sentence_encoder_int8(model: Path, _: Sequence[str], into: Path) -> None:
    """The recipe `minilm-int8`, which names the calibration text itself, as ONNX for a CPU."""
    import compress
    import export

    loaded = compress.load_model(str(model), task="feature-extraction")
    outcome = compress.apply(loaded, "minilm-int8")
    export.Onnx(runtime="cpu").write(outcome.model, into)
