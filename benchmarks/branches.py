"""`python -m benchmarks.branches`: `multi_branch` beside `distill`, at the same steps, on handwritten digits.

The small ViT of `benchmarks.digits` loses two of its four blocks and is trained by either pass, at several learning
rates. The table, in Markdown, gives the divergence from the teacher on held-out pictures, the accuracy there, and
the seconds of the pass; means over seeds, which order the batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean

import torch

import compress
from benchmarks.digits import Digits, read_digits
from benchmarks.exported import Row, markdown
from compress.console import hush, progress
from compress.numerics.relations import divergence
from compress.passes.taught import Taught
from compress.progress import track

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer:
        digits = read_digits()
        calibration = compress.Context(calibration=digits.batches)
        worse = compress.run(digits.model, [compress.DropLayers(remove=2)], calibration).model
        rows = [_row(digits, "two blocks dropped", "", [worse], [])]
        for settings in track(observer, "train", passes(arguments.steps)):
            rows.append(trained(digits, worse, settings, arguments.seeds))
    print(f"\n{markdown(rows)}")
    return 0


def passes(steps: int) -> list[Taught]:
    """Both passes at every learning rate."""
    kinds = (compress.Distill, compress.MultiBranch)
    return [kind(steps=steps, learning_rate=rate) for rate in RATES for kind in kinds]


def trained(digits: Digits, worse: compress.Model, settings: Taught, seeds: int) -> Row:
    """What `settings` makes of the model `worse`."""
    contexts = [
        compress.Context(training=digits.batches, teacher=digits.model, seed=seed) for seed in range(seeds)
    ]
    outcomes = [compress.run(worse, [settings], context) for context in contexts]
    seconds = [outcome.steps[-1].seconds for outcome in outcomes]
    return _row(digits, settings.use, f"{settings.learning_rate:g}", [one.model for one in outcomes], seconds)


def _row(
    digits: Digits, name: str, rate: str, models: Sequence[compress.Model], seconds: Sequence[float]
) -> Row:
    return {
        "pass": name,
        "learning rate": rate,
        "divergence": fmean(_divergence(digits, model) for model in models),
        "accuracy, %": 100 * fmean(map(digits.accuracy, models)),
        "seconds": fmean(seconds) if seconds else "",
    }


def _divergence(digits: Digits, model: compress.Model) -> float:
    with torch.no_grad():
        wanted, given = (one.module(pixel_values=digits.pixels).logits for one in (digits.model, model))
    return float(divergence(wanted, given))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.branches", description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
