"""The training half of `benchmarks.norm_free`: needs torch, transformers and Pillow, and no network."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import compress
from benchmarks import pictures
from benchmarks.classifying import top1
from benchmarks.norm_free import TEST, TRAINING
from compress import processes
from compress.model import Inputs

SHIFT = 4
"""Pictures move by up to so many pixels."""
EVERY = 100
"""Steps between two lines of progress."""


def train(arguments: argparse.Namespace) -> None:
    """Teach the model without its norms, say what that costs in torch, and write the checkpoint.

    Of several processes each takes a batch of each step, on a device of its own, and the main one tells and writes.
    """
    device = processes.own_device(arguments.device)
    model = compress.load_model(arguments.model, task="image-classification")
    test, classes = pictures.pixels(arguments.data / TEST), pictures.classes(arguments.data / TEST)

    def score(module: nn.Module) -> float:
        return top1(answers(module.to(device), test, arguments.model, device), classes)

    before = score(model.module)
    tell(f"top-1 before: {before:.2f} %")
    begun = time.perf_counter()
    context = compress.Context(device=device, training=Varied(arguments, device), observer=Lines())
    made = compress.run(model, [_pass(arguments)], context).model
    seconds = time.perf_counter() - begun
    after = score(made.module)
    # Half as many bytes; whoever loads them computes in float32.
    made.module.cpu().half()
    stored = score(made.module.float())
    tell(f"top-1 after: {after:.2f} %, with weights rounded to float16 {stored:.2f} %; {seconds:.0f} s")
    if processes.is_main():
        compress.save(replace(made, module=made.module.cpu().half()), arguments.made, force=True)
        facts = {"before": before, "after": after, "stored": stored, "seconds": seconds}
        (arguments.made / "training.json").write_text(json.dumps(facts), encoding="utf-8")


def _pass(arguments: argparse.Namespace) -> compress.Pass:
    training: dict[str, Any] = {
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "precision": arguments.precision,
        "accumulate": processes.count(),
        "task": arguments.task,
    }
    if arguments.keep_norms:
        return compress.Distill(train_embeddings=True, loss="both", **training)
    return compress.ProgressiveBatchNorm(**training)


def tell(line: str) -> None:
    """Print `line`, once."""
    if processes.is_main():
        print(line, flush=True)


class Varied(Sequence[Inputs]):
    """The training batches of all steps, each made on `device` when it is asked for.

    Its pictures are drawn anew, flipped and shifted; their classes are the `labels`.
    """

    def __init__(self, arguments: argparse.Namespace, device: str) -> None:
        self.pixels = pictures.pixels(arguments.data / TRAINING).to(device)
        self.classes = pictures.classes(arguments.data / TRAINING)
        self.arguments = arguments

    def __len__(self) -> int:
        return self.arguments.steps * processes.count()

    @overload
    def __getitem__(self, index: int) -> Inputs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Inputs]: ...
    def __getitem__(self, index: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        chosen = torch.randint(len(self.pixels), (self.arguments.batch,), generator=generator)
        drawn = moved(self.pixels[chosen.to(self.pixels.device)], generator)
        values = pictures.prepared(drawn, self.arguments.model)
        return {"pixel_values": values, "labels": self.classes[chosen].to(values.device)}


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (batch, height, width, 3), each picture shifted, with black coming in, and every second one mirrored."""
    count, height, width, _ = pixels.shape
    rows, columns = (torch.arange(size) for size in (height, width))
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    padded = pad(pixels, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    places = torch.arange(count)[:, None, None], (rows + down)[:, :, None], columns[:, None, :]
    return padded[tuple(place.to(pixels.device) for place in places)]


@torch.no_grad()
def answers(module: nn.Module, pixels: Tensor, model: Path, device: str) -> Tensor:
    """The logits (pictures, classes) of `module`, which is on `device`, on the CPU."""
    batches = (pictures.prepared(part.to(device), model) for part in pixels.split(500))
    return torch.cat([module(pixel_values=values).logits.cpu() for values in batches])


class Lines:
    """An observer that prints a line now and then."""

    def begin(self, what: str, total: int | None) -> Line:
        return Line(what, total)

    def end(self, task: object) -> None:
        del task


class Line:
    """One task of `Lines`."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done, self.begun = what, total, 0, time.perf_counter()

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        if self.done % EVERY == 0 or self.done == self.total:
            tell(f"{self.what}: {self.done} of {self.total}, {time.perf_counter() - self.begun:.0f} s")
