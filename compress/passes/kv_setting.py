"""The setting of a config that says how many key and value heads there are, found by what transformers builds of it.

Nothing here knows an architecture: the setting is the integer with which transformers builds, without weights, a model
whose keys and values are as many as wanted, and that is the same in everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from compress.configs import nested
from compress.depth import adopt, built_from, shapes_of


@dataclass(frozen=True)
class Setting:
    """The attribute `name` of the config number `number` among those of a model (see `nested`), and its new value."""

    number: int
    name: str
    value: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def find_setting(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], before: int, after: int
) -> Setting | None:
    """The setting that is `before` and makes, set to `after`, the tensors named in `shapes` so, and changes no other.

    None where there is none: the module has no config, or its config has no such setting.
    """
    config = getattr(module, "config", None)
    known = built_from(type(module), copy.deepcopy(config)) if nested(config) else None
    if known is None:
        return None
    for number, part in enumerate(nested(config)):
        for name in [name for name, value in vars(part).items() if type(value) is int and value == before]:
            setting = Setting(number, name, after)
            built = _built(module, setting)
            if built is not None and _changed(shapes_of(known), shapes_of(built)) == dict(shapes):
                return setting
    return None


def apply_setting(module: nn.Module, setting: Setting) -> None:
    """Give every config inside `module` the setting, its modules what follows from it, and tensors of new shapes.

    The new tensors hold nothing yet. A module that has the setting already is left as it is.
    """
    config: Any = getattr(module, "config", None)
    if getattr(nested(config)[setting.number], setting.name) == setting.value:
        return
    old, new = built_from(type(module), copy.deepcopy(config)), _built(module, setting)
    assert old is not None
    assert new is not None
    _follow(module, dict(old.named_modules()), dict(new.named_modules()))
    for name, shape in _changed(shapes_of(old), shapes_of(new)).items():
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        value = layer.get_parameter(leaf)
        setattr(layer, leaf, nn.Parameter(value.new_zeros(shape), value.requires_grad))
    adopt(module, new, {setting.name})


def _built(module: nn.Module, setting: Setting) -> nn.Module | None:
    """A module as `module` with the setting, without weights, or None if its config makes none."""
    config = copy.deepcopy(module.config)
    setattr(nested(config)[setting.number], setting.name, setting.value)
    return built_from(type(module), config)


def _changed(old: dict[str, torch.Size], new: dict[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """The shapes in `new` that differ; none at all if the tensors have other names."""
    if old.keys() != new.keys():
        return {}
    return {name: tuple(shape) for name, shape in new.items() if shape != old[name]}


def _follow(module: nn.Module, old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
    """Set the plain attributes that differ between `old` and `new` on the modules of the same paths."""
    for path, part in module.named_modules():
        if path not in old or path not in new:
            continue
        for name, value in vars(new[path]).items():
            plain = isinstance(value, bool | int | float | str | tuple)
            if plain and name in vars(part) and vars(old[path]).get(name) != value:
                setattr(part, name, value)
