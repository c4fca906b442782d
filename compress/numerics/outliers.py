"""How far the largest values of an activation stand out: kurtosis, as a figure and as a loss.

Kurtosis and the largest value are what Bondarenko et al. 2023 (arXiv 2306.12929) report. As a loss on activations after
Nrusimha et al. 2024 (arXiv 2404.03605); on weights it is that of Chmiel et al. 2020 (arXiv 2002.07686).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FLATTEST = 1.0
"""The least kurtosis there is: of two values, equally often. What is constant counts as this."""


@dataclass
class Spread:
    """What is known of all values seen: the largest magnitude, and sums of powers 1 to 4, float64 (4,)."""

    count: int = 0
    largest: float = 0.0
    powers: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def see(self, values: Tensor) -> None:
        """Add `values`, of any shape and not empty."""
        flat = values.detach().flatten().double()
        square = flat.square()
        powers = torch.stack([flat.sum(), square.sum(), (square * flat).sum(), square.square().sum()])
        self.count += flat.numel()
        self.largest = max(self.largest, float(flat.abs().max()))
        self.powers = self.powers + powers.cpu()

    @property
    def kurtosis(self) -> float:
        """The fourth central moment over the squared variance: 3 of a normal distribution."""
        mean, square, cube, fourth = (self.powers / self.count).tolist()
        variance = square - mean**2
        if variance <= 1e-12 * square:
            return FLATTEST
        return (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2


def log_kurtosis(values: Tensor) -> Tensor:
    """The logarithm of the kurtosis of all `values`, a scalar with gradients, in float32.

    Of the logarithm, so that a place with a kurtosis of a thousand does not drown those of ten. Values with no variance
    give zero.
    """
    centred = values.float() - values.float().mean()
    square = centred.square()
    variance = square.mean()
    # Relative to the variance before the square, so that neither small nor large values leave float32.
    return (square / variance.clamp(min=1e-30)).square().mean().clamp(min=FLATTEST).log()
