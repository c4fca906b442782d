"""Examples to forward arguments, with the model's own tokenizer or image processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from compress.model import Inputs, Model
    from compress.reading import Example

Encode = Callable[[Sequence["Example"]], "Inputs"]


def encoder(example: Example, max_length: int, model: Model) -> Encode:
    """How examples like `example` become forward arguments of `model`: the ones that its own example has."""
    if isinstance(example, torch.Tensor):
        return lambda group: _windowed(group, model)
    if isinstance(example, str | tuple):
        require_positions(max_length, model)
        tokenizer = tokenizer_of(model)
        return lambda group: _tokenized(group, tokenizer, max_length, model)
    processor = _image_processor(model)
    return lambda group: _seen(group, processor, model)


def encode_picture(picture: Path | Image.Image, model: Model) -> tuple[Inputs, torch.Tensor]:
    """The forward arguments of `model` for one picture, and its pixels as the model sees them.

    The pixels are what the processor gives before it scales and normalizes them: uint8 (height, width, 3). Raises
    `DataError` for a file that is no picture, and for a model that takes none or has no image processor.
    """
    processor = _image_processor(model)
    raw = _seen([picture], processor, model, do_rescale=False, do_normalize=False)["pixel_values"][0]
    pixels = raw.float().clamp(0, 255).round().to(torch.uint8)
    return _seen([picture], processor, model), pixels.movedim(0, -1)


def windows(text: str, length: int, model: Model) -> list[torch.Tensor]:
    """`text` as windows of `length` tokens, int64 `(length,)` each; one shorter window of a shorter text."""
    require_positions(length, model)
    tokens = tokenizer_of(model)(text, add_special_tokens=False, return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    if len(tokens) < 2:
        raise DataError(
            f"The text has {len(tokens)} tokens; a window needs at least 2.", "Give a longer text."
        )
    return list(tokens.unfold(0, length, length)) if len(tokens) >= length else [tokens]


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of `model`, or that of its processor. Raises `DataError` if there is none."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise DataError(
            f"The data is text, and {_name(model)} has no tokenizer.",
            "Put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder.",
        )
    return tokenizer


def require_positions(length: int, model: Model) -> None:
    """Raise `DataError` if samples of `length` tokens are longer than `model` can place."""
    limits = [getattr(_text_config(model), "max_position_embeddings", None), _tokenizer_limit(model)]
    limit = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    if limit is not None and length > limit:
        raise DataError(
            f"The data asks for {length} tokens a sample, and {_name(model)} takes at most {limit}.",
            f"Set `max_length: {limit}` or less.",
        )


def _text_config(model: Model) -> Any:
    config: Any = getattr(model.module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tokenizer_limit(model: Model) -> int | None:
    return getattr(getattr(model.processor, "tokenizer", model.processor), "model_max_length", None)


def _tokenized(texts: Sequence[Any], tokenizer: Any, max_length: int, model: Model) -> Inputs:
    if len(texts) > 1 and tokenizer.pad_token is None:
        raise DataError(
            "The tokenizer has no padding token, so that texts of different lengths make no batch.",
            "Set `batch_size: 1` for this data.",
        )
    pairs = isinstance(texts[0], tuple)
    first, second = (list(part) for part in zip(*texts, strict=True)) if pairs else (list(texts), None)
    encoded = tokenizer(
        first,
        second,
        padding=len(texts) > 1,
        truncation=True,
        max_length=max_length,
        return_token_type_ids="token_type_ids" in model.example,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return _for_forward(dict(encoded), model)


def _windowed(group: Sequence[torch.Tensor], model: Model) -> Inputs:
    tokens = torch.stack(list(group))
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "token_type_ids" in model.example:
        given["token_type_ids"] = torch.zeros_like(tokens)
    return _for_forward(given, model)


def _for_forward(given: dict[str, torch.Tensor], model: Model) -> Inputs:
    """The arguments that the model's example has, with the decoder's if it reads some."""
    if "decoder_input_ids" in model.example:
        given["decoder_input_ids"] = _shifted(given["input_ids"], model)
        given["decoder_attention_mask"] = given["attention_mask"]
    return {name: tensor for name, tensor in given.items() if name in model.example}


def _shifted(tokens: torch.Tensor, model: Model) -> torch.Tensor:
    """What a decoder reads to write `tokens`, `(batch, length)`: the start token, then all but the last."""
    config = model.module.config
    starts = (
        getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    )
    start = next((token for token in starts if token is not None), 0)
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)


def _image_processor(model: Model) -> Any:
    from transformers import ImageProcessingMixin

    processor = getattr(model.processor, "image_processor", model.processor)
    if "pixel_values" not in model.example:
        raise DataError(
            f"The data is pictures, and {_name(model)} takes {', '.join(model.example)}.", "Give text."
        )
    if not isinstance(processor, ImageProcessingMixin):
        raise DataError(
            f"The data is pictures, and {_name(model)} has no image processor.",
            "Put its preprocessor_config.json into the model's folder.",
        )
    return processor


def _seen(group: Sequence[Any], processor: Any, model: Model, **settings: bool) -> Inputs:
    """The pictures of `group` as `processor` gives them, with `settings` in the place of its own."""
    encoded = processor(images=[_picture(item) for item in group], return_tensors="pt", **settings)
    return {name: tensor for name, tensor in encoded.items() if name in model.example}


def _picture(item: Any) -> Any:
    """An RGB picture, read from `item` if it is a path."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(item, Path):
        return item.convert("RGB")
    try:
        with Image.open(item) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            f"{item} cannot be read as a picture: {error}.", "Remove or replace the file."
        ) from error


def _name(model: Model) -> str:
    return model.source or type(model.module).__name__
