"""Taking blocks out: layer numbers, configs, lists with an entry a layer, caches."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from compress.configs import configs_of
from compress.depth import layer_numbers, remove_blocks, resize_blocks, restore_depth
from compress.errors import Unsuitable
from tests.zoo import build

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
}


def llama(**settings) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **settings)).eval()


def test_numbers_follow():
    module = llama()
    remove_blocks(module, "model.layers", [1])
    assert [layer.self_attn.layer_idx for layer in module.model.layers] == [0, 1, 2]
    assert module.config.num_hidden_layers == 3


def test_an_attribute_that_is_no_number_stays():
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    for place, block in enumerate(blocks):
        block.place, block.fixed = place, 1
    assert [[name for _, name in found] for found in layer_numbers(blocks)] == [["place"]] * 3


def test_heads_that_are_as_many_as_layers_stay():
    module = llama()
    assert module.config.num_attention_heads == module.config.num_hidden_layers
    remove_blocks(module, "model.layers", [2])
    assert (module.config.num_attention_heads, module.config.num_hidden_layers) == (4, 3)


def test_lists_with_an_entry_a_layer_lose_the_right_one():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3TextConfig(**SIZES, layer_types=kinds, sliding_window=4)
    module = tf.Gemma3ForCausalLM(config).eval()
    kept = [0, 2, 3]
    remove_blocks(module, "model.layers", [1])
    assert list(module.config.layer_types) == [kinds[place] for place in kept]
    ids = torch.randint(3, 60, (2, 9))
    cached = module.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, module.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bert", "encoder.layer"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("whisper", "model.decoder.layers"),
        ("whisper", "model.encoder.layers"),
        ("vit", "vit.layers"),
    ],
)
def test_a_fresh_model_of_the_new_config_is_the_same_model(name, path):
    model = build(name)
    module = copy.deepcopy(model.module)
    count = len(module.get_submodule(path))
    remove_blocks(module, path, [0])
    fresh = type(module)(copy.deepcopy(module.config)).eval()
    assert len(fresh.get_submodule(path)) == count - 1
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            next(iter(fresh(**model.example).values())), next(iter(module(**model.example).values()))
        )


def test_configs_of_nested_decoders_follow():
    module = copy.deepcopy(build("t5").module)
    before = len(module.decoder.block)
    remove_blocks(module, "decoder.block", [before - 1])
    assert module.config.num_decoder_layers == before - 1
    assert len(module.encoder.block) == module.config.num_layers
    assert len(configs_of(module)) > 1
    ids = build("t5").example["input_ids"]
    cached = module.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, module.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


def test_restoring_twice_is_restoring_once():
    module = llama()
    restore_depth(module, "model.layers", 4, [1, 2])
    restore_depth(module, "model.layers", 4, [1, 2])
    assert len(module.model.layers) == 2


def test_a_depth_of_a_later_config_stays():
    module = llama()
    restore_depth(module, "model.layers", 3, [1])
    assert len(module.model.layers) == 4


@pytest.mark.parametrize("depth", [1, 3, 4, 5, 9])
def test_any_depth(depth):
    module = llama()
    resize_blocks(module, "model.layers", depth)
    assert [layer.self_attn.layer_idx for layer in module.model.layers] == list(range(depth))
    assert module.config.num_hidden_layers == depth
    assert {id(part.config) for part in module.modules() if hasattr(part, "config")} == {id(module.config)}
    assert len({id(one) for one in module.model.layers.parameters()}) == 9 * depth


def gemma(kinds: list[str]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": len(kinds)}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes, layer_types=kinds, sliding_window=4)).eval()


def test_a_pattern_goes_on():
    sliding, full = "sliding_attention", "full_attention"
    module = gemma([sliding, sliding, full, sliding, sliding, full, sliding])
    resize_blocks(module, "model.layers", 10)
    kinds = [sliding, sliding, full] * 3 + [sliding]
    assert list(module.config.layer_types) == kinds
    fresh = tf.Gemma3ForCausalLM(copy.deepcopy(module.config)).eval()
    fresh.load_state_dict(module.state_dict())
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, module(ids).logits)
    cached = module.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, module.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_without_a_pattern_there_is_no_growth():
    module = gemma(["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
    with pytest.raises(
        Unsuitable, match="`model.layers` cannot grow from 4 to 6 blocks: .* no pattern to go on"
    ):
        resize_blocks(module, "model.layers", 6)
    resize_blocks(module, "model.layers", 3)
    assert list(module.config.layer_types)[-1] == "full_attention"


def test_a_single_block_does_not_grow():
    module = llama()
    resize_blocks(module, "model.layers", 1)
    with pytest.raises(Unsuitable, match="`model.layers` cannot grow from a single block"):
        resize_blocks(module, "model.layers", 2)


def test_blocks_of_two_classes_in_turn_go_on():
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Sequential(kind()) for kind in (nn.ReLU, nn.GELU) * 2])
    resize_blocks(module, "blocks", 6)
    assert [type(block[0]) for block in module.blocks] == [nn.ReLU, nn.GELU] * 3


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bert", "encoder.layer"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("whisper", "model.decoder.layers"),
        ("vit", "vit.layers"),
    ],
)
def test_a_fresh_model_of_the_grown_config_is_the_same_model(name, path):
    model = build(name)
    module = copy.deepcopy(model.module)
    resize_blocks(module, path, 5)
    fresh = type(module)(copy.deepcopy(module.config)).eval()
    assert len(fresh.get_submodule(path)) == 5
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            next(iter(fresh(**model.example).values())), next(iter(module(**model.example).values()))
        )


def test_blocks_in_no_list():
    module = nn.Module()
    module.blocks = nn.ModuleDict({"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
    with pytest.raises(Unsuitable, match="The blocks in `blocks` are held by a ModuleDict, not by a list"):
        remove_blocks(module, "blocks", [0])
