"""A measured table, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import Machine
from compress.timing import Spread


@dataclass(frozen=True)
class Row:
    """One variant: bytes on disk, quality, and by shape the seconds of a call and the speed."""

    name: str
    bytes: int
    spearman: float
    cosine: float
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]


@dataclass(frozen=True)
class Table:
    """What was measured, on what, and how. `baseline` names the row that speeds are against."""

    title: str
    machine: Machine
    rounds: int
    calls: int
    threads: int
    baseline: str
    shapes: tuple[str, ...]
    rows: tuple[Row, ...]


def markdown(table: Table) -> str:
    """The table, under a paragraph that says how it was measured."""
    timed = [f"{shape}: {unit}" for shape in table.shapes for unit in ("ms", "speed")]
    head = ["variant", "MB", "STS-B Spearman x 100", "lowest cosine", *timed]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    lines += [_line(_cells(row, table.shapes)) for row in table.rows]
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


def _cells(row: Row, shapes: Sequence[str]) -> list[str]:
    cells = [row.name, f"{row.bytes / 1e6:.1f}", f"{row.spearman:.2f}", f"{row.cosine:.4f}"]
    for shape in shapes:
        speed = row.speedup[shape]
        cells += [
            f"{1e3 * row.seconds[shape].median:.1f}",
            f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})",
        ]
    return cells


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
