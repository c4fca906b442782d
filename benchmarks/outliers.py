"""`python -m benchmarks.outliers`: gates, clipped softmax and a penalty on outliers, for a language model in 8 bits.

    python -m benchmarks.outliers train   --model FOLDER --data FOLDER --out FOLDER --device cuda
    python -m benchmarks.outliers measure --model FOLDER --data FOLDER --out FOLDER

`train` writes a checkpoint a variant, and passes over those that are there; it needs neither ONNX Runtime nor a
network. `measure` scores each in float and in 8 bits (by the pass `quantize`, in torch), with and without `smooth`
before it, and tabulates that with the outliers, as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import compress
from compress.console import hush, progress
from compress.data import Source, batches
from compress.encoding import windows
from compress.passes.base import Batches
from compress.passes.calming import calm
from compress.passes.spreads import linear_inputs
from compress.progress import Observer, track
from compress.reading import whole_text

CALIBRATION = "lm_calibration.txt.gz"
TEXTS = {"lm_dev": "lm_dev.txt.gz", "wikitext2": "wikitext2_valid.txt.gz"}
WINDOW = 512
FLOAT = "uncompressed"

VARIANTS: dict[str, Callable[..., compress.Pass]] = {
    "penalty alone": compress.Distill,
    "gates, linear": compress.GateAttention,
    "gates, mlp": partial(compress.GateAttention, kind="mlp"),
    "gates, all features": partial(compress.GateAttention, kind="all"),
    "clipped softmax": compress.ClipSoftmax,
}
"""All with the same training and penalty. Without a penalty there is nothing to learn from an equal teacher."""


@dataclass(frozen=True)
class Score:
    """One variant: log-perplexity a text in float and as quantized, its outliers, and the seconds of its training."""

    name: str
    losses: dict[str, dict[str, float]]
    largest: float
    kurtosis: float
    seconds: float


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer:
        if arguments.what == "train":
            return train(arguments, observer)
        scores = measure(arguments, observer)
    table = markdown(scores)
    (arguments.out / "outliers.md").write_text(table, encoding="utf-8")
    (arguments.out / "outliers.json").write_text(json.dumps([vars(one) for one in scores], indent=2) + "\n")
    print(table)
    return 0


def train(arguments: argparse.Namespace, observer: Observer) -> int:
    """Train the variants that have no checkpoint yet; one that proves nothing is told, and left out."""
    failed = 0
    for name in arguments.variants or VARIANTS:
        folder = arguments.out / _file(name)
        if folder.exists():
            continue
        model = compress.load_model(arguments.model, task="text-generation")
        training = batches(_source(arguments, arguments.samples, arguments.batch), model)
        calibration = batches(_source(arguments, arguments.calibration, 8), model)
        begun = time.perf_counter()
        try:
            outcome = compress.apply(
                model,
                [_pass(name, arguments)],
                calibration=calibration,
                training=training,
                device=arguments.device,
                observer=observer,
            )
        except compress.ModelpressError as error:
            failed += 1
            print(f"{name}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - begun
        _save(outcome.model, folder, seconds)
        print(f"{name}: {seconds:.0f} s; {outcome.steps[-1].changes[-1].after}", flush=True)
    return failed


def measure(arguments: argparse.Namespace, observer: Observer) -> list[Score]:
    """The uncompressed model, and every variant that has a checkpoint."""
    source = compress.load_model(arguments.model, task="text-generation")
    texts = {
        text: torch.stack(windows(whole_text(arguments.data / file), WINDOW, source)[: arguments.windows])
        for text, file in TEXTS.items()
    }
    found = [name for name in VARIANTS if (arguments.out / _file(name)).exists()]
    calibration = batches(_source(arguments, arguments.calibration, 8), source)
    scores = []
    for name in track(observer, "variants", [FLOAT, *found]):
        folder = arguments.out / _file(name)
        model = source if name == FLOAT else compress.load(folder)
        seconds = 0.0 if name == FLOAT else json.loads((folder / "seconds.json").read_text())
        scores.append(_score(name, model, texts, calibration, arguments.device, seconds))
    return scores


def markdown(scores: Sequence[Score]) -> str:
    """One row a variant."""
    columns = [f"{text}: {form}" for text in TEXTS for form in next(iter(scores)).losses]
    head = ["variant", *columns, "largest input", "mean kurtosis", "minutes"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for one in scores:
        losses = [f"{one.losses[form][text]:.4f}" for text in TEXTS for form in one.losses]
        figures = [f"{one.largest:.1f}", f"{one.kurtosis:.1f}", f"{one.seconds / 60:.1f}"]
        lines.append(f"| {' | '.join([one.name, *losses, *figures])} |")
    return "\n".join(lines) + "\n"


def _score(
    name: str,
    model: compress.Model,
    texts: Mapping[str, Tensor],
    calibration: Batches,
    device: str,
    seconds: float,
) -> Score:
    forms = {
        "float": [],
        "W8A8": [compress.Quantize()],
        "smooth + W8A8": [compress.Smooth(), compress.Quantize()],
    }
    losses = {}
    for form, passes in forms.items():
        made = (
            compress.apply(model, passes, calibration=calibration, device=device).model if passes else model
        )
        losses[form] = {text: log_perplexity(made.module, tokens, device) for text, tokens in texts.items()}
    outliers = calm(model.module, linear_inputs(model.graph), calibration)
    return Score(name, losses, outliers.largest, outliers.kurtosis, seconds)


def log_perplexity(module: nn.Module, tokens: Tensor, device: str) -> float:
    """The mean negative log-likelihood of each token but the first of its window (windows, length)."""
    total = 0.0
    module.to(device)
    with torch.no_grad():
        for rows in tokens.to(device).split(4):
            logits = module(input_ids=rows, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="sum"))
    module.to("cpu")
    return total / (len(tokens) * (tokens.shape[1] - 1))


def _pass(name: str, arguments: argparse.Namespace) -> compress.Pass:
    steps, rate, penalty = arguments.steps, arguments.rate, arguments.penalty
    return VARIANTS[name](steps=steps, learning_rate=rate, penalty=penalty, precision="auto")


def _source(arguments: argparse.Namespace, samples: int, batch: int) -> Source:
    text = arguments.data / CALIBRATION
    return Source(text=text, samples=samples, max_length=WINDOW, batch_size=batch)


def _save(model: compress.Model, folder: Path, seconds: float) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    compress.save(model, partial)
    (partial / "seconds.json").write_text(json.dumps(seconds))
    partial.rename(folder)


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outliers",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and the texts")
    parser.add_argument("--out", type=Path, default=Path("build/bench/outliers"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), help="all by default")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--samples", type=int, default=768, help="windows to train on")
    parser.add_argument(
        "--calibration", type=int, default=64, help="windows to calibrate on, and to watch outliers"
    )
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--penalty", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=117, help="windows of each text to score")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
