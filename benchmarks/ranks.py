"""`python -m benchmarks.ranks`: one training of factors, and its slices at several sizes, against truncation.

The classifier in the folder `--model` is factored by `train_ranks` on the sentences of `--data`, and then cut by
`slice_ranks` to each of `--keep`. Beside each slice stand factors of the same size that nothing trained: plain
truncated SVD, with the same share for every map or with one budget, and `factorize` as it is by default. As Markdown:
stored megabytes, multiply-accumulates of a batch, accuracy on the held-out sentences, and milliseconds of a batch in
ONNX Runtime, in alternating rounds, one process each; with `--rounds 0`, without these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import compress
from benchmarks.exported import Row, Run, add_timing, markdown, sizes
from compress.console import hush, progress
from compress.data import Source, batches
from compress.evaluate import Evaluation, evaluate
from compress.labels import labelled_batches
from compress.progress import Observer

TRAINING, TEST = "sst2_train.tsv.gz", "sst2_dev.tsv.gz"
CALIBRATED_ON = 512
UNTRAINED = {
    "truncated SVD, one share": {"method": "svd", "ranks": "uniform"},
    "truncated SVD, one budget": {"method": "svd"},
    "factorize": {},
}


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer, tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        print(f"\n{markdown(_rows(arguments, run))}")
    return 0


def _rows(arguments: argparse.Namespace, run: Run) -> list[Row]:
    model = compress.load_model(arguments.model, task="text-classification")
    inputs = next(iter(batches(source(arguments, arguments.timed), model)))
    rows: list[Row] = []
    variants = []
    for keep, name, made in _variants(model, arguments, run.observer):
        score = evaluate(made.module, evaluation(arguments.data), made).value
        row: Row = {"kept, %": f"{100 * keep:.0f}", "": name, **sizes(made), "accuracy, %": f"{score:.2f}"}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        variants += [run.written(f"{name} {keep}", made, inputs)] if run.rounds else []
    return run.with_times(rows, variants)


def _variants(
    model: compress.Model, arguments: argparse.Namespace, observer: Observer
) -> Iterator[tuple[float, str, compress.Model]]:
    """The share that is kept, the name, and the model of each row."""
    yield 1.0, "original", model
    calibration = batches(source(arguments, CALIBRATED_ON), model)
    training = labelled_batches(source(arguments, arguments.samples, "label"), model)
    settings = compress.TrainRanks(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        dropout=arguments.dropout,
        task=arguments.task,
        keep=None,
        precision="auto",
    )
    begun = time.perf_counter()
    whole = compress.apply(
        model,
        [settings],
        calibration=calibration,
        training=training,
        device=arguments.device,
        observer=observer,
    ).model
    print(
        f"Trained in {(time.perf_counter() - begun) / 60:.1f} minutes: {whole.history[-1].changes[0]}",
        file=sys.stderr,
    )
    for keep in arguments.keep:
        sliced = compress.apply(whole, [compress.SliceRanks(keep=keep)], calibration=calibration)
        yield keep, "slice of one training", sliced.model
        for name, untrained in UNTRAINED.items():
            passes = [compress.Factorize(keep=keep, **untrained)]
            yield keep, name, compress.apply(model, passes, calibration=calibration).model


def source(arguments: argparse.Namespace, samples: int, label: str | None = None) -> Source:
    """So many of the training sentences of `arguments.data`, in batches of `arguments.batch`."""
    file = arguments.data / TRAINING
    return Source(tsv=file, column="sentence", label=label, samples=samples, batch_size=arguments.batch)


def evaluation(data: Path) -> Evaluation:
    """Accuracy on the held-out sentences in the folder `data`."""
    return Evaluation(tsv=data / TEST, column="sentence", label="label", metric="accuracy", batch_size=64)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TRAINING} and {TEST}")
    parser.add_argument("--model", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.66, 0.5, 0.33])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--task", type=float, default=0.5, help="what the classes count beside the teacher")
    parser.add_argument("--dropout", choices=("model", "layer"), default="model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=12800, help="sentences to train on")
    parser.add_argument("--timed", type=int, default=8, help="sentences in the batch that is timed")
    parser.add_argument("--device", default="cpu")
    add_timing(parser, calls=20)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
