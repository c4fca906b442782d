"""A tiny language model with planted outliers, and how far 8 bits take it from itself."""

from __future__ import annotations

import torch
import transformers as tf

import compress
from compress.model import Inputs, Model
from compress.numerics.relations import divergence

WORDS, LENGTH, UNITS, GAIN = 48, 16, (3, 17), 50.0


def outlying() -> Model:
    """A random Llama in whose MLPs two hidden units are fifty times what they would be, and count as much less."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    module = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.up_proj.weight[list(UNITS)] *= GAIN
            layer.mlp.down_proj.weight[:, list(UNITS)] /= GAIN
    return Model(module, texts(1, seed=0)[0], "text-generation")


def texts(count: int, seed: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, WORDS, (8, LENGTH), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def in_8_bits(model: Model) -> Model:
    return compress.apply(model, [compress.Quantize()], calibration=texts(8, seed=1)).model


def distance(teacher: Model, student: Model) -> float:
    """The mean divergence of the student's words from the teacher's, on texts that neither pass has seen."""
    found = []
    with torch.no_grad():
        for batch in texts(4, seed=2):
            wanted, given = (one.module(**batch).logits for one in (teacher, student))
            found.append(float(divergence(wanted, given)))
    return sum(found) / len(found)
