"""How far the largest values of an activation stand out, as figures and as a loss.

The largest value and the kurtosis are what Bondarenko et al. 2023 (arXiv 2306.12929) report. The loss is ours: what an
outlier costs when the tensor is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVELS = 255
"""Steps of 8 bits."""
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


def rounding_noise(values: Tensor) -> Tensor:
    """The noise that rounding `values` to 8 bits over their range adds, relative to their energy: a scalar with
    gradients, in float32.

    Rounding errors are uniform, with variance step^2 / 12, and the range holds zero. Of values of a normal distribution
    this is some 2e-5, and one value of 170 times the root mean square makes it 0.04. Zeros alone give zero.
    """
    values = values.float()
    step = (values.amax().clamp(min=0) - values.amin().clamp(max=0)) / LEVELS
    return step.square() / (12 * values.square().mean().clamp(min=1e-30))
