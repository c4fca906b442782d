"""What a pass is: its settings, one check, one application, and the way back from its record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from compress.errors import Unsuitable
from compress.progress import SILENT, Observer
from compress.report import Change, Effect, Skip
from compress.scope import Scope

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.model import Model

Needs = Literal["nothing", "calibration", "training"]
Batches = Iterable[Mapping[str, "torch.Tensor"]]
"""Batches of forward keyword arguments. May be iterated more than once, with the same result each time."""


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the model. Batches are None where the recipe names no data for them.

    While a pass runs, its model and the calibration and training batches are on `device`: the runner brings them there.
    `heldout` is what the result is judged on: no pass reads it.
    `teacher` is the model that training is measured against: the one that the run began with, unless given.
    `scratch` is a folder for what an interrupted pass goes on from; it need not exist yet, and the runner removes it
    when the pass is done.
    """

    device: str = "cpu"
    seed: int = 0
    calibration: Batches | None = None
    training: Batches | None = None
    heldout: Batches | None = None
    targets: tuple[str, ...] = ()
    observer: Observer = SILENT
    teacher: Model | None = None
    scratch: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a pass did: the module (edited in place or new), its changes, and what it left alone and why.

    `record` holds JSON values only: with it and the settings, `restore` rebuilds the same structure without data.
    """

    module: nn.Module
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


class Pass(BaseModel, ABC):
    """A compression pass. The fields of a subclass are its settings; a subclass is final.

    A subclass declares `use: Literal["its-name"] = "its-name"`, and says by class variables whether it keeps the
    function (`effect`) and which data it `needs`. It holds no state, prints nothing, and reads no files. Its module
    imports no torch at the top, so that recipes are validated without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    effect: ClassVar[Effect]
    needs: ClassVar[Needs]

    use: str
    scope: Scope = Scope()
    allow_empty: bool = False
    """Go on when the pass finds nothing to do, instead of failing."""

    def check(self, model: Model) -> None:
        """Raise `Unsuitable` if this pass cannot serve `model`; rules about the order of passes read its history."""

    def owes(self, before: Sequence[Pass]) -> str:
        """What this pass gives after the passes `before` that a later pass must train: a noun, in the plural, or "".

        A pass that owes has a setting `unhealed`, with which it owes nothing.
        """
        del before
        return ""

    def learns_labels(self) -> bool:
        """Whether this pass reads `labels` in its training batches. Without them, it is given none."""
        return False

    def require_local(self) -> None:
        """Raise `Unsuitable` unless the pass, with these settings, needs nothing but a block and what the block reads,
        so that it can be applied block by block. A pass that can be overrides this.
        """
        raise Unsuitable(
            f"The pass `{self.use}` needs the whole model, and cannot be applied block by block.",
            "Load the whole model and run it without streaming; `factorize` with `method: svd_llm` and "
            "`ranks: uniform` is applied block by block.",
        )

    def joined(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The record of several blocks, each with one of its own, whose values are maps by module path."""
        return {name: {k: v for one in records for k, v in one[name].items()} for name in records[0]}

    @abstractmethod
    def apply(self, model: Model, context: Context) -> Result:
        """Run the pass. Owns `model.module` and may edit it in place; the runner has made the copy."""

    @abstractmethod
    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        """Give `module`, freshly built and not yet loaded, the structure that `apply` gave it. Needs no data."""


@dataclass(frozen=True)
class Debt:
    """What the pass number `place` of a list owes, with none after it that trains; in the words of an error."""

    place: int
    fact: str
    remedy: str


def unpaid(passes: Sequence[Pass], before: Sequence[Pass] = ()) -> Debt | None:
    """The first debt in a list of passes, run on a model that the passes `before` made; None if all are paid."""
    for place, one in enumerate(passes):
        trained = any(later.needs == "training" for later in passes[place + 1 :])
        owed = "" if trained else one.owes((*before, *passes[:place]))
        if owed:
            fact = f"The pass `{one.use}` gives {owed}, and no pass that trains comes after it."
            remedy = "Put one after it, such as `distill`, or set `unhealed: true` to take them as they are."
            return Debt(place, fact, remedy)
    return None
