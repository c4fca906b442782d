"""The Markdown and the picture of a measured table."""

from pathlib import Path

import pytest

from benchmarks.machine import Machine
from benchmarks.plot import draw
from benchmarks.results import Row, Table, Upwards, markdown
from compress.timing import Spread


def row(name: str, cosine: float, speed: float) -> Row:
    return Row(
        name=name,
        bytes=23_456_789,
        figures={"Spearman": 86.716, "cosine": cosine},
        seconds={"1 x 128": Spread(0.0152 / speed, 0.01, 0.02)},
        speedup={"1 x 128": Spread(speed, 0.9 * speed, 1.1 * speed)},
    )


@pytest.fixture(params=[True, False])
def table(request: pytest.FixtureRequest) -> Table:
    return Table(
        title="A model",
        machine=Machine(
            "A CPU", ("avx2", "avx512_vnni"), 4, "2030-01-02 03:04 UTC", {"onnxruntime": "1.2.3"}
        ),
        rounds=5,
        calls=10,
        threads=2,
        baseline="float32",
        shapes=("1 x 128",),
        figures={"Spearman": ".2f", "cosine": ".4f"},
        upwards=Upwards("cosine", 1.0, "1 - cosine", "Spearman", logarithmic=request.param),
        rows=(row("float32", 1.0, 1.0), row("int8", 0.99123, 2.5)),
    )


def test_the_markdown_says_how_it_was_measured_and_gives_every_figure(table: Table) -> None:
    assert markdown(table) == (
        "## A model\n\n"
        "A CPU, 4 CPUs (avx2, avx512_vnni), 2030-01-02 03:04 UTC. "
        "2 threads; 5 alternating rounds of 10 calls, one process each; medians. "
        "Speed is against float32, taken round by round, with its lowest and highest value over the rounds. "
        "onnxruntime 1.2.3.\n\n"
        "| variant | MB | Spearman | cosine | 1 x 128: ms | 1 x 128: speed |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| float32 | 23.5 | 86.72 | 1.0000 | 15.2 | 1.00 (0.90 to 1.10) |\n"
        "| int8 | 23.5 | 86.72 | 0.9912 | 6.1 | 2.50 (2.25 to 2.75) |\n"
    )


def test_the_picture_is_written_and_not_blank(table: Table, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    draw(table, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1320, 528)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
