"""A norm that becomes a batch norm while the model trains, and what is left of it: PRepBN.

Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", arXiv 2405.11582. RepBN(x) = BN(x) + alpha x; in training y = lambda norm(x) + (1 - lambda) RepBN(x),
with lambda falling from 1 to 0. Features are the last axis of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.numerics.batch_moments import Moments, average, covariance, moments, rows

EPS = 1e-5
"""Added to the variances."""

Tokens = Callable[[tuple[int, ...]], Tensor | None]


@dataclass
class Fading:
    """What all `ProgressiveNorm`s of a model share while it trains: the `share` of the norm that was there, lambda;
    and `tokens`, which says for the (batch, sequence) of a tensor where there are tokens, or None for all of it.
    """

    share: float
    tokens: Tokens


class RepBatchNorm(nn.Module):
    """BN(x) + alpha x, with the statistics that are stored: the same as x * scale + shift, and computed so."""

    weight: nn.Parameter
    bias: nn.Parameter
    alpha: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, alpha: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.rescale(x, self.running_mean, self.running_var)

    def rescale(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """The output with these statistics (features,)."""
        slope = self.weight * (variance + EPS).rsqrt()
        return x * (slope + self.alpha) + (self.bias - slope * mean)

    def extra_repr(self) -> str:
        return str(len(self.weight))


class ProgressiveNorm(nn.Module):
    """A norm and the `RepBatchNorm` that takes its place, mixed as `fading` says.

    It is there while it trains, and no longer: the batch norm takes its statistics from each batch, whatever the mode
    of the module. With a share of 1 the output is the norm's.
    """

    def __init__(self, norm: nn.Module, batch: RepBatchNorm, fading: Fading) -> None:
        super().__init__()
        self.norm = norm
        self.batch = batch
        self.fading = fading

    def forward(self, x: Tensor) -> Tensor:
        share = self.fading.share
        if share == 1:
            return self.norm(x)
        found = self.moments(x)
        new = self.batch.rescale(x, found.mean, found.variance)
        return new if share == 0 else share * self.norm(x) + (1 - share) * new

    def moments(self, x: Tensor) -> Moments:
        """Those of a batch, without its padding."""
        return moments(x, self._tokens(x))

    def fit(self, x: Tensor) -> None:
        """Set the batch norm, for these values, to the scale and shift that come nearest to the norm (least squares).

        Whatever alpha is: the weight makes up for it. So the function changes as little as it can while lambda falls.
        """
        tokens = self._tokens(x)
        wanted, found = self.norm(x), self.moments(x)
        deviation = (found.variance + EPS).sqrt()
        slope = covariance(x, wanted, tokens) / deviation.square()
        self.batch.weight.copy_((slope - self.batch.alpha) * deviation)
        # alpha x has a mean too, which the bias takes away again.
        self.batch.bias.copy_(average(*rows(wanted, tokens)) - self.batch.alpha * found.mean)

    def settle(self, found: Moments) -> RepBatchNorm:
        """The batch norm, with these statistics."""
        self.batch.running_mean.copy_(found.mean)
        self.batch.running_var.copy_(found.variance)
        return self.batch

    def _tokens(self, x: Tensor) -> Tensor | None:
        return self.fading.tokens(tuple(x.shape[:2])) if x.dim() > 2 else None


class Rescaling(nn.Module):
    """x * scale + shift, feature by feature: a batch norm with nothing beside it that could take it on."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift
