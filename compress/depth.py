"""Take blocks out of a stack, and keep what counts them right: layer numbers, configs, lists with an entry a layer.

Nothing here knows an architecture. A layer number is an attribute that equals the block's place in every block.
The config's number of layers is the one with which transformers builds, without weights, a model of the same
parameters as the shortened one has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from compress.configs import nested
from compress.errors import ModelError, Unsuitable


def remove_blocks(module: nn.Module, path: str, places: Sequence[int]) -> None:
    """Take the children number `places` out of the list of blocks at `path`, in place.

    Raises `Unsuitable` if the container at `path` is no list.
    """
    container = module.get_submodule(path)
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise Unsuitable(
            f"The blocks in `{path}` are held by a {type(container).__name__}, not by a list.",
            "Blocks can be taken out of an nn.ModuleList or an nn.Sequential.",
        )
    blocks, count = list(container), len(container)
    kept = [place for place in range(count) if place not in set(places)]
    numbers = layer_numbers(blocks)
    for place in sorted(places, reverse=True):
        del container[place]
    for new, place in enumerate(kept):
        for part, name in numbers[place]:
            setattr(part, name, new)
    _shorten_configs(module, count, kept)


def restore_depth(module: nn.Module, path: str, count: int, places: Sequence[int]) -> None:
    """Give the list at `path`, of `count` blocks once, the depth that it has without `places`.

    A module that was built from a shortened config has that depth already. Raises `ModelError` for any other depth.
    """
    found = len(module.get_submodule(path))  # type: ignore[arg-type]
    if found == count:
        remove_blocks(module, path, places)
    elif found > count - len(places):
        raise ModelError(
            f"`{path}` has {found} blocks; the checkpoint was made from {count}, of which {len(places)} were removed.",
            "Load it with the model that it was made from.",
        )


def layer_numbers(blocks: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """For every block, the modules inside it and the names of their attributes that hold the block's number."""
    counts: dict[tuple[str, str], int] = {}
    for place, block in enumerate(blocks):
        for key in _integers(block, place):
            counts[key] = counts.get(key, 0) + 1
    keys = [key for key, count in counts.items() if count == len(blocks)]
    return [[(block.get_submodule(path), name) for path, name in keys] for block in blocks]


def _integers(block: nn.Module, value: int) -> Iterator[tuple[str, str]]:
    """The attributes inside `block` that are the integer `value`, as (path, name)."""
    for path, part in block.named_modules():
        for name, held in vars(part).items():
            if type(held) is int and held == value:
                yield path, name


def _shorten_configs(module: nn.Module, count: int, kept: Sequence[int]) -> None:
    """Set the number of layers, and what goes with it, wherever a config has it.

    A module that has no config, or none that says how many blocks there are, is left as it is.
    """
    config = getattr(module, "config", None)
    wanted = _shapes(module)
    for trial, names in _trials(config, count, kept):
        built = _built(type(module), trial)
        if built is not None and _shapes(built) == wanted:
            _adopt(module, built, names)
            return


def _trials(config: Any, count: int, kept: Sequence[int]) -> Iterator[tuple[Any, set[str]]]:
    """Copies of `config` in each of which another integer that equals `count` is the number of kept blocks, with the
    names of what differs.
    """
    for number, part in enumerate(nested(config)):
        for name in [name for name, value in vars(part).items() if type(value) is int and value == count]:
            for with_lists in (True, False):
                trial = copy.deepcopy(config)
                changed = {name: len(kept), **_derived(part, name, len(kept))}
                if with_lists:
                    changed |= _shortened(part, count, kept)
                vars(nested(trial)[number]).update(changed)
                yield trial, set(changed)


def _shortened(config: Any, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """The lists of `config` with an entry a layer, without those of the layers that went."""
    return {
        name: type(value)(value[place] for place in kept)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count
    }


def _derived(config: Any, name: str, count: int) -> dict[str, Any]:
    """What the class of `config` computes from its integer `name`, for the value `count`."""
    before, after = (_made(type(config), **{name: value}) for value in (getattr(config, name), count))
    return {
        key: after[key]
        for key, value in vars(config).items()
        if key in before and key in after and before[key] == value != after[key]
    }


def _made(kind: type[Any], **settings: Any) -> dict[str, Any]:
    """The attributes of a config of class `kind`; none if these settings alone make no config."""
    try:
        return vars(kind(**settings))
    except (TypeError, ValueError):
        return {}


def _built(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """A module of class `kind` without weights, or None if `config` makes none."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # The integer was another one than the number of layers, and each model refuses that in its own way.
        return None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _adopt(module: nn.Module, built: nn.Module, names: set[str]) -> None:
    """Take the attributes `names` of all configs over from those of `built`."""
    for (_, part), (_, other) in zip(module.named_modules(), built.named_modules(), strict=True):
        configs = (nested(getattr(one, "config", None)) for one in (part, other))
        for own, new in zip(*configs, strict=True):
            vars(own).update({name: vars(new)[name] for name in names & vars(own).keys() & vars(new).keys()})
