"""Fewer key and value heads: exact where heads are equal, in every layout of the maps, and plain grouped queries."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import compress
import export
from compress.compare import forward
from compress.errors import NothingToDo, Unsuitable
from compress.layers.repeated import RepeatedLinear
from compress.model import Model
from compress.passes.base import Context
from compress.passes.group_queries import GroupQueries
from compress.passes.head_maps import HeadMaps, read_maps, sides, write_maps
from compress.pipeline import Outcome, run
from compress.scope import Scope
from tests import zoo


def llama() -> Any:
    return (
        tf.LlamaForCausalLM(tf.LlamaConfig(**zoo.DECODER, attention_bias=True)),
        zoo.text(),
        "text-generation",
    )


def phi3() -> Any:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**zoo.DECODER)), zoo.text(), "text-generation"


def qwen3() -> Any:
    config = tf.Qwen3Config(**{**zoo.DECODER, "num_key_value_heads": 6, "head_dim": 8})
    return tf.Qwen3ForCausalLM(config), zoo.text(), "text-generation"


def gptj() -> Any:
    config = tf.GPTJConfig(**zoo.TEXT, n_embd=48, n_layer=3, n_head=6, n_positions=64, rotary_dim=4)
    return tf.GPTJForCausalLM(config), zoo.text(), "text-generation"


def falcon(**changes: Any) -> Any:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_kv_heads": 6}
    config = tf.FalconConfig(**{**zoo.TEXT, **sizes, "multi_query": False, **changes})
    return tf.FalconForCausalLM(config), zoo.text(), "text-generation"


OTHERS = ("vit", "gpt2", "opt", "bloom", "gpt-neox", "modernbert", "t5")
MAKERS = {
    **{name: zoo.BUILDERS[name] for name in OTHERS},
    **{"llama": llama, "phi3": phi3, "qwen3": qwen3, "gptj": gptj},
}
GROUPED = ("llama", "phi3", "qwen3")
"""Models whose config says how many key and value heads there are."""


@cache
def made(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A model whose attentions attend: random maps, not small ones."""
    torch.manual_seed(3)
    module, example, task = MAKERS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    kinds = {key: one.to(dtype) if one.is_floating_point() else one for key, one in example.items()}
    return Model(module.to(dtype).eval(), kinds, task)


def with_equal_heads(model: Model, kv_heads: int) -> Model:
    """Every kv head equal to that `kv_heads` before it."""
    copied = own(model)
    for attention in model.graph.attentions:
        maps = read_maps(copied.module, attention)
        same = [head % kv_heads for head in range(attention.kv_heads)]
        write_maps(copied.module, attention, replace(maps, key=maps.key[same], value=maps.value[same]))
    return copied


def own(model: Model) -> Model:
    """A copy to edit."""
    return replace(model, module=copy.deepcopy(model.module))


def grouped(model: Model, **settings: Any) -> Outcome:
    context = Context(calibration=[model.example])
    return run(model, [GroupQueries(**{"unhealed": True, **settings})], context)


def maps_of(model: Model, number: int = 0) -> HeadMaps:
    return read_maps(model.module, model.graph.attentions[number])


def difference(model: Model, other: Model) -> float:
    one, two = forward(model.module, model.example), forward(other.module, model.example)
    return max(float((two[name] - value).abs().max() / value.abs().max()) for name, value in one.items())


@pytest.mark.parametrize(
    ("name", "pooling"), [*((name, "joint") for name in MAKERS), ("llama", "mean"), ("gpt2", "mean")]
)
def test_equal_heads_are_shared_exactly(name, pooling):
    kept = 1 if name == "vit" else 2
    model = with_equal_heads(made(name), kept)
    outcome = grouped(model, kv_heads=kept, pooling=pooling)
    changes = outcome.steps[0].changes
    assert len(changes) == len(set(model.graph.attentions))
    # Some norms compute in float32 whatever they read.
    assert difference(model, outcome.model) < 1e-6
    assert {one.kv_heads for one in outcome.model.graph.attentions} == {kept}
    assert outcome.steps[0].bytes_after < outcome.steps[0].bytes_before
    repeated = [part for part in outcome.model.module.modules() if isinstance(part, RepeatedLinear)]
    if name in GROUPED:
        assert outcome.model.module.config.num_key_value_heads == 2
        assert not repeated
        assert "`num_key_value_heads`" in changes[0].after
    else:
        assert repeated
        assert "a cache does not shrink" in changes[0].after


def test_llama_becomes_a_plain_grouped_llama():
    model = grouped(made("llama"), kv_heads=2).model
    attention = model.module.model.layers[1].self_attn
    assert attention.num_key_value_groups == 3
    assert attention.k_proj.weight.shape == (16, 48)
    assert attention.k_proj.out_features == 16
    assert attention.v_proj.bias.shape == (16,)
    again = tf.LlamaForCausalLM(model.module.config).double().eval()
    again.load_state_dict(model.module.state_dict())
    assert difference(model, replace(model, module=again)) == 0
    cache = model.module(**model.example, use_cache=True).cache
    assert cache.layers[0].keys.shape == (zoo.BATCH, 2, zoo.SEQUENCE, 8)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_cached_steps_agree_with_one_run(name):
    model = grouped(made(name), kv_heads=2).model
    ids = model.example["input_ids"][:1]
    whole = model.module(input_ids=ids).logits
    start = model.module(input_ids=ids[:, :8], use_cache=True)
    rest = model.module(input_ids=ids[:, 8:], cache=start.cache).logits
    torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_means_of_neighbours_with_their_biases(name):
    model = made(name)
    before = maps_of(model)
    outcome = grouped(model, kv_heads=3, grouping="in_order", pooling="mean")
    after = maps_of(outcome.model) if name == "llama" else read_distinct(outcome.model)
    for one, other in ((before.key, after.key), (before.value, after.value)):
        torch.testing.assert_close(one.unflatten(0, (3, 2)).mean(1), other)
    assert torch.equal(before.query, after.query)
    assert torch.equal(before.output, after.output)


def read_distinct(model: Model) -> HeadMaps:
    """The maps of the first attention, of the heads that are made once."""
    attention = model.graph.attentions[0]
    assert sides(attention)[1].path.endswith("distinct")
    return read_maps(model.module, attention)


def test_heads_that_are_alike_are_grouped_wherever_they_are():
    model = with_equal_heads(made("llama"), 2)
    change = grouped(model, kv_heads=2).steps[0].changes[0]
    assert change.before == "6 key and value heads"
    assert change.after == "2 (0 2 4 | 1 3 5), keys joint, values joint; `num_key_value_heads`"
    assert difference(model, grouped(model, kv_heads=2, grouping="in_order").model) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_joint_heads_lose_less_than_means(name):
    model = made(name)
    joint, mean = (
        grouped(model, kv_heads=2, grouping="in_order", pooling=one).model for one in ("joint", "mean")
    )
    assert error(model, joint) < 0.9 * error(model, mean)


def error(model: Model, other: Model) -> float:
    wanted, found = (forward(one.module, model.example)["logits"] for one in (model, other))
    return float((found - wanted).square().mean())


def test_norms_give_shares_of_the_queries():
    model = own(made("gpt2"))
    with torch.no_grad():
        for block in model.module.transformer.h:
            block.attn.c_attn.weight[:, 48 : 48 + 16] *= 8  # the keys of the first two heads
    outcome = grouped(model, kv_heads=3, grouping="norms")
    assert outcome.steps[0].changes[0].after.startswith("3 (0 1 2 3 | 4 | 5)")
    assert outcome.model.graph.attentions[0].kv_heads == 3
    equal = with_equal_heads(made("gpt2"), 1)
    plain, normed = (grouped(equal, kv_heads=3, grouping=one) for one in ("in_order", "norms"))
    assert plain.steps[0].changes == normed.steps[0].changes


def test_uneven_groups_leave_the_config_and_the_cache_as_they_are():
    model = own(made("llama"))
    with torch.no_grad():
        for block in model.module.model.layers:
            block.self_attn.k_proj.weight[:16] *= 8
    outcome = grouped(model, kv_heads=3, grouping="norms")
    assert outcome.model.module.config.num_key_value_heads == 6
    assert "a cache does not shrink" in outcome.steps[0].changes[0].after


def test_the_result_does_not_depend_on_how_data_is_batched():
    model = made("llama")
    ids = torch.randint(3, 99, (6, 12))
    one, other = (
        run(model, [GroupQueries(kv_heads=2, unhealed=True)], Context(calibration=batches)).model
        for batches in ([{"input_ids": ids}], [{"input_ids": rows} for rows in ids.flip(0).split(2)])
    )
    assert difference(one, other) < 1e-4


def test_fewer_groups_of_a_grouped_model():
    model = with_equal_heads(zoo.build("llama"), 1)
    outcome = grouped(model, kv_heads=1)
    assert outcome.model.module.config.num_key_value_heads == 1
    assert difference(model, outcome.model) < 1e-5


def test_a_part_of_the_layers_keeps_the_config():
    model = made("llama")
    outcome = grouped(model, kv_heads=2, scope=Scope(include=["model.layers.0.*"]))
    assert outcome.model.module.config.num_key_value_heads == 6
    assert [one.kv_heads for one in outcome.model.graph.attentions] == [2, 6, 6]


def test_keys_behind_a_norm_are_means_of_one_energy():
    model = made("qwen3")
    outcome = grouped(model, kv_heads=2)
    assert "keys mean, values joint" in outcome.steps[0].changes[0].after
    scaled = own(model)
    with torch.no_grad():
        for block in scaled.module.model.layers:
            block.self_attn.k_proj.weight[:8] *= 5  # the norm takes it back
    other = grouped(scaled, kv_heads=2)
    assert difference(outcome.model, other.model) < 1e-3


def test_as_many_heads_as_there_are_is_nothing_to_do():
    with pytest.raises(NothingToDo, match="self_attn: it has 6 key and value heads already"):
        grouped(made("llama"), kv_heads=6)


def test_no_divisor():
    with pytest.raises(NothingToDo, match="its 6 key and value heads make no 4 groups of one size"):
        grouped(made("llama"), kv_heads=4)
    assert grouped(made("llama"), kv_heads=4, grouping="norms").steps[0].changes


def test_a_map_that_reads_two_tensors_stays():
    with pytest.raises(NothingToDo, match=r"`.*`, reads more than one tensor"):
        grouped(zoo.build("deberta"), kv_heads=2)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (
            False,
            "`transformer.h.0.self_attention.query_key_value`, is a FalconLinear, and no plain linear map",
        ),
        (True, "the trace shows no linear map that makes its keys alone, head by head"),
    ],
)
def test_maps_that_cannot_be_written_to_or_told_apart_stay(new, why):
    module, example, task = falcon(new_decoder_architecture=new)
    with pytest.raises(NothingToDo, match=why):
        grouped(Model(module.eval(), example, task), kv_heads=2)


def test_a_softmax_over_more_than_scores_is_no_attention_that_the_trace_knows():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    module = tf.GptOssForCausalLM(tf.GptOssConfig(**zoo.GROUPED, **sizes)).eval()
    with pytest.raises(NothingToDo, match="the model: the trace shows no attention"):
        grouped(Model(module, zoo.text(), "text-generation"), kv_heads=1)


def test_repeated_heads_are_not_grouped_again():
    once = grouped(made("gpt2"), kv_heads=3).model
    with pytest.raises(NothingToDo, match="makes heads that are repeated already"):
        grouped(once, kv_heads=1)


def test_it_owes_training():
    model = made("llama")
    with pytest.raises(Unsuitable, match="gives key and value heads that were pooled and not trained"):
        run(model, [GroupQueries(kv_heads=2)], Context(calibration=[model.example]))


def test_quantized_models_are_refused():
    model = zoo.build("llama")
    context = Context(calibration=[model.example])
    with pytest.raises(Unsuitable, match="integer weights cannot be pooled"):
        run(model, [compress.Quantize(), GroupQueries(kv_heads=1, unhealed=True)], context)


def test_between_other_passes_and_back_from_disk(tmp_path: Path):
    model = made("llama", torch.float32)
    passes = [
        compress.DropLayers(remove=1, protect=0),
        GroupQueries(kv_heads=2),
        compress.Distill(steps=10, learning_rate=1e-4),
        compress.Quantize(),
    ]
    data = [model.example]
    done = run(model, passes, Context(calibration=data, training=data)).model
    back = compress.load(compress.save(done, tmp_path / "model"))
    assert back.module.config.num_key_value_heads == 2
    assert difference(done, back) == 0


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("gpt2", 6)])
def test_the_exported_cache(name, heads, tmp_path: Path):
    model = grouped(made(name, torch.float32), kv_heads=2).model
    artifact = export.Onnx(runtime="cpu").write(model, tmp_path / "onnx")
    caches = [spec for spec in artifact.inputs if spec.name.startswith("input.") and len(spec.shape) == 4]
    assert {spec.shape[1] for spec in caches} == {heads}
    assert artifact.parity.relative < 1e-4


def test_an_exported_encoder_with_repeated_heads(tmp_path: Path):
    model = grouped(made("vit", torch.float32), kv_heads=1).model
    assert export.Onnx(runtime="cpu").write(model, tmp_path / "onnx").parity.relative < 1e-4
