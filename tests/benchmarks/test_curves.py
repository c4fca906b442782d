"""The picture with one line a family of rows."""

from typing import Any

import pytest

from benchmarks.curves import Panel, picture
from benchmarks.machine import Machine
from benchmarks.results import Row, Table, Upwards
from compress.timing import Spread

PANELS = (
    Panel("left", "lost", "points lost"),
    Panel("left", "distance", "distance", logarithmic=True),
    Panel(None, "lost", "points lost"),
)


def row(name: str, left: float, lost: float, distance: float) -> Row:
    speed = Spread(100 / left, 0.9, 3.0)
    figures = {"left": left, "lost": lost, "distance": distance}
    return Row(name, 1, figures, {"one": Spread(1, 1, 1)}, {"one": speed})


@pytest.fixture
def panels() -> list[Any]:
    pytest.importorskip("matplotlib")
    rows = (
        row("base", 100, 0, 0),
        row("cut, 20 %", 80, -0.2, 0.01),
        row("cut, 50 %", 50, 12, 0.3),
        row("small", 100, 0.5, 0.02),
    )
    table = Table(
        title="A model",
        machine=Machine("A CPU", ("avx2",), 4, "2030-01-02 03:04 UTC", {}),
        rounds=5,
        calls=10,
        threads=2,
        baseline="base",
        shapes=("one",),
        figures={"left": ".0f", "lost": ".1f", "distance": ".2f"},
        upwards=Upwards("lost", 0.0, "points lost", "lost"),
        rows=rows,
    )
    figure = picture(table, PANELS)
    figure.canvas.draw()
    return figure.axes


def points(panel: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in panel.lines}


def test_a_line_a_family_that_begins_at_the_baseline(panels: list[Any]) -> None:
    assert points(panels[0]) == {
        "base": [[100, 0]],
        "cut": [[100, 0], [80, -0.2], [50, 12]],
        "small": [[100, 0.5]],
    }
    assert points(panels[2])["cut"] == [[1, 0], [1.25, -0.2], [2, 12]]
    assert panels[2].get_xlabel() == "times as fast as base, one"


def test_a_logarithm_leaves_out_what_has_none(panels: list[Any]) -> None:
    assert points(panels[1]) == {"base": [], "cut": [[80, 0.01], [50, 0.3]], "small": [[100, 0.02]]}
    assert panels[1].get_yscale() == "log"


def test_better_is_upwards_and_the_numbers_are_plain(panels: list[Any]) -> None:
    for panel in panels:
        low, high = panel.get_ylim()
        assert low > high
    assert {"0", "0.5", "1", "2", "5", "10"} <= {one.get_text() for one in panels[0].get_yticklabels()}
