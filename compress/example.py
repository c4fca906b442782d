"""Example inputs for a model that comes without any, made from its configuration and the names its forward takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Inputs = dict[str, torch.Tensor]

BATCH = 2
"""More than one, so that a traced batch dimension stays dynamic."""
SEQUENCE = 16


def example_inputs(module: nn.Module, processor: Any = None) -> Inputs:
    """Forward keyword arguments for `module`, a batch of 2: random tokens of length 16, pictures, or audio features.

    Token models get an attention mask whose second row ends in padding, but for models that generate. Raises
    `ModelError` for a module whose main input is of another kind.
    """
    import torch

    accepted = inspect.signature(module.forward).parameters
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    for name, make in (
        ("pixel_values", _pixels),
        ("input_features", _audio_features),
        ("input_values", _audio),
        ("input_ids", _tokens),
    ):
        if name in accepted and _reads(module, name):
            inputs |= make(module.config, generator)
    if not inputs:
        raise ModelError(
            f"No example can be made for {type(module).__name__}: its forward takes {', '.join(accepted)}.",
            "Pass example={...} with tensors for a batch of 2.",
        )
    if getattr(module.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs.get("input_ids", _tokens(module.config, generator)["input_ids"])[
            :, :8
        ]
    if "token_type_ids" in getattr(processor, "model_input_names", ()) and "input_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if getattr(module, "can_generate", lambda: False)() and "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return {name: value for name, value in inputs.items() if name in accepted}


def _reads(module: Any, name: str) -> bool:
    """Whether `name` is the main input, or that of one of several towers."""
    if module.main_input_name == name:
        return True
    config = module.config
    towers = {"pixel_values": "vision_config", "input_ids": "text_config", "input_features": "audio_config"}
    return all(
        hasattr(config, tower) for tower in {towers.get(name, ""), towers.get(module.main_input_name, "")}
    )


def _tokens(config: Any, generator: torch.Generator) -> Inputs:
    import torch

    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (BATCH, SEQUENCE), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -SEQUENCE // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pixels(config: Any, generator: torch.Generator) -> Inputs:
    import torch

    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}


def _audio_features(config: Any, generator: torch.Generator) -> Inputs:
    import torch

    frames = 2 * config.max_source_positions
    return {"input_features": torch.randn(BATCH, config.num_mel_bins, frames, generator=generator)}


def _audio(config: Any, generator: torch.Generator) -> Inputs:
    import torch

    del config
    return {"input_values": torch.randn(BATCH, 16000, generator=generator)}
