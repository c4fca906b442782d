"""Tensors that a module computes from others (`torch.nn.utils.parametrize`), and plain ones in their place."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from compress.errors import Unsuitable

if TYPE_CHECKING:
    from torch import nn


def computed_in(module: nn.Module) -> list[str]:
    """The names of the tensors of `module` itself that it computes from others."""
    from torch.nn.utils import parametrize

    return list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


def require_plain(module: nn.Module, path: str) -> None:
    """Raise `Unsuitable` if a tensor inside `module`, called `path`, is computed from others."""
    for inside, part in module.named_modules(prefix=path):
        for name in computed_in(part):
            raise Unsuitable(
                f"`{f'{inside}.{name}'.removeprefix('.')}` is computed from other tensors, as those of a gene that "
                "blocks share are, and cannot be changed by itself.",
                "Put `{use: expand_depth, form: plain}` before, which gives every block weights of its own.",
            )


def make_plain(module: nn.Module) -> None:
    """Give every computed tensor inside `module` its value as a tensor of its own, in place.

    What it was computed from is let go of, and not written to: others may share it. (So may copies of a module share
    its class with the property that computes, which is why `parametrize.remove_parametrizations` does not serve.)
    """
    from torch import nn
    from torch.nn.utils import parametrize

    for part in list(module.modules()):
        if not (names := computed_in(part)):
            continue
        values = {name: getattr(part, name).detach().clone() for name in names}
        sources: Any = part.parametrizations
        part.__class__ = parametrize.type_before_parametrizations(part)
        del part.parametrizations
        for name, value in values.items():
            trained = [one.requires_grad for one in sources[name].parameters()]
            if trained:
                part.register_parameter(name, nn.Parameter(value, requires_grad=any(trained)))
            else:
                part.register_buffer(name, value)


def plain_copy(module: nn.Module) -> nn.Module:
    """`module` if all its tensors are its own, else a copy of it in which they are."""
    if not any(map(computed_in, module.modules())):
        return module
    copied = copy.deepcopy(module)
    make_plain(copied)
    return copied
