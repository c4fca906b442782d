"""Draw a table: quality against speed, one panel a shape, every point labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row, Table

LEAST = 1e-6
"""Distances below this, which float32 variants have by rounding alone, are drawn here."""

PLACES = sorted(
    ((across, up) for across in (12, -12, 50, -50, 120, -120) for up in range(-96, 97, 12)),
    key=lambda place: abs(place[0]) + abs(place[1]),
)
"""Where a label may stand, as offsets from its point in points of print, nearest first."""


def draw(table: Table, file: Path) -> None:
    """Write the plot as a picture: to the right goes the speed, upwards what the table says, best on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4 * len(table.shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(table.shapes), 1, squeeze=False)[:, 0]
    machine = table.machine
    figure.suptitle(f"{table.title}: {machine.cpu} ({', '.join(machine.flags)}), {table.threads} threads")
    figure.supylabel(f"{table.upwards.label} (better upwards)")
    for panel, shape in zip(panels, table.shapes, strict=True):
        _points(panel, table, shape)
    figure.canvas.draw()
    for panel, shape in zip(panels, table.shapes, strict=True):
        _labels(panel, table, shape)
    figure.savefig(file, dpi=120)


def _points(panel: Any, table: Table, shape: str) -> None:
    worst = max(map(table.upwards.distance, table.rows))
    if table.upwards.logarithmic:
        panel.set_yscale("log")
        panel.set_ylim(4 * worst, LEAST / 4)
    else:
        panel.set_ylim(1.25 * worst, -0.25 * worst)
    panel.set_xlim(0, 1.15 * max(row.speedup[shape].high for row in table.rows))
    panel.set_title(f"{shape} tokens")
    panel.set_xlabel(f"times as fast as {table.baseline} (in brackets: {table.upwards.said})")
    panel.grid(alpha=0.3)
    for row in table.rows:
        speed = row.speedup[shape]
        low_high = [[speed.median - speed.low], [speed.high - speed.median]]
        point = _point(table, row, shape)
        panel.errorbar(*point, xerr=low_high, fmt="o", capsize=3, color=_colour(row, table.rows))


def _colour(row: Row, rows: Sequence[Row]) -> str:
    """One colour for all rows of a family: those whose names begin with the same word."""
    families = list(dict.fromkeys(other.name.split()[0] for other in rows))
    return f"C{families.index(row.name.split()[0])}"


def _point(table: Table, row: Row, shape: str) -> tuple[float, float]:
    distance = table.upwards.distance(row)
    return row.speedup[shape].median, max(distance, LEAST) if table.upwards.logarithmic else distance


def _labels(panel: Any, table: Table, shape: str) -> None:
    """Put each name near its point, at the nearest place where it covers no bar and no other name."""
    said = table.upwards.said
    taken = [_bar(panel, table, row, shape) for row in table.rows]
    for row in table.rows:
        words = f"{row.name} ({row.figures[said]:{table.figures[said]}})"
        taken.append(_label(panel, words, _point(table, row, shape), _colour(row, table.rows), taken))


def _bar(panel: Any, table: Table, row: Row, shape: str) -> Any:
    """The box of a row's error bar, in pixels."""
    from matplotlib.transforms import Bbox

    height = _point(table, row, shape)[1]
    ends = [(row.speedup[shape].low, height), (row.speedup[shape].high, height)]
    (left, y), (right, _) = panel.transData.transform(ends)
    return Bbox.from_extents(left - 8, y - 8, right + 8, y + 8)


def _label(panel: Any, words: str, point: tuple[float, float], colour: str, taken: Sequence[Any]) -> Any:
    """Write `words` near `point` and give the box that they fill, in pixels."""
    text = panel.text(0, 0, words, fontsize=9)
    size = text.get_window_extent()
    text.remove()
    boxes = [_box(panel, size, point, place) for place in PLACES]
    free = (number for number, box in enumerate(boxes) if _fits(box, panel.bbox, taken))
    best = next(free, 0)
    across = PLACES[best][0]
    panel.annotate(
        words,
        point,
        PLACES[best],
        textcoords="offset points",
        ha="left" if across > 0 else "right",
        va="center",
        fontsize=9,
        color=colour,
        arrowprops={"arrowstyle": "-", "alpha": 0.4},
    ).set_in_layout(False)
    return boxes[best]


def _box(panel: Any, size: Any, point: tuple[float, float], place: tuple[int, int]) -> Any:
    """The box of a text of `size` at `place` beside `point`, in pixels."""
    from matplotlib.transforms import Bbox

    pixels = panel.figure.dpi / 72
    x, y = panel.transData.transform(point) + [pixels * offset for offset in place]
    left = x if place[0] > 0 else x - size.width
    return Bbox.from_bounds(left, y - size.height / 2, size.width, size.height)


def _fits(box: Any, panel: Any, taken: Sequence[Any]) -> bool:
    inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
    return inside and not any(box.overlaps(other) for other in taken)
