"""A measured table, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import Machine
from compress.timing import Spread


@dataclass(frozen=True)
class Row:
    """One variant: bytes on disk, figures by name, and by shape the seconds of a call and the speed."""

    name: str
    bytes: int
    figures: dict[str, float]
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]


@dataclass(frozen=True)
class Upwards:
    """What the plot shows upwards: how far a figure is from `ideal`. `said` is the figure in brackets at each point."""

    figure: str
    ideal: float
    label: str
    said: str
    logarithmic: bool = False

    def distance(self, row: Row) -> float:
        """How far the figure of `row` is from the ideal."""
        return abs(row.figures[self.figure] - self.ideal)


@dataclass(frozen=True)
class Table:
    """What was measured, on what, and how.

    `baseline` names the row that speeds are against, `figures` the format of each figure, in their order.
    """

    title: str
    machine: Machine
    rounds: int
    calls: int
    threads: int
    baseline: str
    shapes: tuple[str, ...]
    figures: dict[str, str]
    upwards: Upwards
    rows: tuple[Row, ...]


def markdown(table: Table) -> str:
    """The table, under a paragraph that says how it was measured."""
    timed = [f"{shape}: {unit}" for shape in table.shapes for unit in ("ms", "speed")]
    head = ["variant", "MB", *table.figures, *timed]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    lines += [_line(_cells(row, table)) for row in table.rows]
    return "\n".join([f"## {table.title}", "", _how(table), "", *lines, ""])


def _how(table: Table) -> str:
    machine = table.machine
    versions = ", ".join(f"{package} {version}" for package, version in machine.versions.items())
    return (
        f"{machine.cpu}, {machine.cpus} CPUs ({', '.join(machine.flags)}), {machine.date}. "
        f"{table.threads} threads; {table.rounds} alternating rounds of {table.calls} calls, one process "
        f"each; medians. Speed is against {table.baseline}, taken round by round, with its lowest "
        f"and highest value over the rounds. {versions}."
    )


def _cells(row: Row, table: Table) -> list[str]:
    figures = [format(row.figures[name], form) for name, form in table.figures.items()]
    cells = [row.name, f"{row.bytes / 1e6:.1f}", *figures]
    for shape in table.shapes:
        speed = row.speedup[shape]
        cells += [
            f"{1e3 * row.seconds[shape].median:.1f}",
            f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})",
        ]
    return cells


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
