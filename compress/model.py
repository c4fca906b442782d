"""A model as a value: the module, example inputs, the task, and the passes that made it what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.report import Step

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.graph import Graph

Inputs = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Model:
    """A module in evaluation mode, and what is needed to trace, save and export it.

    `example` holds forward keyword arguments with a batch of at least 2. `processor` is the tokenizer, image
    processor or feature extractor, if there is one. A new value has no cached graph.
    """

    module: nn.Module
    example: Inputs
    task: str
    history: tuple[Step, ...] = ()
    source: str = ""
    processor: Any = field(default=None, compare=False)

    @cached_property
    def graph(self) -> Graph:
        """The discovered structure, traced on first use. Raises `Unsuitable` if the module cannot be traced."""
        from compress.graph import trace

        return trace(self.module, self.example)


def load_model(name: str, task: str | None = None, **options: Any) -> Model:
    raise NotImplementedError
