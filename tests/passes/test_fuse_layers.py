"""FuseGPT: grafting, group-level training, and folding."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import compress
import export
from compress.compare import forward
from compress.depth import remove_blocks
from compress.errors import DataError, Unsuitable
from compress.layers.grafted import GraftedLinear
from compress.model import Model
from compress.passes.base import Context
from compress.passes.factorize import Factorize
from compress.passes.fuse_layers import FuseLayers
from compress.passes.grafting import group_around
from compress.pipeline import run
from compress.scope import Scope
from tests.zoo import build


def data(model: Model, count: int = 4) -> Context:
    torch.manual_seed(0)
    ids = model.example["input_ids"]
    return Context(
        training=[{**model.example, "input_ids": torch.randint(3, 60, ids.shape)} for _ in range(count)]
    )


def grafted(layer: nn.Module, other: nn.Module, seed: int = 0) -> GraftedLinear:
    return GraftedLinear(layer, [other], 4, 4, torch.Generator().manual_seed(seed))


def stirred(layer: GraftedLinear) -> GraftedLinear:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_graft_begins_as_the_layer(kind):
    layer, other = (nn.Linear(6, 9) if kind == "linear" else Conv1D(9, 6) for _ in range(2))
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(grafted(layer, other)(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_folded_is_unfolded(kind):
    torch.manual_seed(0)
    layer, other = (nn.Linear(6, 9) if kind == "linear" else Conv1D(9, 6) for _ in range(2))
    nn.init.normal_(other.bias)
    graft, x = stirred(grafted(layer, other)), torch.randn(3, 5, 6)
    before, expected = layer(x), graft(x)
    graft.fold(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (layer(x) - before).abs().max() > 0.1


def test_the_weight_is_the_formula():
    torch.manual_seed(0)
    layer, other = nn.Linear(6, 9), nn.Linear(6, 9)
    graft = stirred(grafted(layer, other))
    share, update = graft.shares[0], graft.update
    expected = layer.weight + update.left @ update.right + (share.left @ share.right) * other.weight
    torch.testing.assert_close(graft.weight(), expected)
    torch.testing.assert_close(graft.bias(), layer.bias + graft.biases[0] * other.bias)


def test_groups_stay_inside_the_stack():
    assert group_around(5, 12, 8) == range(1, 9)
    assert group_around(0, 12, 8) == range(8)
    assert group_around(11, 12, 8) == range(4, 12)
    assert group_around(1, 3, 8) == range(3)


def test_no_training_to_speak_of_is_plain_removal():
    model = build("llama")
    settings = FuseLayers(remove=1, steps=1, learning_rate=1e-30)
    outcome = run(model, [settings], data(model))
    plain = copy.deepcopy(model.module)
    remove_blocks(plain, "model.layers", outcome.steps[0].record["removed"])
    expected = forward(plain, model.example)["logits"]
    assert torch.equal(forward(outcome.model.module, model.example)["logits"], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_training_heals(name):
    """What is lost falls, on tokens that were not trained on."""
    model = build(name)
    reference = forward(model.module, model.example)["logits"]

    def lost(settings: FuseLayers) -> float:
        module = run(model, [settings], data(model, 8)).model.module
        return float((forward(module, model.example)["logits"] - reference).square().mean())

    plain = lost(FuseLayers(remove=1, steps=1, learning_rate=1e-30))
    assert lost(FuseLayers(remove=1, steps=60, learning_rate=3e-3)) < 0.9 * plain


def test_the_report_says_what_the_group_lost():
    model = build("llama")
    outcome = run(model, [FuseLayers(remove=1, steps=40)], data(model))
    change = outcome.steps[0].changes[0]
    assert change.before.startswith("substituted influence 0.")
    before, after = (float(one) for one in change.after.split("group ")[1].split(" in ")[0].split(" -> "))
    assert 0 < after < before


def test_one_row_a_batch_trains_too():
    model = build("llama")
    rows = [{name: value[:1] for name, value in batch.items()} for batch in data(model).training]
    outcome = run(model, [FuseLayers(remove=1, steps=20)], Context(training=rows))
    assert " 0.0000 ->" not in outcome.steps[0].changes[0].after


def test_padding_does_not_count():
    model = build("llama")
    first = data(model).training
    second = [
        {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 7)} for batch in first
    ]
    modules = [
        run(model, [FuseLayers(remove=1, steps=5)], Context(training=one)).model.module
        for one in (first, second)
    ]
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(*(module.get_submodule(name).weight for module in modules))


def test_two_blocks_go_one_after_the_other(tmp_path):
    model = build("gpt2")
    outcome = run(model, [FuseLayers(remove=2, steps=5)], data(model))
    assert len(outcome.steps[0].changes) == 2
    module = outcome.model.module
    assert (len(module.transformer.h), module.config.n_layer) == (1, 1)
    assert all(parameter.requires_grad for parameter in module.parameters())
    compress.save(outcome.model, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    assert torch.equal(
        forward(back.module, model.example)["logits"], forward(module, model.example)["logits"]
    )
    prompt = model.example["input_ids"][:1, :5]
    cached = back.module.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        cached, back.module.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    )


def test_biases_survive_and_transformers_loads_it(tmp_path):
    import transformers

    model = build("opt")
    outcome = run(model, [FuseLayers(remove=1, steps=10)], data(model))
    compress.save(outcome.model, tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = forward(outcome.model.module, model.example)["logits"]
    assert torch.equal(forward(plain, model.example)["logits"], expected)


def test_it_exports(tmp_path):
    model = build("llama")
    outcome = run(model, [FuseLayers(remove=1, steps=3)], data(model))
    assert export.Onnx().write(outcome.model, tmp_path / "onnx").parity.relative < 1e-4


def test_bfloat16_trains_and_stays_float32():
    model = build("llama")
    outcome = run(model, [FuseLayers(remove=1, steps=30, precision="bfloat16")], data(model))
    assert {parameter.dtype for parameter in outcome.model.module.parameters()} == {torch.float32}


def test_without_training_data():
    with pytest.raises(DataError, match="fuse_layers needs training data, and there is none"):
        run(build("llama"), [FuseLayers(remove=1)], Context())


def test_too_many():
    model = build("llama")
    with pytest.raises(Unsuitable, match="`remove: 3` of the 3 blocks of `model.layers`: only 2 may go"):
        run(model, [FuseLayers(remove=3)], data(model))


def test_half_precision():
    model = build("llama")
    half = replace(model, module=copy.deepcopy(model.module).bfloat16())
    with pytest.raises(Unsuitable, match="trains in float32, and the model is in torch.bfloat16"):
        run(half, [FuseLayers(remove=1)], data(model))


def test_the_scope_names_what_may_go():
    model = build("llama")
    scope = Scope(include=["model.layers.2"])
    outcome = run(model, [FuseLayers(remove=1, steps=2, scope=scope)], data(model))
    assert outcome.steps[0].record["removed"] == [2]


def test_after_factorize():
    model = build("llama")
    context = replace(data(model), calibration=[model.example])
    passes = [Factorize(multiple=1, method="svd", ranks="uniform"), FuseLayers(remove=1)]
    with pytest.raises(Unsuitable, match="`fuse_layers` comes after `factorize`"):
        run(model, passes, context)
