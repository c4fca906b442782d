"""What becomes of batch norms that have taken the place of norms: folded, left as a product and a sum, or kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from compress.layers.progressive_norm import RepBatchNorm, Rescaling
from compress.layers.quantized import swap
from compress.model import Model
from compress.numerics.rescaling import scale_and_shift
from compress.passes.folding import Folding, restore_folds
from compress.scope import Scope


class Became(NamedTuple):
    """What there is now where the norm at `path` was, in the words of a change."""

    path: str
    what: str
    after: str


def merge(model: Model, norms: Mapping[str, int]) -> tuple[list[Became], dict[str, Any]]:
    """Fold the batch norms at `norms`, paths and their features, into any weights beside them, in place.

    Those that nothing can take on stay as a `Rescaling`. Gives what each became, and the record for `restore_batch`.
    """
    model = replace(model)  # a new trace: these norms are not those that the graph knows
    folding = Folding(model.graph, model.module, Scope())
    whys = folding.fold(only=norms)
    left = {path: features for path, features in norms.items() if path not in folding.into}
    became = [
        Became(path, "folded", f"in {', '.join(folding.takers(path))}") for path in norms if path not in left
    ]
    for path in left:
        batch = model.module.get_submodule(path)
        values = scale_and_shift(batch, (1, 1, left[path]))
        kind = next(batch.parameters()).dtype
        swap(model.module, {batch: Rescaling(*(value.to(kind) for value in values)).eval()})
        why = whys.get(path, "it does not run on the example")
        became.append(Became(path, "rescaled", f"a product and a sum stay: {why}"))
    record = {**folding.record(), "left": left, "kept": {}}
    restore_folds(model.module, record)
    return became, record


def keep(norms: Mapping[str, int]) -> tuple[list[Became], dict[str, Any]]:
    """Leave the batch norms as they are."""
    became = [Became(path, "replaced", "a batch norm that also adds its input") for path in norms]
    return became, {"gone": [], "ones": [], "biases": [], "scales": [], "left": {}, "kept": dict(norms)}


def restore_batch(module: nn.Module, record: dict[str, Any]) -> None:
    """Give a module the structure that `merge` or `keep` gave it, with values that do not count."""
    layers: dict[nn.Module, nn.Module] = {}
    for path, features in record["kept"].items():
        layers[module.get_submodule(path)] = RepBatchNorm(features)
    for path, features in record["left"].items():
        layers[module.get_submodule(path)] = Rescaling(torch.ones(features), torch.zeros(features))
    swap(module, layers)
    restore_folds(module, record)
