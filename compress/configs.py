"""The configs of a transformers model: every copy of every one, wherever its modules keep them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def configs_of(module: nn.Module) -> list[Any]:
    """Every config object that a module inside `module` holds, and those inside it; each once."""
    found = {id(one): one for part in module.modules() for one in nested(getattr(part, "config", None))}
    return list(found.values())


def nested(config: Any) -> list[Any]:
    """`config` and the configs inside it, in a fixed order; nothing if it is no config of transformers."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        return []
    return [config, *(one for value in vars(config).values() for one in nested(value))]


@contextmanager
def using_cache(module: nn.Module, cache: bool) -> Iterator[None]:
    """Set `use_cache` on every config inside `module` for the block: nested decoders keep their own copies."""
    with ExitStack() as stack:
        for config in configs_of(module):
            if hasattr(config, "use_cache"):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = cache
        yield
