"""Small random models with batch norms and layer scales, whose statistics and factors are not those of a new model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.model import Model
from tests import zoo

SIZES = {"image_size": 64, "num_labels": zoo.CLASSES}


def levit() -> nn.Module:
    config = tf.LevitConfig(
        **SIZES,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 6, 2, 2, 2]],
    )
    return tf.LevitForImageClassificationWithTeacher(config)


def efficientnet() -> nn.Module:
    config = tf.EfficientNetConfig(**SIZES, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320)
    return tf.EfficientNetForImageClassification(config)


def regnet() -> nn.Module:
    config = tf.RegNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 2, 2, 1],
        groups_width=8,
        num_labels=zoo.CLASSES,
    )
    return tf.RegNetForImageClassification(config)


def mobilenet_v2() -> nn.Module:
    return tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(**SIZES, depth_multiplier=0.25))


def beit() -> nn.Module:
    return tf.BeitForImageClassification(tf.BeitConfig(**{**zoo.VISION, **SIZES}))


def swiftformer() -> nn.Module:
    config = tf.SwiftFormerConfig(**SIZES, depths=[1, 1, 2, 1], embed_dims=[16, 24, 32, 40])
    return tf.SwiftFormerForImageClassification(config)


def detr() -> nn.Module:
    """Its backbone has frozen batch norms, which are written out."""
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = tf.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=5,
    )
    return tf.DetrModel(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    one.__name__: one for one in (levit, efficientnet, regnet, mobilenet_v2, beit, swiftformer, detr)
}


def build(name: str) -> Model:
    """A model of this file or of the zoo, seeded, in evaluation mode: a new one at each call."""
    torch.manual_seed(7)
    if name in BUILDERS:
        model = Model(BUILDERS[name]().eval(), zoo.image(64), "image-classification")
    else:
        known = zoo.build(name)
        model = replace(known, module=copy.deepcopy(known.module))
    shake(model.module)
    return model


def shake(module: nn.Module) -> None:
    """Give batch norms, layer scales and biases random values, and weights a size at which signals come through."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith(("lambda", "layer_scale")):
            fill(parameter)
        elif name.endswith("bias"):
            fill(parameter, negative=True)
        elif parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape) * 1.5 / parameter[0].numel() ** 0.5
    for part in module.modules():
        if isinstance(part, _BatchNorm) or hasattr(part, "running_var"):
            for name in ("weight", "bias", "running_mean", "running_var"):
                fill(getattr(part, name), negative=name in ("bias", "running_mean"))


def fill(tensor: Tensor | None, negative: bool = False) -> None:
    """Random values from 0.5 to 1.5, or around zero, in place."""
    if tensor is not None:
        values = torch.randn(tensor.shape) * 0.3 if negative else torch.rand(tensor.shape) + 0.5
        tensor.data.copy_(values)


def batch_norms(module: nn.Module) -> list[str]:
    """The paths of all batch norms, frozen ones too."""
    return [
        path
        for path, part in module.named_modules()
        if isinstance(part, _BatchNorm) or hasattr(part, "running_var")
    ]
