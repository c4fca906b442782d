"""Where a scale can move: from what writes a tensor to the linear maps that read it, with the function kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from compress.report import Skip
from compress.scope import Scope

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Graph, Runs


@dataclass(frozen=True)
class Pair:
    """`source` can be divided by a scale per feature, and the inputs of all `readers` multiplied by it.

    A norm is scaled by its weight and bias; a projection by the rows of its weight and bias that `rows` names. Each
    of the `kv_heads` equal parts of the features is read `repeats` times in a row (more than once with grouped
    heads). With `multiply` what stands between does not let a scale pass, or others read `source` too: then the
    readers divide their input themselves.
    """

    kind: Literal["norm", "value", "up"]
    source: str
    readers: tuple[str, ...]
    rows: Runs = ()
    kv_heads: int = 1
    repeats: int = 1
    multiply: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return self.readers if self.multiply else (self.source, *self.readers)


def find_pairs(
    graph: Graph, module: nn.Module, scope: Scope, multiply: bool
) -> tuple[list[Pair], list[Skip]]:
    """The pairs of `graph` that lie in `scope` and can be scaled, and those that cannot, with the reason.

    With `multiply`, pairs through which a scale cannot pass are among them, to be multiplied explicitly.
    """
    pairs, skips = [], []
    for pair, why in _candidates(graph):
        if why and multiply:
            pair, why = replace(pair, multiply=True), ""
        if any(path in scope for path in pair.paths):
            why = (
                why
                or _out_of_scope(pair, scope)
                or _shared(pair, graph, module)
                or _unscalable(pair, graph, module)
            )
            skips += [Skip(pair.source, why)] if why else []
            pairs += [] if why else [pair]
    return pairs, skips


def _candidates(graph: Graph) -> Iterator[tuple[Pair, str]]:
    """Every pair and, where it cannot keep the function, why. Norms come last, to see the readers as they end
    up.
    """
    for attention in graph.attentions:
        if attention.value is not None and attention.output is not None:
            repeats = attention.heads // attention.kv_heads
            readers = (attention.output.path,)
            value = attention.value
            yield Pair("value", value.path, readers, value.rows, attention.kv_heads, repeats), ""
    for mlp in graph.mlps:
        why = (
            "" if mlp.gate or mlp.activation == "relu" else f"a scale does not pass through {mlp.activation}"
        )
        yield Pair("up", mlp.up.path, (mlp.down.path,), mlp.up.rows), why
    for norm in graph.norms:
        why = "the residual also reads this norm, as in post-norm models" if norm.residual else ""
        if norm.kind not in ("layer", "rms"):
            why = f"a {norm.kind} norm; only layer and RMS norms are scaled"
        if norm.readers:
            yield Pair("norm", norm.path, norm.readers), why


def _out_of_scope(pair: Pair, scope: Scope) -> str:
    outside = [path for path in pair.paths if path not in scope]
    return f"{', '.join(outside)} would have to be scaled with it, and is out of scope" if outside else ""


def _shared(pair: Pair, graph: Graph, module: nn.Module) -> str:
    names = {
        f"{path}.{name}" for path in pair.paths for name, _ in module.get_submodule(path).named_parameters()
    }
    for tie in graph.ties:
        if shared := names.intersection(tie.names):
            others = [name for name in tie.names if name not in shared] or list(tie.names)
            return f"shares its weight with {', '.join(others)}"
    return ""


def _unscalable(pair: Pair, graph: Graph, module: nn.Module) -> str:
    """Why a side cannot be scaled: each projection and each reader must be a linear map, of this tensor
    alone.
    """
    from compress.layers.linear import is_linear

    for path in pair.paths if pair.kind != "norm" else pair.readers:
        layer = module.get_submodule(path)
        if not is_linear(layer):
            return f"{path} is a {type(layer).__name__}, and not a linear map"
        if len({weight.reads for weight in graph.weights if weight.path == path}) > 1:
            return f"{path} reads other tensors too"
    return ""
