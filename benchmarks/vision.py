"""A vision transformer on fewer tokens: the methods of `merge_tokens` at equal places, alone and with int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import classifying, curves, ours
from benchmarks.builds import Made, build_all, model_bytes
from benchmarks.machine import this_machine
from benchmarks.pictures import classes
from benchmarks.results import Row, Table, Upwards
from compress.console import progress
from compress.errors import UsageError
from compress.progress import Observer, track
from compress.timing import Timings, Variant, measure

if TYPE_CHECKING:
    from torch import Tensor

BASELINE = "float32"
TRAINING, TEST = "cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"
VERSIONS = ("modelpress", "torch", "transformers", "onnx", "onnxruntime")
PACKAGES = (*VERSIONS, "matplotlib")

BATCH = 16
SHAPE = f"batch of {BATCH}"
MACS, SHARE, TOP1, LOST, DIVERGENCE = (
    "MMACs a picture",
    "MACs left, %",
    "top-1, %",
    "points lost",
    "divergence",
)
FIGURES = {MACS: ".0f", SHARE: ".1f", TOP1: ".2f", LOST: ".2f", DIVERGENCE: ".4f"}
UPWARDS = Upwards(LOST, 0.0, "points of top-1 lost", TOP1)
PANELS = (
    curves.Panel(SHARE, LOST, "points of top-1 lost (better upwards)"),
    curves.Panel(SHARE, DIVERGENCE, "divergence from float32 (better upwards)", logarithmic=True),
    curves.Panel(None, LOST, "points of top-1 lost (better upwards)"),
)

METHODS = ("transform", "tome", "prune", "sample", "cluster")
FEWER = (20, 30, 40, 50, 60)
"""Per cent of the multiply-accumulates that go."""


def _merge(fewer: int, method: str = "transform") -> dict[str, Any]:
    return {"use": "merge_tokens", "method": method, "keep": (100 - fewer) / 100}


ROWS: dict[str, Mapping[str, Any]] = {
    BASELINE: {},
    **{
        f"{method}, {fewer} % fewer MACs": {"passes": [_merge(fewer, method)]}
        for method in METHODS
        for fewer in FEWER
    },
    "transform tuned, 40 % fewer MACs": {"passes": [_merge(40)], "calibrated": 512},
    "int8": {"recipe": "vit-int8-cpu", "calibrated": 128},
    "int8 + transform, 40 % fewer MACs": {
        "passes": [_merge(40)],
        "recipe": "vit-int8-cpu",
        "calibrated": 128,
    },
}
"""The rows: settings of `ours.vision_model`. Without calibration all methods but `cluster` reduce before the same
blocks."""


def run(data: Path, model: Path | None, cache: Path, rounds: int, calls: int, threads: int) -> Table:
    """Build what is not built, score what is not scored, measure speed, and give the table."""
    if model is None:
        raise UsageError("This table needs a vision transformer.", "Give its folder: `--model FOLDER`.")
    wanted = classes(data / TEST)
    built = build_all(ours.builds(ours.vision_model, ROWS), model, data / TRAINING, cache)
    with progress() as observer:
        logits = {
            name: classifying.answers(made.folder, data / TEST, model, threads)
            for name, made in track(observer, f"answers to {len(wanted)} pictures", list(built.items()))
        }
        timings = _time(built, rounds, calls, threads, observer)
    return Table(
        title=f"{model.name}, a vision transformer",
        machine=this_machine(VERSIONS),
        rounds=rounds,
        calls=calls,
        threads=threads,
        baseline=BASELINE,
        shapes=(SHAPE,),
        figures=FIGURES,
        upwards=UPWARDS,
        rows=tuple(_row(name, built, logits, wanted, timings) for name in ROWS),
    )


def draw(table: Table, file: Path) -> None:
    """Write the picture of `table`: one line a method, over the multiply-accumulates left and over the speed."""
    curves.picture(table, PANELS).savefig(file, dpi=120)


def _time(built: Mapping[str, Made], rounds: int, calls: int, threads: int, observer: Observer) -> Timings:
    variants = [
        Variant(name, "benchmarks.classifying:timed", {"folder": str(made.folder), "batch": BATCH})
        for name, made in built.items()
    ]
    return measure(variants, rounds, calls, BASELINE, threads=threads, observer=observer)


def _row(
    name: str,
    built: Mapping[str, Made],
    logits: Mapping[str, Tensor],
    wanted: Tensor,
    timings: Timings,
) -> Row:
    macs, whole = (ours.facts(built[one].folder)["macs"] for one in (name, BASELINE))
    right, before = (classifying.top1(logits[one], wanted) for one in (name, BASELINE))
    return Row(
        name=name,
        bytes=model_bytes(built[name].folder),
        figures={
            MACS: macs / 1e6,
            SHARE: 100 * macs / whole,
            TOP1: right,
            LOST: before - right,
            DIVERGENCE: classifying.divergence(logits[BASELINE], logits[name]),
        },
        seconds={SHAPE: timings.seconds(name)},
        speedup={SHAPE: timings.speedup(name)},
    )
