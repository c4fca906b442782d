"""Structure of a model, discovered from its traced data flow; no table by class, model type or name."""

from compress.graph.structure import (
    Attention,
    ConvNorm,
    Graph,
    Mlp,
    Norm,
    Projection,
    Stack,
    Tie,
    Weight,
)
from compress.graph.trace import trace

__all__ = ["Attention", "ConvNorm", "Graph", "Mlp", "Norm", "Projection", "Stack", "Tie", "Weight", "trace"]
