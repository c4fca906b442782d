"""Attention products through transformers' registry."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel

from compress.layers.products import Products, _outputs, routed_attentions, watched_products
from compress.layers.quantized import lowered
from compress.numerics.ranges import Range
from tests.zoo import build

SPAN = Range(-3.0, 3.0)


def reference(query, key, value, mask, scaling):
    """Attention in float64, with keys and values repeated."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    weights = torch.softmax(query.double() @ key.double().mT * scaling + mask, -1)
    return (weights @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_float_products_are_attention(kv_heads):
    torch.manual_seed(0)
    query, mask = torch.randn(2, 6, 5, 8), torch.randn(2, 1, 5, 7)
    key, value = torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 4)
    mixture, weights = Products()(query, key, value, [mask], 0.3, 0.0)
    torch.testing.assert_close(
        mixture.double(), reference(query, key, value, mask, 0.3), rtol=1e-5, atol=1e-6
    )
    assert weights.shape == (2, 6, 5, 7)


def test_integer_products_are_near_and_keys_are_symmetric_in_every_scheme():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8).clamp(-3, 3) for heads in (4, 2, 2))
    products = Products()
    products.quantize(SPAN, SPAN, SPAN)
    expected = reference(query, key, value, 0, 0.3)
    for scheme, bound in (("asymmetric", 0.02), ("symmetric", 0.03)):
        with lowered(products, scheme):
            found = products(query, key, value, [], 0.3, 0.0)[0]
            assert (found - expected).abs().max() < bound
            assert products.key.grid().lowest == products.value.grid().lowest == -127
    assert products.query.grid().highest == 255
    assert products.probabilities.grid()[:2] == (1 / 255, 0)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "whisper"])
def test_attentions_are_found_by_running(name):
    model = build(name)
    before = model.module.config._attn_implementation
    paths = routed_attentions(model.module, model.example)
    assert len(paths) == len(model.graph.attentions)
    assert all("ttention" in path or "attn" in path for path in paths)
    assert model.module.config._attn_implementation == before


def test_an_attention_that_computes_something_else_is_declined():
    model = build("deberta")
    assert routed_attentions(model.module, model.example) == ()


def test_watching_leaves_no_trace(tmp_path):
    module = copy.deepcopy(build("bert").module)
    example = build("bert").example
    expected = _outputs(module, example)
    with watched_products(module, ["encoder.layer.0.attention.self"]):
        assert module.config._attn_implementation == "modelpress"
        module.save_pretrained(tmp_path)
        for found, wanted in zip(_outputs(module, example), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, _outputs(module, example), expected))
    assert "modelpress" not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
