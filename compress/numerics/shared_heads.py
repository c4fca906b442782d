"""One head in the place of several: their mean, or the head from which small maps make all of them best.

The second is after "Align Attention Heads Before Merging Them" (arXiv 2412.20677), which is known to us by its abstract
alone. With rotary positions a map of keys may be taken back in the queries only if it commutes with the rotation:
it acts on each pair of features as one complex number. So a head is taken as blocks: a complex feature for each pair
that is rotated together, and one block of all features that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-6
"""Added to the diagonal of an energy, as a share of its mean."""


@dataclass(frozen=True)
class Layout:
    """Blocks of a head of `size` features: `pairs` of them that are one complex number, and the others together."""

    size: int
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def rest(self) -> list[int]:
        """The features in no pair."""
        paired = {feature for pair in self.pairs for feature in pair}
        return [feature for feature in range(self.size) if feature not in paired]

    def split(self, maps: Tensor) -> list[Tensor]:
        """Maps (heads, size, in) as blocks (blocks, heads, features of a block, in), those of pairs complex."""
        first, second = ([pair[side] for pair in self.pairs] for side in (0, 1))
        turned = torch.complex(maps[:, first], maps[:, second]).transpose(0, 1).unsqueeze(2)
        return [turned, maps[:, self.rest].unsqueeze(0)]

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """What `split` took apart."""
        turned, rest = blocks
        first, second = ([pair[side] for pair in self.pairs] for side in (0, 1))
        maps = rest.new_empty(rest.shape[1], self.size, rest.shape[-1])
        maps[:, self.rest] = rest[0]
        maps[:, first], maps[:, second] = (
            turned[:, :, 0].real.transpose(0, 1),
            turned[:, :, 0].imag.transpose(0, 1),
        )
        return maps


def joint(maps: Tensor, energies: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The head from which all are made with the least error, (blocks, features, in), and how: lifts (blocks, heads,
    features, features), so that each head is nearly its lift times the shared one.

    `maps` (blocks, heads, features, in), real or complex; `energies` (blocks, heads, features, features) are second
    moments of what each head's features are multiplied by, and weigh its error; `root` (in, in) is a root of the second
    moment of the inputs. The least squares are those of a truncated SVD of all heads together. The lifts have the
    identity as the mean of their squares. Heads that are equal are made exactly.
    """
    blocks, heads, features, width = maps.shape
    if not maps.numel():
        return maps.new_zeros(blocks, features, width), torch.zeros_like(energies)
    metrics = _roots(energies)
    weighted = (metrics @ maps).reshape(blocks, heads * features, width)
    left = torch.linalg.svd(weighted @ root.to(maps.dtype), full_matrices=False).U[..., :features]
    shared = left.mH @ weighted
    lifts = torch.linalg.solve_triangular(metrics, left.reshape(blocks, heads, features, -1), upper=True)
    values, vectors = torch.linalg.eigh((lifts.mH @ lifts).mean(1))
    values = values.clamp(min=values[..., -1:] * 1e-12).sqrt().to(maps.dtype)
    scale, unscale = (vectors @ torch.diag_embed(one) @ vectors.mH for one in (values, 1 / values))
    return scale @ shared, lifts @ unscale[:, None]


def _roots(energies: Tensor) -> Tensor:
    """Upper triangular R with Rᴴ R = `energies` (..., n, n), which are damped; the identity where they are zero."""
    eye = torch.eye(energies.shape[-1], dtype=energies.dtype)
    mean = energies.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    energies = torch.where(mean > 0, energies, eye)
    return torch.linalg.cholesky(energies + DAMPING * mean.clamp(min=1e-30) * eye).mH


def likeness(blocks: Sequence[Tensor], root: Tensor) -> Tensor:
    """How alike the heads are, (heads, heads) in [0, 1]: linear CKA (Kornblith et al. 2019, arXiv 1905.00414), block by
    block.

    Blocks (blocks, heads, features, in); `root` (in, in) of the inputs' covariance. What a map within a block can make
    equal counts as alike.
    """
    total = torch.zeros(())
    for block in blocks:
        made = block @ root.to(block.dtype)
        products = torch.einsum("bhki,bgli->hgbkl", made, made.conj())
        total = total + products.abs().square().sum((2, 3, 4))
    scale = total.diagonal().sqrt()
    return total / (scale[:, None] * scale).clamp(min=1e-300)


def cosines(maps: Tensor, root: Tensor) -> Tensor:
    """The cosines of what `maps` (heads, features, in) make, (heads, heads); `root` (in, in) of the inputs' moment."""
    made = (maps @ root).flatten(1)
    return torch.nn.functional.normalize(made, dim=1) @ torch.nn.functional.normalize(made, dim=1).T
