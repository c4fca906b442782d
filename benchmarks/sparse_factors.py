"""`python -m benchmarks.sparse_factors`: sparse codes in dictionaries, against low rank of the same bytes, all trained.

The classifier in the folder `--model` is compressed to the share `--keep` of its linear maps: by `factorize_sparse`,
by `factorize` with `distill`, and by `train_ranks`. All train for as many steps on the same sentences of `--data`, with
the same losses, once for each of `--seeds`. Beside them stands `factorize` alone, which nothing trained. As Markdown:
stored megabytes, multiply-accumulates of a batch, accuracy on the held-out sentences and the divergence of the classes
from the original's there (the mean over seeds, the least and the most), and milliseconds of a batch in ONNX Runtime, in
alternating rounds, one process each; with `--rounds 0`, without these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import kl_div

import compress
from benchmarks.exported import Row, Run, add_timing, markdown, sizes
from benchmarks.ranks import CALIBRATED_ON, TEST, TRAINING, evaluation, source
from compress.console import hush, progress
from compress.data import Source, batches
from compress.evaluate import evaluate
from compress.labels import labelled_batches
from compress.passes.base import Pass
from compress.progress import Observer

EVERY = 10**9
"""More sentences than there are: all of them."""


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer, tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        print(f"\n{markdown(_rows(arguments, run, observer))}")
    return 0


def _rows(arguments: argparse.Namespace, run: Run, observer: Observer) -> list[Row]:
    model = compress.load_model(arguments.model, task="text-classification")
    inputs = next(iter(batches(source(arguments, arguments.timed), model)))
    rows: list[Row] = []
    variants = []
    for name, passes in {"original": None, **_variants(arguments)}.items():
        made = [model] if passes is None else _made(name, model, passes, arguments, observer)
        found = [evaluate(one.module, evaluation(arguments.data), one).value for one in made]
        moved = [divergence(model, one, arguments.data / TEST) for one in made]
        print(f"{name}: {_listed(found)} %, {_listed(moved, 4)}", file=sys.stderr, flush=True)
        rows.append(_row(name, made[0], found, moved))
        variants += [run.written(name, made[0], inputs)] if run.rounds else []
    return run.with_times(rows, variants)


def _variants(arguments: argparse.Namespace) -> dict[str, list[Pass]]:
    trained: dict[str, Any] = {
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "task": arguments.task,
        "precision": "auto",
    }
    keep = arguments.keep
    every: Mapping[str, list[Pass]] = {
        "factorize": [compress.Factorize(keep=keep)],
        "factorize, distill": [compress.Factorize(keep=keep), compress.Distill(**trained)],
        "train_ranks": [compress.TrainRanks(keep=keep, **trained)],
        "factorize_sparse": [compress.FactorizeSparse(keep=keep, atoms=arguments.atoms, **trained)],
    }
    return {name: every[name] for name in arguments.only or every}


def _made(
    name: str,
    model: compress.Model,
    passes: Sequence[Pass],
    arguments: argparse.Namespace,
    observer: Observer,
) -> list[compress.Model]:
    """The model that `passes` make of `model`, once for each seed."""
    calibration = batches(source(arguments, CALIBRATED_ON), model)
    training = labelled_batches(source(arguments, arguments.samples, "label"), model)
    made = []
    for seed in arguments.seeds:
        begun = time.perf_counter()
        outcome = compress.apply(
            model,
            passes,
            calibration=calibration,
            training=training,
            device=arguments.device,
            seed=seed,
            observer=observer,
        )
        made.append(outcome.model)
        minutes = (time.perf_counter() - begun) / 60
        print(f"{name}: {minutes:.1f} minutes; {outcome.steps[-1].changes[-1]}", file=sys.stderr)
    return made


def divergence(reference: compress.Model, model: compress.Model, file: Path) -> float:
    """The mean Kullback-Leibler divergence, in nats, of the classes of `model` from those of `reference` over the
    sentences of `file`. It asks no labels, and says more than accuracy does about small differences."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches(Source(tsv=file, column="sentence", samples=EVERY, batch_size=64), reference):
            wanted, given = (one.module(**batch).logits.log_softmax(-1) for one in (reference, model))
            total += float(kl_div(given, wanted, reduction="sum", log_target=True))
            count += len(given)
    return total / count


def _row(name: str, model: compress.Model, found: Sequence[float], moved: Sequence[float]) -> Row:
    return {
        "variant": name,
        **sizes(model),
        "accuracy, %": _spread(found, 2),
        "divergence": _spread(moved, 4),
    }


def _spread(found: Sequence[float], digits: int) -> str:
    """The mean, and the least and the most where they are several."""
    ends = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{ends}"


def _listed(found: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{one:.{digits}f}" for one in found)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_factors", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TRAINING} and {TEST}")
    parser.add_argument("--model", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--atoms", type=float, help="of `factorize_sparse`")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--task", type=float, default=0.5, help="what the classes count beside the teacher")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=12800, help="sentences to train on")
    parser.add_argument("--timed", type=int, default=8, help="sentences in the batch that is timed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="these variants alone, and the original")
    parser.add_argument("--device", default="cpu")
    add_timing(parser, calls=20)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
