"""Parameters that share one tensor."""

from __future__ import annotations

from torch import nn

from compress.graph.structure import Tie


def find_ties(module: nn.Module) -> tuple[Tie, ...]:
    """The groups of at least two names for one parameter, in the order of the module."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(Tie(tuple(group)) for group in names.values() if len(group) > 1)
