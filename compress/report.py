"""What happened: the values in which passes, the runner and targets state their facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["exact", "lossy"]


@dataclass(frozen=True)
class Change:
    """One thing that a pass changed: `target` is a module path, `before` and `after` say what it was and is."""

    target: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Skip:
    """One thing that a pass left alone although it was in scope, and why."""

    target: str
    why: str


@dataclass(frozen=True)
class Caution:
    """A fact about a result that is good to know before it is used, and what to do about it."""

    fact: str
    remedy: str


@dataclass(frozen=True)
class Parity:
    """How far outputs are from the outputs that they are compared with, over all float outputs of one call.

    `relative` is the largest absolute difference divided by the largest absolute reference value, per output, then
    the worst. `cosine` is the lowest cosine similarity over the last dimension of any output, rows of zeros left out.
    """

    max_abs: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Step:
    """One pass as it was run on a model: enough to report it, and (with `record`) to rebuild its structure.

    `settings` are the pass's own, as JSON values, with `use`. Sizes are bytes of parameters and buffers, each tensor
    counted once.
    """

    name: str
    settings: dict[str, Any]
    effect: Effect
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    record: dict[str, Any]
    parity: Parity
    bytes_before: int
    bytes_after: int
    seconds: float
    resumed: bool = False
