"""What a model returns, as named float tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.devices import device_of, moved

if TYPE_CHECKING:
    import torch
    from torch import nn


def forward(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float outputs of `module(**inputs)` without gradients, by name (see `flatten_outputs`).

    They are on the device of the inputs, wherever the module is.
    """
    import torch

    home = next((value.device for value in inputs.values() if isinstance(value, torch.Tensor)), None)
    with torch.no_grad():
        return moved(flatten_outputs(module(**moved(inputs, device_of(module)))), home)


def flatten_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The float tensors of a model's output by name: `logits`, `hidden_states.0`, ... Caches are left out."""
    return {name: value.detach() for name, value in float_outputs(output).items()}


def float_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The same with the gradients that the tensors carry."""
    import torch

    named = ((name, value) for name, value in _leaves("", output) if isinstance(value, torch.Tensor))
    return {name: value for name, value in named if value.is_floating_point()}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Iterator[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = ((str(index), item) for index, item in enumerate(value))
    else:
        yield name or "output", value
        return
    for key, item in items:
        yield from _leaves(f"{name}.{key}" if name else key, item)
