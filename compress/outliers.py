"""The outliers of a model's activations, place by place: what `modelpress inspect --outliers` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from compress.model import Inputs, Model


@dataclass(frozen=True)
class Outliers:
    """What was seen at one place: the largest magnitude, and the kurtosis of all values (3 of a normal distribution).

    `what` is `residual` (the state after a block), `attention output`, `feed-forward output` or `norm output` of the
    module at `path`, or its `linear input`: what a linear map or convolution in the body of the model reads, which is
    what `quantize` rounds. Of several that read one tensor the first is named.
    """

    what: str
    path: str
    largest: float
    kurtosis: float


def outliers(model: Model, batches: Iterable[Inputs] | None = None) -> tuple[Outliers, ...]:
    """The outliers of `model` over `batches` (None: its example), padding left out; kind by kind, in execution order.

    Raises `Unsuitable` if the model cannot be traced, and `DataError` for batches that it cannot take.
    """
    from compress.passes.spreads import places, spreads

    seen = spreads(model.module, places(model.graph), [model.example] if batches is None else batches)
    return tuple(Outliers(one.what, one.path, found.largest, found.kurtosis) for one, found in seen.items())


def outliers_at(model: Model, data: Path | None) -> tuple[Outliers, ...]:
    """The outliers of `model` over the text, table or folder of pictures at `data`; over its example if None."""
    from compress.data import batches, source_at

    return outliers(model, batches(source_at(data), model) if data else None)


def as_table(found: Sequence[Outliers]) -> Table:
    """One row a place, and one for each kind of place with the largest and the mean."""
    from rich import box
    from rich.table import Table

    table = Table("place", "largest", "kurtosis", title="Outliers", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for what in dict.fromkeys(one.what for one in found):
        own = [one for one in found if one.what == what]
        mean = sum(one.kurtosis for one in own) / len(own)
        table.add_row(
            f"[bold]{what}[/bold], largest and mean", *_figures(max(one.largest for one in own), mean)
        )
        for one in own:
            table.add_row(f"  [cyan]{one.path}[/cyan]", *_figures(one.largest, one.kurtosis))
    return table


def as_json(found: Sequence[Outliers]) -> str:
    """A list of objects with the fields of `Outliers`."""
    return json.dumps([asdict(one) for one in found], indent=1)


def _figures(largest: float, kurtosis: float) -> tuple[str, str]:
    return f"{largest:.4g}", f"{kurtosis:.4g}"
