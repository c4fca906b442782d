"""Structure of a model, discovered from its traced data flow; no table by class, model type or name."""

from compress.graph.structure import (
    Attention,
    Graph,
    Mlp,
    Neighbour,
    Norm,
    Projection,
    Rescale,
    ScoreScale,
    Stack,
    Tie,
    Weight,
)
from compress.graph.trace import trace

__all__ = [
    "Attention",
    "Graph",
    "Mlp",
    "Neighbour",
    "Norm",
    "Projection",
    "Rescale",
    "ScoreScale",
    "Stack",
    "Tie",
    "Weight",
    "trace",
]
