"""The answers proved on the function: heads and hidden features may change places, if all that belongs to them does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.graph import Attention, Mlp, Projection
from tests.zoo import build

MODELS = [
    "bert",
    "modernbert",
    "gpt2",
    "opt",
    "llama",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt-neox",
    "whisper",
    "vit",
]
MODELS += ["dinov2-gated", "clip", "segformer", "cvt", "convnext", "mobilevit"]


def rows_of(made: Projection) -> Tensor:
    return torch.cat([torch.arange(*run) for run in made.rows])


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear map or convolution as (out, in, ...), sharing its memory."""
    weight = layer.weight.data
    return weight if isinstance(layer, nn.Linear | nn.Conv2d) else weight.T


def move_rows(module: nn.Module, made: Projection, order: Tensor) -> None:
    layer, rows = module.get_submodule(made.path), rows_of(made)
    weight = matrix(layer)
    weight[rows] = weight[rows[order]].clone()
    if layer.bias is not None:
        layer.bias.data[rows] = layer.bias.data[rows[order]].clone()


def move_columns(module: nn.Module, made: Projection, order: Tensor) -> None:
    weight = matrix(module.get_submodule(made.path))
    weight.copy_(weight[:, order].clone())


def reverse_heads(module: nn.Module, attention: Attention) -> None:
    """Turn round the order of the key-value heads, with the query heads that read each."""
    groups, size = attention.kv_heads, attention.head_size
    queries = torch.arange(attention.heads * size).view(groups, -1).flip(0).flatten()
    keys = torch.arange(groups * size).view(groups, -1).flip(0).flatten()
    move_rows(module, attention.query, queries)
    move_rows(module, attention.key, keys)
    move_rows(module, attention.value, keys)
    move_columns(module, attention.output, queries)


def reverse_hidden(module: nn.Module, mlp: Mlp) -> None:
    order = torch.arange(mlp.up.features).flip(0)
    move_rows(module, mlp.up, order)
    if mlp.gate is not None:
        move_rows(module, mlp.gate, order)
    for path in mlp.depthwise:
        move_rows(module, Projection(path, ((0, mlp.up.features),)), order)
    move_columns(module, mlp.down, order)


def outputs(module: nn.Module, example: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(value for value in module(**example).values() if isinstance(value, Tensor))


def loud(module: nn.Module) -> nn.Module:
    """A copy with larger matrices, so that every part of the model shows in its output."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_reordered_heads_and_hidden_features_keep_the_function(name):
    model = build(name)
    module = loud(model.module)
    before = outputs(module, model.example)
    for attention in model.graph.attentions:
        reverse_heads(module, attention)
    for mlp in model.graph.mlps:
        reverse_hidden(module, mlp)
    after = outputs(module, model.example)
    assert torch.allclose(before, after, rtol=1e-3, atol=2e-4 * float(before.abs().max()))


def test_the_proof_can_fail():
    """Moving the heads of the queries alone changes the function."""
    model = build("gpt2")
    module = loud(model.module)
    before = outputs(module, model.example)
    attention = model.graph.attentions[0]
    order = torch.arange(48).view(6, -1).flip(0).flatten()
    move_rows(module, attention.query, order)
    after = outputs(module, model.example)
    assert float((before - after).abs().max()) > 0.01 * float(before.abs().max())
