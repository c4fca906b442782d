"""What is left of y = scale * x + shift, feature by feature, once the weights beside it have taken it on.

A weight is seen as (groups, out, in, taps), out and in within a group, taps the places of a kernel: a linear map has
one group and one tap. Everything is in float64. For batch norms (Ioffe & Szegedy 2015, arXiv 1502.03167) this is
section 3.2 of Jacob et al. 2018, arXiv 1712.05877; the scale of a residual branch is that of Touvron et al. 2021,
arXiv 2103.17239.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def scale_and_shift(module: nn.Module, probe: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The scale and the shift (features,) of a module that does nothing else, found by running it on zeros and ones.

    `probe` is the shape of an input with one place. The module runs in evaluation mode, and stays as it is.
    """
    exact = copy.deepcopy(module).double().eval()
    device = next((tensor.device for tensor in exact.state_dict().values()), None)
    zeros = torch.zeros(probe, dtype=torch.float64, device=device)
    with torch.no_grad():
        shift = exact(zeros)
        scale = exact(zeros + 1) - shift
    return scale.double().flatten(), shift.double().flatten()


def rescale_after(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias (outputs,) of the map whose output was rescaled: diag(scale) W, and scale * b + shift.

    A bias of None is zero, and stays None if the shift is zero.
    """
    groups, out = weight.shape[:2]
    weight = weight * scale.view(groups, out, 1, 1)
    if bias is not None:
        return weight, scale * bias + shift
    return weight, shift if shift.any() else None


def rescale_before(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias (outputs,) of the map whose input was rescaled: W diag(scale), and b + W shift.

    Right only where each output sees every tap of real input, or the shift is zero. A bias of None is zero, and stays
    None if the shift is zero.
    """
    groups, _, features, _ = weight.shape
    added = (weight * shift.view(groups, 1, features, 1)).sum((2, 3)).flatten()
    weight = weight * scale.view(groups, 1, features, 1)
    if bias is not None:
        return weight, bias + added
    return weight, added if shift.any() else None
