"""Trace a module and answer every question about its structure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.devices import moved, on_device
from compress.graph.attention import find_attentions
from compress.graph.blocks import find_stacks
from compress.graph.macs import count_macs, sum_macs
from compress.graph.mlp import find_mlps
from compress.graph.norms import find_normalizations, find_norms
from compress.graph.record import record
from compress.graph.rescales import find_rescales
from compress.graph.residual import find_residual_writers
from compress.graph.score_scales import find_score_scales
from compress.graph.structure import Graph
from compress.graph.ties import find_ties
from compress.graph.weights import find_products, find_weights
from compress.plain import plain_copy


def trace(module: nn.Module, example: Mapping[str, Tensor]) -> Graph:
    """Discover the structure of `module` from one traced run on the keyword arguments `example`.

    The module is left as it was. Tensors that are computed from others are seen as plain ones. Raises `Unsuitable` if
    it cannot be traced.
    """
    with on_device(module, "cpu"):
        return _traced(plain_copy(module), moved(example, "cpu"))


def _traced(module: nn.Module, example: Mapping[str, Tensor]) -> Graph:
    """What a run on the CPU says: parts of it are run again, on labels and probes that are there."""
    run = record(module, example)
    products = find_products(run)
    normalizations = find_normalizations(run)
    macs = count_macs(run)
    return Graph(
        weights=find_weights(run, products, macs),
        stacks=find_stacks(run, products, normalizations),
        attentions=find_attentions(run, products),
        mlps=find_mlps(run, products),
        norms=find_norms(run, normalizations, products),
        rescales=find_rescales(run, products, normalizations),
        score_scales=find_score_scales(run, products),
        ties=find_ties(module),
        residual_writers=find_residual_writers(run, products, normalizations),
        macs=sum_macs(run, macs, products),
    )
