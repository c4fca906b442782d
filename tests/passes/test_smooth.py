"""SmoothQuant: the function stays, the outliers go."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from compress.errors import DataError, Unsuitable
from compress.layers.linear import ScaledLinear
from compress.layers.products import _outputs
from compress.model import Model
from compress.passes.base import Context, Result
from compress.passes.calibration import unpadded
from compress.passes.quantize import Quantize
from compress.passes.smooth import Smooth
from compress.pipeline import run
from compress.scope import Scope
from compress.testing import check_pass
from tests.zoo import build

NAMES = ["bert", "gpt2", "opt", "llama", "qwen3", "gemma3", "phi3", "vit", "t5"]


def fresh(name: str) -> Model:
    """A copy with the graph of the original, and norms and biases that are not ones and zeros."""
    model = build(name)
    copied = replace(model, module=copy.deepcopy(model.module))
    copied.__dict__["graph"] = model.graph
    torch.manual_seed(0)
    for parameter in copied.module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return copied


def smooth(model: Model, **settings) -> Result:
    return Smooth(**settings).apply(model, Context(calibration=[model.example]))


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_unchanged(name):
    model = fresh(name)
    expected = _outputs(model.module, model.example)
    result = smooth(model)
    assert len(result.changes) >= len(model.graph.attentions)
    assert distance(_outputs(result.module, model.example), expected) <= 1e-5


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_function_is_unchanged_at_both_ends_of_alpha(alpha):
    model = fresh("llama")
    expected = _outputs(model.module, model.example)
    assert distance(_outputs(smooth(model, alpha=alpha).module, model.example), expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_readers_multiply_where_a_scale_cannot_be_folded(name):
    model = fresh(name)
    expected = _outputs(model.module, model.example)
    before = len(Smooth().apply(fresh(name), Context(calibration=[model.example])).changes)
    result = smooth(model, alpha=0.8, multiply=True)
    multiplied = [change for change in result.changes if change.what == "smoothed, multiplied"]
    assert len(result.changes) == before + len(multiplied)
    assert len(multiplied) >= len(model.graph.mlps)
    assert set(result.record["scaled"]) == {
        path for path, layer in result.module.named_modules() if isinstance(layer, ScaledLinear)
    }
    assert distance(_outputs(result.module, model.example), expected) <= 1e-5


def test_what_multiplies_is_still_seen_as_linear_and_quantized():
    model = build("bert")
    context = Context(calibration=[model.example])
    outcome = run(model, [Smooth(alpha=0.8, multiply=True), Quantize()], context)
    quantized = {change.target for change in outcome.steps[1].changes}
    assert quantized == {change.target for change in run(model, [Quantize()], context).steps[0].changes}


def test_a_multiplying_model_keeps_the_contract():
    model = build("bert")
    check_pass(Smooth(alpha=0.8, multiply=True), model, Context(calibration=[model.example]))


def test_a_pooled_tensor_as_wide_as_the_sequence_is_long_is_not_taken_for_a_sequence():
    ids = torch.ones(2, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    assert unpadded(torch.ones(2, 4), batch, 1).shape == (2, 4)
    assert unpadded(torch.ones(2, 4, 8), batch, 1).shape == (5, 8)


def inputs_of(model: Model, path: str) -> torch.Tensor:
    seen = []
    hook = model.module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _outputs(model.module, model.example)
    hook.remove()
    kept = seen[0][model.example["attention_mask"].bool()]
    return kept.abs().amax(0)


def test_alpha_one_evens_out_the_inputs_and_alpha_zero_the_weights():
    even = fresh("llama")
    smooth(even, alpha=1.0)
    largest = inputs_of(even, "model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-4, atol=1e-4)
    weights = fresh("llama")
    smooth(weights, alpha=0.0)
    block = weights.module.model.layers[1].self_attn
    columns = torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight]).abs().amax(0)
    torch.testing.assert_close(columns, torch.ones_like(columns), rtol=1e-4, atol=1e-4)


def test_quantization_error_falls_with_an_outlier_channel():
    def planted() -> Model:
        model = fresh("opt")
        for block in model.module.model.decoder.layers:
            block.self_attn_layer_norm.weight.data[5] = 60.0
            block.final_layer_norm.weight.data[7] = 60.0
        return model

    expected = _outputs(planted().module, planted().example)
    errors = []
    for passes in ([Quantize()], [Smooth(), Quantize()]):
        model = planted()
        for one in passes:
            model = replace(model, module=one.apply(model, Context(calibration=[model.example])).module)
            model.__dict__["graph"] = build("opt").graph
        errors.append(distance(_outputs(model.module, model.example), expected))
    assert errors[1] < 0.5 * errors[0]


def test_what_moves_where():
    result = smooth(fresh("llama"))
    targets = {change.target for change in result.changes}
    assert {
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp.up_proj",
    } <= targets
    assert result.changes[0].before.startswith("largest channel ")
    assert result.record == {"scaled": []}


def test_reasons_for_what_stays():
    whys = {skip.target: skip.why for skip in smooth(fresh("bert")).skips}
    assert whys["encoder.layer.0.output.LayerNorm"] == (
        "the residual also reads this norm, as in post-norm models"
    )
    assert whys["encoder.layer.0.intermediate.dense"] == "a scale does not pass through gelu"
    tied = {skip.why for skip in smooth(fresh("gpt2")).skips}
    assert "shares its weight with transformer.wte.weight" in tied


def test_a_reader_out_of_scope_keeps_its_norm():
    result = smooth(fresh("llama"), scope=Scope(exclude=("model.layers.0.self_attn.q_proj",)))
    whys = {skip.target: skip.why for skip in result.skips}
    assert whys["model.layers.0.input_layernorm"] == (
        "model.layers.0.self_attn.q_proj would have to be scaled with it, and is out of scope"
    )
    assert "model.layers.1.input_layernorm" not in whys


def test_nothing_in_scope_changes_nothing():
    model = fresh("llama")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    result = smooth(model, scope=Scope(include=("model.embed_tokens",)))
    assert (result.changes, result.skips) == ((), ())
    assert all(torch.equal(value, before[name]) for name, value in result.module.state_dict().items())


def test_a_quantized_model_is_unsuitable():
    model = fresh("bert")
    Quantize().apply(model, Context(calibration=[model.example]))
    with pytest.raises(Unsuitable, match="quantized already") as caught:
        Smooth().check(model)
    assert "before `quantize`" in caught.value.remedy


def test_missing_calibration_data():
    with pytest.raises(DataError, match="smooth needs calibration data"):
        Smooth().apply(fresh("bert"), Context())


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="alpha"):
        Smooth(alpha=1.5)
