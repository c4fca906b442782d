"""Tiny random models with their tokenizer or image processor, as values and as folders on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from compress.example import example_inputs
from compress.model import Model

WORDS = re.findall(
    r"\S+",
    "the a cat dog sat ran on under mat house tree red blue big small and or not it was is two three , . ?"
    " one four five old new man woman child bird fish went came saw said good bad day night",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POSITIONS = 130
SIZE = 32
"""Height and width of the pictures that `vit` takes."""

BODY: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def tokenizer(pairs: bool = True) -> Any:
    """A tokenizer of whole words; with `pairs`, one that frames texts with [CLS] and [SEP] as BERT's does."""
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*SPECIAL, *WORDS])}, "[UNK]")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    if pairs:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names.insert(1, "token_type_ids")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=POSITIONS,
        model_input_names=names,
    )


def bert(**changes: Any) -> Model:
    return _model(tf.BertModel(tf.BertConfig(**{**BODY, **changes})), "feature-extraction", tokenizer())


def bert_classifier(labels: dict[int, str]) -> Model:
    config = tf.BertConfig(
        **BODY, id2label=labels, label2id={name: number for number, name in labels.items()}
    )
    return _model(tf.BertForSequenceClassification(config), "text-classification", tokenizer())


def llama(**changes: Any) -> Model:
    return _model(
        tf.LlamaForCausalLM(tf.LlamaConfig(**{**BODY, **changes})), "text-generation", tokenizer(False)
    )


def t5() -> Model:
    config = tf.T5Config(
        vocab_size=BODY["vocab_size"],
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return _model(tf.T5ForConditionalGeneration(config), "text2text-generation", tokenizer(False))


def vit(processor_size: int = SIZE) -> Model:
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
        num_labels=3,
    )
    processor = tf.ViTImageProcessor(size={"height": processor_size, "width": processor_size})
    return _model(tf.ViTForImageClassification(config), "image-classification", processor)


def _model(module: Any, task: str, processor: Any) -> Model:
    torch.manual_seed(7)
    module.init_weights()
    return Model(module.eval(), example_inputs(module, processor), task, processor=processor)


def saved(model: Model, folder: Path) -> Path:
    """Write `model` with its processor as transformers does, and give `folder`."""
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Sentences of 2 to 12 known words, all different."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    return [
        " ".join(
            WORDS[number] for number in torch.randint(len(WORDS), (length,), generator=generator).tolist()
        )
        for length in lengths
    ]


def pictures(folder: Path, classes: tuple[str, ...] = ("",), each: int = 4, size: int = 40) -> Path:
    """Random pictures, `each` of a class in its own subfolder."""
    from PIL import Image

    generator = torch.Generator().manual_seed(5)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder
