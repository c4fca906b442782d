"""How a norm's parameters enter its output, found by running it: y = x' (offset + weight) + bias.

`offset` is 0 for layer and RMS norms, and 1 where the weight is stored as its difference from 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

PROBE_ROWS = 4


def divided(norm: nn.Module, scales: Tensor) -> dict[str, Tensor] | None:
    """Parameters with which the output of `norm` is divided by `scales` (features,); None if there are none.

    Each parameter is tried as a weight or as a bias by what it does to the output of a probe, whatever its
    name; the answer is checked on the probe.
    """
    parameters = {name: value.detach() for name, value in norm.named_parameters()}
    if not parameters or any(value.shape != scales.shape for value in parameters.values()):
        return None
    probe = torch.randn(PROBE_ROWS, 1, len(scales), generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(iter(parameters.values())))

    def output(values: Mapping[str, Tensor]) -> Tensor:
        return functional_call(norm, {**parameters, **values}, (probe,)).detach().double()

    zeros = {name: torch.zeros_like(value) for name, value in parameters.items()}
    unscaled = output(zeros)
    folded = {}
    for name, value in parameters.items():
        effect = output({**zeros, name: torch.ones_like(value)}) - unscaled
        if not effect.any():
            return None
        offset = (unscaled / effect).nanmedian()
        is_bias = torch.allclose(effect, torch.ones_like(effect), atol=1e-3)
        offset = 0.0 if is_bias else round(offset.item())
        folded[name] = ((value.double() + offset) / scales - offset).to(value.dtype)
    expected = output({}) / scales
    wrong = (output(folded) - expected).abs().max() > 1e-4 * expected.abs().max()
    return None if wrong else folded
