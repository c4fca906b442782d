"""Static INT8 on small models of many kinds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

from compress.errors import DataError, Unproved, Unsuitable
from compress.layers.products import Products, _outputs
from compress.layers.quantized import QuantizedConv2d, QuantizedLinear
from compress.model import Model
from compress.passes.base import Context, Result
from compress.passes.quantize import Quantize
from compress.scope import Scope
from tests.zoo import build


def fresh(name: str) -> Model:
    """A copy of a small model that may be edited, with the graph of the original."""
    model = build(name)
    copied = replace(model, module=copy.deepcopy(model.module))
    copied.__dict__["graph"] = model.graph
    return copied


def quantize(model: Model, **settings) -> Result:
    return Quantize(**settings).apply(model, Context(calibration=[model.example]))


def error(result: Result, name: str) -> float:
    """The largest relative distance (2-norm) of any output to the float model's."""
    expected = _outputs(build(name).module, build(name).example)
    found = _outputs(result.module, build(name).example)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def test_patches_of_many_channels_are_cast_to_a_float_type():
    """ViTs cast their pictures to the type of the patch convolution's weight."""
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=4, num_channels=16,
    )  # fmt: skip
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(2, 16, 16, 16)}
    model = Model(tf.ViTModel(config, add_pooling_layer=False).eval(), pixels, "feature-extraction")
    expected = model.module(**pixels).last_hidden_state
    result = quantize(model)
    assert isinstance(result.module.embeddings.patch_embeddings.projection, QuantizedConv2d)
    found = result.module(**pixels).last_hidden_state
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.03


def reasons(result: Result) -> dict[str, str]:
    return {skip.target: skip.why for skip in result.skips}


@pytest.mark.parametrize(
    ("name", "bound"),
    [("bert", 0.02), ("gpt2", 0.02), ("vit", 0.03), ("llama", 0.03), ("t5", 0.06), ("whisper", 0.03)],
)
def test_error_is_bounded_and_every_body_linear_is_int8(name, bound):
    model = fresh(name)
    body = {one.path for one in model.graph.weights if (one.kind, one.role) == ("linear", "body")}
    result = quantize(model, attention=True)
    quantized = {path for path, layer in result.module.named_modules() if isinstance(layer, QuantizedLinear)}
    assert quantized == body
    assert {change.target for change in result.changes} >= body
    products = [layer for layer in result.module.modules() if isinstance(layer, Products)]
    assert len(products) == len(model.graph.attentions)
    assert 1e-5 < error(result, name) < bound


def test_convolutions_and_the_reason_for_those_left_alone():
    result = quantize(fresh("resnet"))
    quantized = [layer for layer in result.module.modules() if isinstance(layer, QuantizedConv2d)]
    assert len(quantized) >= 5
    why = reasons(result)["resnet.embedder.embedder.convolution"]
    assert why == "3 input channels per group; below 16, int8 is not faster"
    assert error(result, "resnet") < 0.03


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_restore_from_json_gives_the_same_outputs(ranges):
    result = quantize(fresh("bert"), attention=True, ranges=ranges)
    record = json.loads(json.dumps(result.record))
    module = Quantize().restore(copy.deepcopy(build("bert").module), record)
    module.load_state_dict(result.module.state_dict())
    expected = _outputs(result.module, build("bert").example)
    assert all(map(torch.equal, _outputs(module, build("bert").example), expected))


def test_modules_that_read_one_tensor_share_one_range():
    layers = quantize(fresh("bert")).record["layers"]
    parts = [f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    assert layers[parts[0]] == layers[parts[1]] == layers[parts[2]]
    assert layers[parts[0]] != layers["encoder.layer.1.attention.output.dense"]


def test_ranges_are_those_of_the_inputs_without_padding():
    model = fresh("bert")
    example = dict(model.example)
    pad = example["attention_mask"] == 0
    example["input_ids"] = example["input_ids"].masked_fill(pad, 0)
    model.module.embeddings.word_embeddings.weight.data[0] = 1e4
    model.module.embeddings.LayerNorm = nn.Identity()
    seen = []
    path = "encoder.layer.0.attention.self.query"
    hook = model.module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(**example)
    hook.remove()
    low, high = Quantize().apply(model, Context(calibration=[example])).record["layers"][path]
    assert seen[0].max() > 1e3
    assert (low, high) == (seen[0][~pad].min().item(), seen[0][~pad].max().item())


def test_reasons_for_what_is_in_scope_and_left_alone():
    why = reasons(quantize(fresh("whisper")))
    assert why["model.encoder.conv1"] == "Conv1d has no quantized form"
    assert why["model.decoder.embed_tokens"] == "an embedding; look-ups stay in float"
    assert why["proj_out"] == "the output head; set `head: true` to quantize it"
    tied = reasons(quantize(fresh("whisper"), head=True))["proj_out"]
    assert tied == "its weight is tied with model.decoder.embed_tokens.weight"


def test_the_head_if_asked():
    result = quantize(fresh("llama"), head=True)
    assert isinstance(result.module.lm_head, QuantizedLinear)


def test_scope_and_what_never_runs():
    model = fresh("bert")
    scope = Scope(include=("encoder.layer.0.*",), exclude=("*.query",))
    result = quantize(model, scope=scope, attention=True)
    assert {change.target for change in result.changes} == {
        *(f"encoder.layer.0.attention.self{part}" for part in ("", ".key", ".value")),
        *(f"encoder.layer.0.{part}.dense" for part in ("attention.output", "intermediate", "output")),
    }
    assert isinstance(result.module.encoder.layer[1].output.dense, nn.Linear)


def test_attention_outside_the_registry_is_declined_with_a_reason():
    result = quantize(fresh("deberta"), attention=True)
    whys = [skip.why for skip in result.skips if "registry" in skip.why]
    assert len(whys) == len(build("deberta").graph.attentions) == 3
    assert whys[0].startswith("its attention does not go through transformers' registry")
    assert result.module.config._attn_implementation == build("deberta").module.config._attn_implementation


def test_a_quantized_model_trains():
    result = quantize(fresh("bert"), attention=True)
    output = result.module(**build("bert").example).last_hidden_state
    output.square().mean().backward()
    gradients = {name for name, one in result.module.named_parameters() if one.grad is not None}
    assert {"embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.bias"} <= gradients


def test_quantized_twice_is_unsuitable():
    model = fresh("bert")
    module = quantize(model).module
    with pytest.raises(Unsuitable, match="quantized already"):
        Quantize().check(replace(model, module=module))


def test_missing_and_empty_calibration_data():
    with pytest.raises(DataError, match="quantize needs calibration data") as missing:
        Quantize().apply(fresh("bert"), Context())
    assert "--calibration" in missing.value.remedy
    with pytest.raises(DataError, match="gives no batches"):
        Quantize().apply(fresh("bert"), Context(calibration=[]))


def test_data_that_the_model_cannot_take():
    batches = [build("bert").example, {"pixel_values": torch.zeros(2, 3)}]
    with pytest.raises(DataError, match=r"batch 2 \(pixel_values \(2, 3\)\): ValueError: You must specify"):
        Quantize().apply(fresh("bert"), Context(calibration=batches))


def test_values_that_are_not_finite_name_module_and_batch():
    model = fresh("vit")
    bad = {"pixel_values": torch.full_like(model.example["pixel_values"], torch.nan)}
    with pytest.raises(Unproved, match=r"`vit\.layers\.0\..*not finite in calibration batch 2"):
        Quantize().apply(model, Context(calibration=[model.example, bad]))


def test_an_input_that_is_always_zero():
    model = fresh("vit")
    scope = Scope(include=("*.fc2",))
    for block in model.module.vit.layers:
        block.mlp.activation_fn = nn.Threshold(1e9, 0.0)
        block.mlp.fc1.register_forward_hook(lambda *_: torch.zeros(2, 17, 72))
    with pytest.raises(DataError, match="zero in every calibration batch") as caught:
        quantize(model, scope=scope)
    assert 'exclude: ["vit.layers.0.mlp.fc2"]' in caught.value.remedy


@pytest.mark.parametrize(
    "bad", [{"percentile": 101}, {"ranges": "entropy"}, {"weights": "int4"}, {"bits": 8}]
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Quantize(**bad)
