"""Small random models of many architectures, built from their configs alone; sizes differ so that mix-ups
show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from compress.model import Model

BATCH, SEQUENCE, PATCHED = 2, 12, 32
VOCABULARY, CLASSES = 99, 5

Build = Callable[[], tuple[nn.Module, Mapping[str, Tensor], str]]

TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    **TEXT,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 50,
}
DECODER = {
    **TEXT,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 10}
VISION = {
    "image_size": PATCHED,
    "patch_size": 8,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 72,
    "num_labels": CLASSES,
}


def tokens(length: int = SEQUENCE, low: int = 3) -> Tensor:
    return torch.randint(low, VOCABULARY, (BATCH, length))


def text(length: int = SEQUENCE) -> dict[str, Tensor]:
    """Token ids and a mask whose second row is shorter by three."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens(length), "attention_mask": mask}


def image(size: int = PATCHED) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def bert():
    return tf.BertModel(tf.BertConfig(**ENCODER)), text(), "feature-extraction"


def bert_classifier():
    return (
        tf.BertForSequenceClassification(tf.BertConfig(**ENCODER, num_labels=CLASSES)),
        text(),
        "text-classification",
    )


def bert_masked():
    return tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), text(), "fill-mask"


def distilbert():
    config = tf.DistilBertConfig(
        **TEXT, dim=40, n_layers=3, n_heads=4, hidden_dim=72, max_position_embeddings=50, num_labels=CLASSES
    )
    return tf.DistilBertForSequenceClassification(config), text(), "text-classification"


def roberta():
    return tf.RobertaModel(tf.RobertaConfig(**ENCODER)), text(), "feature-extraction"


def deberta():
    config = tf.DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    return tf.DebertaV2Model(config), text(), "feature-extraction"


def modernbert():
    config = tf.ModernBertConfig(
        **ENCODER,
        global_attn_every_n_layers=3,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
    )
    return tf.ModernBertModel(config), text(), "feature-extraction"


def gpt2():
    config = tf.GPT2Config(**TEXT, n_embd=48, n_layer=3, n_head=6, n_inner=88, n_positions=64)
    return tf.GPT2LMHeadModel(config), text(), "text-generation"


def opt():
    config = tf.OPTConfig(
        **{key: value for key, value in DECODER.items() if key != "intermediate_size"},
        ffn_dim=88,
        word_embed_proj_dim=48,
    )
    return tf.OPTForCausalLM(config), text(), "text-generation"


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), text(), "text-generation"


def mistral():
    return tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=7)), text(), "text-generation"


def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)), text(), "text-generation"


def gemma3():
    config = tf.Gemma3TextConfig(**GROUPED, sliding_window=7, query_pre_attn_scalar=10)
    return tf.Gemma3ForCausalLM(config), text(), "text-generation"


def phi3():
    config = tf.Phi3Config(**{**DECODER, "num_key_value_heads": 2})
    return tf.Phi3ForCausalLM(config), text(), "text-generation"


def bloom():
    config = tf.BloomConfig(**TEXT, hidden_size=48, n_layer=3, n_head=6)
    return tf.BloomForCausalLM(config), text(), "text-generation"


def gpt_neox():
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**DECODER)), text(), "text-generation"


def t5():
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=40,
        d_kv=9,
        d_ff=72,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    example = {**text(), "decoder_input_ids": tokens(7)}
    return tf.T5ForConditionalGeneration(config), example, "text2text-generation"


def whisper():
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=40,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=5,
        encoder_ffn_dim=72,
        decoder_ffn_dim=76,
        max_source_positions=24,
        max_target_positions=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    example = {"input_features": torch.randn(BATCH, 16, 48), "decoder_input_ids": tokens(7)}
    return tf.WhisperForConditionalGeneration(config), example, "automatic-speech-recognition"


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION)), image(), "image-classification"


def deit():
    return (
        tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**VISION)),
        image(),
        "image-classification",
    )


def dinov2():
    config = tf.Dinov2Config(
        **{key: value for key, value in VISION.items() if key != "intermediate_size"}, mlp_ratio=3
    )
    return tf.Dinov2Model(config), image(), "image-feature-extraction"


def dinov2_gated():
    config = tf.Dinov2Config(
        **{key: value for key, value in VISION.items() if key != "intermediate_size"},
        mlp_ratio=3,
        use_swiglu_ffn=True,
    )
    return tf.Dinov2Model(config), image(), "image-feature-extraction"


def towers() -> dict[str, Any]:
    text_config = {**ENCODER, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 88}
    vision_config = {key: value for key, value in VISION.items() if key != "num_labels"}
    return {"text_config": text_config, "vision_config": vision_config}


def clip():
    config = tf.CLIPConfig(**towers(), projection_dim=28)
    return tf.CLIPModel(config), {**text(), **image()}, "zero-shot-image-classification"


def siglip():
    parts = towers()
    parts["text_config"]["projection_size"] = 40
    config = tf.SiglipConfig(**parts)
    return tf.SiglipModel(config), {"input_ids": tokens(), **image()}, "zero-shot-image-classification"


def swin():
    config = tf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2, 3],
        num_heads=[2, 4, 8],
        window_size=4,
        mlp_ratio=3.0,
        num_labels=CLASSES,
    )
    return tf.SwinForImageClassification(config), image(64), "image-classification"


def cvt():
    config = tf.CvtConfig(
        embed_dim=[16, 24, 32],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
        mlp_ratio=[3.0, 3.0, 3.0],
        num_labels=CLASSES,
    )
    return tf.CvtForImageClassification(config), image(64), "image-classification"


def segformer():
    config = tf.SegformerConfig(
        depths=[2, 2, 2, 3],
        hidden_sizes=[16, 24, 32, 40],
        num_attention_heads=[1, 2, 4, 5],
        mlp_ratios=[3, 3, 3, 3],
        decoder_hidden_size=28,
        num_labels=CLASSES,
    )
    return tf.SegformerForSemanticSegmentation(config), image(64), "image-segmentation"


def dpt():
    config = tf.DPTConfig(
        **{**VISION, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[12, 16, 20, 24],
        fusion_hidden_size=18,
        is_hybrid=False,
    )
    return tf.DPTForDepthEstimation(config), image(), "depth-estimation"


def convnext():
    config = tf.ConvNextConfig(depths=[2, 2, 3, 2], hidden_sizes=[8, 16, 24, 40], num_labels=CLASSES)
    return tf.ConvNextForImageClassification(config), image(64), "image-classification"


def poolformer():
    config = tf.PoolFormerConfig(
        depths=[2, 2, 3, 2], hidden_sizes=[8, 16, 24, 40], mlp_ratio=3.0, num_labels=CLASSES
    )
    return tf.PoolFormerForImageClassification(config), image(64), "image-classification"


def resnet():
    config = tf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32],
        depths=[2, 3, 2],
        num_labels=CLASSES,
        layer_type="bottleneck",
    )
    return tf.ResNetForImageClassification(config), image(64), "image-classification"


def mobilevit():
    config = tf.MobileViTConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 36],
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    return tf.MobileViTForImageClassification(config), image(64), "image-classification"


BUILDERS: dict[str, Build] = {
    "bert": bert,
    "bert-classifier": bert_classifier,
    "bert-masked": bert_masked,
    "distilbert": distilbert,
    "roberta": roberta,
    "deberta": deberta,
    "modernbert": modernbert,
    "gpt2": gpt2,
    "opt": opt,
    "llama": llama,
    "mistral": mistral,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "phi3": phi3,
    "bloom": bloom,
    "gpt-neox": gpt_neox,
    "t5": t5,
    "whisper": whisper,
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "dinov2-gated": dinov2_gated,
    "clip": clip,
    "siglip": siglip,
    "swin": swin,
    "cvt": cvt,
    "segformer": segformer,
    "dpt": dpt,
    "convnext": convnext,
    "poolformer": poolformer,
    "resnet": resnet,
    "mobilevit": mobilevit,
}
NAMES = tuple(BUILDERS)


@cache
def build(name: str) -> Model:
    """The small model `name`, seeded, in evaluation mode. Every call gives the same value: copy it to edit
    it.
    """
    torch.manual_seed(NAMES.index(name))
    module, example, task = BUILDERS[name]()
    return Model(module=module.eval(), example=example, task=task)


def fresh(name: str) -> Model:
    """The small model `name` with a module of its own, to edit."""
    return replace(build(name), module=copy.deepcopy(build(name).module))


def varied(model: Model, count: int) -> list[dict[str, Tensor]]:
    """Batches of other values in the shapes of the example, without padding."""
    generator = torch.Generator().manual_seed(0)

    def filled(name: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        if "mask" in name:
            return torch.ones_like(value)
        return torch.randint(3, 60, value.shape, generator=generator)

    return [{name: filled(name, value) for name, value in model.example.items()} for _ in range(count)]
