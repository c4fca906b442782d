"""Change the number of blocks in a stack, and keep what counts them right: layer numbers, configs, lists with an
entry a layer.

Nothing here knows an architecture. A layer number is an attribute that equals the block's place in every block.
The config's number of layers is the one with which transformers builds, without weights, a model of the same
parameters as the changed one has. A stack grows by copies of its blocks, which go on with the pattern in which they
differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from compress.configs import configs_of, nested
from compress.errors import Unsuitable
from compress.plain import computed_in, require_plain

Series = tuple[str, Sequence[Any]]
"""The name of something that has a value for each block, and the values in order."""


def remove_blocks(module: nn.Module, path: str, places: Sequence[int]) -> None:
    """Take the children number `places` out of the list of blocks at `path`, in place.

    Raises `Unsuitable` if the container at `path` is no list, or its blocks share a gene.
    """
    container = _list_of_blocks(module, path)
    blocks, count = list(container), len(container)
    kept = [place for place in range(count) if place not in set(places)]
    numbers = layer_numbers(blocks)
    for place in sorted(places, reverse=True):
        del container[place]
    for new, place in enumerate(kept):
        for part, name in numbers[place]:
            setattr(part, name, new)
    _fit_configs(module, count, kept)


def resize_blocks(module: nn.Module, path: str, depth: int) -> None:
    """Give the list at `path` `depth` blocks, in place: the last ones go, or copies of the first ones come.

    Raises `Unsuitable` as `remove_blocks` does, and if blocks must be added but differ (in anything but weights) in no
    pattern that is seen twice.
    """
    container = _list_of_blocks(module, path)
    blocks, count = list(container), len(container)
    if depth <= count:
        if depth < count:
            remove_blocks(module, path, range(depth, count))
        return
    period = _period(module, path, depth)
    sources = [*range(count), *(place % period for place in range(count, depth))]
    names = _number_names(blocks)
    configs = {id(config): config for config in configs_of(module)}  # modules share them
    for place in range(count, depth):
        block = copy.deepcopy(blocks[sources[place]], dict(configs))
        for inside, name in names:
            setattr(block.get_submodule(inside), name, place)
        container.append(block)
    _fit_configs(module, count, sources)


def restore_depth(module: nn.Module, path: str, count: int, places: Sequence[int]) -> None:
    """Take `places` out of the list at `path` if it has `count` blocks, as it had when they were taken out.

    A module that was built from a later config has its last depth already, and is left as it is.
    """
    if len(_list_of_blocks(module, path)) == count:
        remove_blocks(module, path, places)


def _list_of_blocks(module: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    container = module.get_submodule(path)
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise Unsuitable(
            f"The blocks in `{path}` are held by a {type(container).__name__}, not by a list.",
            "The number of blocks can be changed in an nn.ModuleList or an nn.Sequential.",
        )
    require_plain(container, path)
    return container


def layer_numbers(blocks: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """For every block, the modules inside it and the names of their attributes that hold the block's number."""
    names = _number_names(blocks)
    return [[(block.get_submodule(path), name) for path, name in names] for block in blocks]


def _number_names(blocks: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """The attributes that hold each block's number, as (path inside the block, name)."""
    counts: dict[tuple[str, str], int] = {}
    for place, block in enumerate(blocks):
        for key in _integers(block, place):
            counts[key] = counts.get(key, 0) + 1
    return [key for key, count in counts.items() if count == len(blocks)]


def _integers(block: nn.Module, value: int) -> Iterator[tuple[str, str]]:
    """The attributes inside `block` that are the integer `value`, as (path, name)."""
    for path, part in block.named_modules():
        for name, held in vars(part).items():
            if type(held) is int and held == value:
                yield path, name


def _period(module: nn.Module, path: str, depth: int) -> int:
    """After how many blocks of the list at `path` everything but their weights and numbers is the same again."""
    blocks = list(module.get_submodule(path).children())
    count = len(blocks)
    series = [*_attributes(blocks), *_lists(getattr(module, "config", None), count)]
    for period in range(1, count // 2 + 1):
        if all(values[place] == values[place % period] for _, values in series for place in range(count)):
            return period
    if count == 1:
        raise Unsuitable(
            f"`{path}` cannot grow from a single block: nothing tells which of its numbers count blocks.",
            "Start from a model with two blocks or more.",
        )
    name, values = next((name, values) for name, values in series if any(one != values[0] for one in values))
    raise Unsuitable(
        f"`{path}` cannot grow from {count} to {depth} blocks: `{name}` is {', '.join(map(str, values))} in them, "
        "which is no pattern to go on with.",
        f"Choose a depth of {count} or less.",
    )


def _attributes(blocks: Sequence[nn.Module]) -> Iterator[Series]:
    """The classes of the modules inside each block, and the plain values that they hold, but for the block's number."""
    numbers = set(_number_names(blocks))
    insides = [dict(block.named_modules()) for block in blocks]
    for inside, part in insides[0].items():
        parts = [modules.get(inside) for modules in insides]
        yield inside or "class", [type(one).__name__ for one in parts]
        for name, held in vars(part).items():
            if isinstance(held, bool | int | float | str | None) and (inside, name) not in numbers:
                values = [None if one is None else vars(one).get(name) for one in parts]
                yield f"{inside}.{name}".removeprefix("."), values


def _lists(config: Any, count: int) -> Iterator[Series]:
    """The lists of `config`, and of those inside it, that have `count` entries."""
    for part in nested(config):
        for name, value in vars(part).items():
            if isinstance(value, list | tuple) and len(value) == count:
                yield name, value


def _fit_configs(module: nn.Module, count: int, sources: Sequence[int]) -> None:
    """Set the number of layers, and what goes with it, wherever a config has it: there were `count` blocks, and the
    new ones are made from those number `sources`.

    A module that has no config, or none that says how many blocks there are, is left as it is.
    """
    config = getattr(module, "config", None)
    wanted = shapes_of(module)
    for trial, names in _trials(config, count, sources):
        built = built_from(type(module), trial)
        if built is not None and shapes_of(built) == wanted:
            adopt(module, built, names)
            return


def _trials(config: Any, count: int, sources: Sequence[int]) -> Iterator[tuple[Any, set[str]]]:
    """Copies of `config` in each of which another integer that equals `count` is the number of new blocks, with the
    names of what differs.
    """
    for number, part in enumerate(nested(config)):
        for name in [name for name, value in vars(part).items() if type(value) is int and value == count]:
            for with_lists in (True, False):
                trial = copy.deepcopy(config)
                changed = {name: len(sources), **_derived(part, name, len(sources))}
                if with_lists:
                    changed |= _rearranged(part, count, sources)
                vars(nested(trial)[number]).update(changed)
                yield trial, set(changed)


def _rearranged(config: Any, count: int, sources: Sequence[int]) -> dict[str, Any]:
    """The lists of `config` with an entry a layer, with the entries of the layers `sources`."""
    return {
        name: type(value)(value[place] for place in sources)
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


def built_from(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """A module of class `kind` without weights, or None if `config` makes none."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # The integer was another one than the number of layers, and each model refuses that in its own way.
        return None


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all tensors, those that another stack computes from a gene as well."""
    computed = {
        f"{path}.{name}": getattr(part, name)
        for path, part in module.named_modules()
        for name in computed_in(part)
    }
    own = {name: tensor for name, tensor in module.state_dict().items() if ".parametrizations." not in name}
    return {name: tensor.shape for name, tensor in (own | computed).items()}


def adopt(module: nn.Module, built: nn.Module, names: set[str]) -> None:
    """Take the attributes `names` of all configs over from those of `built`."""
    others = dict(built.named_modules())
    for path, part in module.named_modules():
        if path not in others:  # computes the weights of another stack from its gene, and has no config
            continue
        configs = (nested(getattr(one, "config", None)) for one in (part, others[path]))
        for own, new in zip(*configs, strict=True):
            vars(own).update({name: vars(new)[name] for name in names & vars(own).keys() & vars(new).keys()})
