"""Draw a table of families of rows: one line a family, in several panels.

The family of a row is its name up to the first comma. Every line begins at the table's baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.results import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"
LINEAR = 1.0
"""Up to this distance from zero a panel of points is linear, beyond it logarithmic, so that all lines are seen."""
TICKS = (-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Numbers that stand at the axis of such a panel, where they are inside."""


@dataclass(frozen=True)
class Panel:
    """One panel: the figure to the right (None: the speed at the first shape), and the figure downwards with its label.

    `logarithmic`: rows without a positive figure are left out.
    """

    across: str | None
    down: str
    label: str
    logarithmic: bool = False


def picture(table: Table, panels: Sequence[Panel]) -> Figure:
    """The panels, one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(panels) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    machine = table.machine
    figure.suptitle(f"{table.title}: {machine.cpu} ({', '.join(machine.flags)}), {table.threads} threads")
    drawn = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(drawn, panels, strict=True):
        _lines(axes, table, panel)
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _lines(axes: Any, table: Table, panel: Panel) -> None:
    """Draw all families into one panel, better upwards."""
    families = list(dict.fromkeys(_family(row) for row in table.rows))
    base = next(row for row in table.rows if row.name == table.baseline)
    _scale(axes, table, panel)
    for number, family in enumerate(families):
        own = [row for row in table.rows if _family(row) == family]
        points = [_point(table, row, panel) for row in ([base, *own] if len(own) > 1 else own)]
        shown = [point for point in points if point[1] > 0 or not panel.logarithmic]
        axes.plot(
            [across for across, _ in shown],
            [down for _, down in shown],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if len(own) > 1 else 9,
            zorder=2 if len(own) > 1 else 3,
            label=family,
        )


def _scale(axes: Any, table: Table, panel: Panel) -> None:
    """Scales, labels and a grid; downwards is more."""
    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.invert_yaxis()
    axes.set_ylabel(panel.label)
    axes.set_xlabel(panel.across or f"times as fast as {table.baseline}, {table.shapes[0]}")
    axes.grid(alpha=0.3)


def _point(table: Table, row: Row, panel: Panel) -> tuple[float, float]:
    across = row.figures[panel.across] if panel.across else row.speedup[table.shapes[0]].median
    return across, row.figures[panel.down]


def _family(row: Row) -> str:
    return row.name.partition(",")[0]
