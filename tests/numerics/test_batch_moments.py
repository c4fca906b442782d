"""Means and variances over positions, without padding, and over several batches."""

from __future__ import annotations

import torch

from compress.numerics.batch_moments import Moments, covariance, moments, pooled


def values(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def close(found: Moments, expected: torch.Tensor) -> None:
    """`expected` (positions, features) has the moments `found`."""
    assert float(found.count) == len(expected)
    torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, expected.var(0, correction=0), rtol=1e-12, atol=1e-12)


def test_padding_is_left_out() -> None:
    x = values(2, 5, 3)
    tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    close(moments(x), x.flatten(0, 1))
    close(moments(x, tokens), x[tokens])
    heads = values(2, 5, 4, 3)
    close(moments(heads, tokens), heads[tokens].flatten(0, 1))


def test_batches_of_different_sizes_are_one() -> None:
    parts = [values(count, 3, seed=count) * count for count in (1, 4, 11)]
    close(pooled([moments(part) for part in parts]), torch.cat(parts))
    tokens = torch.tensor([[True, False, False, True]])
    found = pooled([moments(parts[1][None], tokens), moments(parts[2][None])])
    close(found, torch.cat([parts[1][[0, 3]], parts[2]]))


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((4096, 2), 100.0).half()
    assert moments(x).mean.tolist() == [100.0, 100.0]
    assert moments(x).variance.dtype == torch.float32


def test_covariance() -> None:
    x, noise = values(50, 3), values(50, 3, seed=1)
    both = torch.stack([x[:, 0], noise[:, 0]])
    torch.testing.assert_close(covariance(x, noise)[0], torch.cov(both, correction=0)[0, 1])
    tokens = torch.arange(50)[None] < 20
    torch.testing.assert_close(
        covariance(x[None], noise[None], tokens), covariance(x[:20], noise[:20]), rtol=1e-12, atol=1e-12
    )
