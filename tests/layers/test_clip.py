"""Clipped softmax."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.layers.attention import use_attention
from compress.layers.clip import SoftmaxClip, clips_of, visible
from compress.layers.products import routed_attentions, watched_products
from compress.model import Model
from tests.zoo import build

MASKED = torch.finfo(torch.float64).min


def clipped(name: str, alpha: float) -> Model:
    model = build(name)
    module = copy.deepcopy(model.module).double()
    for path in routed_attentions(model.module, model.example):
        module.get_submodule(path).softmax_clip = SoftmaxClip(alpha)
    use_attention(module)
    return Model(module, model.example, model.task)


def states(module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return next(value for value in module(**inputs).values() if isinstance(value, torch.Tensor))


def test_zeros_begin_at_alpha_of_the_keys_and_one_stays_one():
    clip, keys = SoftmaxClip(2.0), 10
    threshold = 2.0 / (keys + 2.0)  # -gamma / (1 - gamma)
    rows = torch.tensor(
        [[threshold - 1e-6, threshold, threshold + 1e-6], [0.0, 1.0, 0.0]], dtype=torch.float64
    )
    found = clip(torch.nn.functional.pad(rows, (0, keys - 3)), [])
    assert (found[0, :2].abs() < 1e-15).all()
    assert 0 < found[0, 2] < 2e-6
    assert found[1].tolist() == [0, 1, *[0] * 8]


def test_no_share_is_the_softmax():
    probabilities = torch.rand(2, 3, 4, 5).softmax(-1)
    assert torch.equal(SoftmaxClip(12.0, share=0.0)(probabilities, []), probabilities)


def test_keys_that_are_masked_do_not_count():
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.float64).masked_fill(torch.ones(3, 3).triu(1).bool(), MASKED)
    bias = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    counted = visible([bias, mask], torch.zeros(1, 2, 3, 3))
    assert counted[0, :, :, 0].tolist() == [[1, 2, 3]] * 2


def test_a_mask_of_minus_100_hides_keys_too():
    """Swin's shifted windows hide with -100, beside a bias of positions."""
    mask = torch.tensor([[0.0, 0.0, -100.0], [-100.0, 0.0, 0.0], [-100.0, -100.0, 0.0]])
    bias = 5 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    counted = visible([bias + mask], torch.zeros(2, 3, 3))
    assert counted[..., 0].tolist() == [[2, 2, 1]] * 2


def test_a_bias_that_falls_with_distance_hides_only_what_is_out_of_sight():
    """All of a row's keys may lie far below zero: the best of them is seen."""
    slope = -torch.arange(100.0, 600.0)
    assert visible([slope], torch.zeros(500)).tolist() == [50]
    assert visible([slope - 1000], torch.zeros(500)).tolist() == [50]


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "swin"])
def test_without_alpha_the_model_is_as_it_was(name):
    model = build(name)
    expected = states(copy.deepcopy(model.module).double(), **_double(model.example))
    found = states(clipped(name, 0.0).module, **_double(model.example))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the softmax is float32


def test_padding_changes_nothing():
    module = clipped("bert", 0.5).module
    ids, padding = torch.randint(3, 99, (1, 8)), torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), padding], 1)
    alone = states(module, input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = states(module, input_ids=torch.cat([ids, padding], 1), attention_mask=mask)
    torch.testing.assert_close(padded[:, :8], alone, rtol=0, atol=1e-12)


def test_a_cache_gives_what_a_whole_run_gives():
    module = clipped("llama", 0.5).module
    ids = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
        first = module(input_ids=ids[:, :6], use_cache=True)
        later = module(input_ids=ids[:, 6:], cache=first.cache).logits
    torch.testing.assert_close(torch.cat([first.logits, later], 1), whole, rtol=0, atol=1e-12)


def test_it_clips_what_quantized_products_weigh():
    model = build("bert")
    clip, paths = clipped("bert", 0.5), routed_attentions(model.module, model.example)
    expected = states(clip.module, **_double(model.example))
    with watched_products(clip.module, paths):
        torch.testing.assert_close(
            states(clip.module, **_double(model.example)), expected, rtol=0, atol=1e-12
        )
    assert len(clips_of(clip.module)) == len(paths)


def _double(inputs):
    return {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
