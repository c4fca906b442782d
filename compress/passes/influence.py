"""How much each block of a stack matters, on data.

Block Influence: one less the mean cosine between what a block reads and what it gives (ShortGPT, Men et al.
2024, arXiv 2403.03853). Angular distance over a run of blocks (Gromov et al. 2024, arXiv 2403.17887). Macro
Influence: one less the mean cosine between what the whole stack gives with and without the block (FuseGPT,
arXiv 2411.14507); ours beside it, with a linear substitute in the block's place. Loss: what the model's negative
log-likelihood of the text is without the block (SLEB, Song et al. 2024, arXiv 2402.09025). Padding and each row's
first token, whose activations dwarf all others in many decoders, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from compress.configs import using_cache
from compress.numerics.similarity import angular_distance, cosines
from compress.outputs import forward
from compress.passes.blocks import Run, passed_over, run_stack
from compress.passes.calibration import tokens_of
from compress.progress import Observer, track

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]


def block_influences(
    module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], observer: Observer
) -> list[float]:
    """1 - mean cosine of input and output, for each block."""
    return _mean_over(
        module,
        blocks,
        batches,
        observer,
        lambda run, _: [
            1 - cosines(before, after) for before, after in zip(run.hidden[:-1], run.hidden[1:], strict=True)
        ],
    )


def run_distances(
    module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], length: int, observer: Observer
) -> list[float]:
    """The mean angular distance over `length` blocks, from each block at which such a run may begin."""
    return _mean_over(
        module,
        blocks,
        batches,
        observer,
        lambda run, _: [
            angular_distance(before, after)
            for before, after in zip(run.hidden[:-length], run.hidden[length:], strict=True)
        ],
    )


def macro_influences(
    module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], observer: Observer
) -> list[float]:
    """1 - mean cosine of what the stack gives with and without each block."""
    layers = [module.get_submodule(path) for path in blocks]

    def without(run: Run, _: Tensor) -> list[Tensor]:
        return [
            1 - cosines(_through(layers, run, place, run.hidden[place]), run.last)
            for place in range(len(blocks))
        ]

    return _mean_over(module, blocks, batches, observer, without)


def substituted_influences(
    module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], observer: Observer
) -> list[float]:
    """1 - mean cosine of what the stack gives with each block and with its linear substitute in its place.

    Macro Influence says what is lost when a block goes; this says what stays lost after training.
    """
    from compress.passes.substitutes import Substitutes

    layers = [module.get_submodule(path) for path in blocks]
    substitutes = Substitutes(layers)

    def learn(run: Run, kept: Tensor) -> list[Tensor]:
        substitutes.see(run, kept)
        return []

    def without(run: Run, kept: Tensor) -> list[Tensor]:
        reads = dict(substitutes.reads)
        found = []
        for place in range(len(blocks)):
            hidden = substitutes.stand_in(place, run, reads.get(place - 1), kept)
            found.append(1 - cosines(_through(layers, run, place, hidden), run.last))
        return found

    with substitutes.listening():
        _mean_over(module, blocks, batches, observer, learn)
        return _mean_over(module, blocks, batches, observer, without)


def losses_without(
    module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], observer: Observer
) -> list[float]:
    """The mean negative log-likelihood of the next token, for a model of text without each block."""
    runs = [run_stack(module, blocks, batch, number) for number, batch in enumerate(batches, start=1)]
    found = []
    for place in track(observer, "loss without each block", range(len(blocks))):
        layer = module.get_submodule(blocks[place])
        with passed_over(layer, runs[0].calls[place]), using_cache(module, False):
            found.append(sum(_loss(module, batch) for batch in batches) / len(batches))
    return found


def _loss(module: nn.Module, batch: Batch) -> float:
    from torch.nn.functional import cross_entropy

    logits, wanted = forward(module, batch)["logits"][:, :-1].float(), batch["input_ids"][:, 1:]
    kept = batch["attention_mask"][:, 1:].bool() if "attention_mask" in batch else wanted == wanted
    return float(cross_entropy(logits[kept], wanted[kept]))


def _through(layers: Sequence[nn.Module], run: Run, left_out: int, hidden: Tensor) -> Tensor:
    """What the stack gives without the block `left_out`, for the `hidden` states in the place of its output."""
    import torch

    with torch.no_grad():
        for layer, call in list(zip(layers, run.calls, strict=True))[left_out + 1 :]:
            hidden = call.run(layer, hidden)
    return hidden


def _mean_over(
    module: nn.Module,
    blocks: Sequence[str],
    batches: Sequence[Batch],
    observer: Observer,
    measure: Callable[[Run, Tensor], list[Tensor]],
) -> list[float]:
    """The mean over all counted tokens of each value (batch, sequence) that `measure` gives for a run.

    It is also given which positions count, (batch, sequence).
    """
    sums: list[float] = []
    count = 0
    for number, batch in enumerate(track(observer, "influence of each block", batches), start=1):
        run = run_stack(module, blocks, batch, number)
        kept = _counted(run.last, batch)
        found = [float(one[kept].double().sum()) for one in measure(run, kept)]
        sums = [old + one for old, one in zip(sums or [0.0] * len(found), found, strict=True)]
        count += int(kept.sum())
    return [one / count for one in sums]


def _counted(hidden: Tensor, batch: Batch) -> Tensor:
    """Which positions (batch, sequence) of `hidden` count; all of them for anything but tokens."""
    import torch

    tokens = tokens_of(batch, hidden.shape[:-1])
    if tokens is None or hidden.shape[1] < 2:
        return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    first = tokens.int().argmax(1, keepdim=True)
    return tokens.bool().scatter(1, first, torch.zeros_like(first, dtype=torch.bool))
