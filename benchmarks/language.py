"""A causal language model with fewer layers and smaller matrices: our passes against the baselines that users know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import decoding, ours
from benchmarks.builds import Made, build_all, model_bytes
from benchmarks.machine import this_machine
from benchmarks.results import Row, Table, Upwards
from compress.console import progress
from compress.errors import UsageError
from compress.progress import Observer, task, track
from compress.timing import Timings, Variant, measure

BASELINE = "float32"
TRAINING = "lm_calibration.txt.gz"
TEXTS = {"lm_dev": "lm_dev.txt.gz", "wikitext2": "wikitext2_valid.txt.gz"}
VERSIONS = ("modelpress", "torch", "transformers", "onnx", "onnxruntime")
PACKAGES = (*VERSIONS, "matplotlib")

MACS, MINUTES = "MMACs a token", "minutes to make"
FIGURES = {
    MACS: ".2f",
    **{f"{text}: {what}": ".3f" for text in TEXTS for what in ("log-perplexity", "added")},
    MINUTES: ".1f",
}
UPWARDS = Upwards("lm_dev: added", 0.0, "added log-perplexity on lm_dev", "wikitext2: added")


@dataclass(frozen=True)
class Shape:
    """`batch` x `new` tokens after `past` ones in the cache."""

    batch: int
    new: int
    past: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.new}" + (f" after {self.past}" if self.past else "")


SHAPES = (Shape(1, 512, 0), Shape(4, 128, 0), Shape(1, 1, 511))

PASSES: dict[str, Mapping[str, Any]] = {
    BASELINE: {"passes": []},
    "drop_layers, 3 of 12": {"passes": [{"use": "drop_layers", "remove": 3}]},
    "fuse_layers, 3 of 12": {"recipe": "causal-lm-fewer-layers"},
    "factorize svd, 80 %": {
        "passes": [{"use": "factorize", "keep": 0.8, "method": "svd", "ranks": "uniform"}]
    },
    "factorize svd_llm, 80 %": {
        "passes": [{"use": "factorize", "keep": 0.8, "method": "svd_llm", "ranks": "uniform"}]
    },
    "factorize, 80 %": {"passes": [{"use": "factorize", "keep": 0.8}]},
    "factorize + distill, 80 %": {"recipe": "causal-lm-low-rank"},
}
"""The rows: a shipped recipe, or passes as they stand in one."""


def run(data: Path, model: Path | None, cache: Path, rounds: int, calls: int, threads: int) -> Table:
    """Build what is not built, measure speed and quality, and give the table."""
    if model is None:
        raise UsageError("This table needs a language model.", "Give its folder: `--model FOLDER`.")
    built = build_all(ours.builds(ours.language_model, PASSES), model, data / TRAINING, cache)
    with progress() as observer:
        timings = {str(shape): _time(built, shape, rounds, calls, threads, observer) for shape in SHAPES}
        losses = _losses(built, data, model, threads, observer)
    return Table(
        title=f"{model.name}, a causal language model",
        machine=this_machine(VERSIONS),
        rounds=rounds,
        calls=calls,
        threads=threads,
        baseline=BASELINE,
        shapes=tuple(timings),
        figures=FIGURES,
        upwards=UPWARDS,
        rows=tuple(_row(name, built[name].folder, losses, timings) for name in PASSES),
    )


def _time(
    built: Mapping[str, Made], shape: Shape, rounds: int, calls: int, threads: int, observer: Observer
) -> Timings:
    asked = {"batch": shape.batch, "new": shape.new, "past": shape.past}
    variants = [
        Variant(name, "benchmarks.decoding:timed", {"folder": str(made.folder), **asked})
        for name, made in built.items()
    ]
    with task(observer, f"{shape} tokens"):
        return measure(variants, rounds, calls, BASELINE, threads=threads, observer=observer)


def _losses(
    built: Mapping[str, Made], data: Path, model: Path, threads: int, observer: Observer
) -> dict[str, dict[str, float]]:
    """Log-perplexity by text and row."""
    import compress

    loaded = compress.load_model(model, task="text-generation")
    texts = {text: decoding.scored(data / file, loaded) for text, file in TEXTS.items()}
    return {
        text: {
            name: decoding.log_perplexity(made.folder, tokens, threads)
            for name, made in track(observer, f"log-perplexity on {text}", list(built.items()))
        }
        for text, tokens in texts.items()
    }


def _row(
    name: str, folder: Path, losses: Mapping[str, Mapping[str, float]], timings: Mapping[str, Timings]
) -> Row:
    facts = ours.facts(folder)
    figures = {MACS: facts["macs"] / 1e6, MINUTES: facts["seconds"] / 60}
    for text, found in losses.items():
        figures[f"{text}: log-perplexity"] = found[name]
        figures[f"{text}: added"] = found[name] - found[BASELINE]
    return Row(
        name=name,
        bytes=model_bytes(folder),
        figures=figures,
        seconds={shape: timing.seconds(name) for shape, timing in timings.items()},
        speedup={shape: timing.speedup(name) for shape, timing in timings.items()},
    )
