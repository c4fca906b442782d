"""Pictures of token reduction: arrays in, a picture out. No model in sight.

Patches that became one token have one colour, the mean of their pixels, as in the figures of Token Merging (Bolya et
al. 2023, arXiv 2210.09461), and lines around them, light on dark colours and dark on light ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
"""A picture, (height, width, 3)."""

WIDE = 256
"""About so many pixels a panel is wide and high, where the grid allows it."""
LEAST = 8
"""A patch is drawn with so many pixels at least, in each direction."""
ACROSS = 4
"""So many panels stand in a row at most."""
MARGIN = 20
LINE = 22
"""The height of a line of a title."""
FONT = 16
PAPER, INK, PALE = (255, 255, 255), (28, 28, 34), (105, 105, 115)
"""The colours of what is behind the panels, of their titles, and of what stands below those."""
LOST, HATCH = (26, 26, 30), (62, 62, 70)
"""The colours of a lost patch, and of the stripes across it."""
STRIPE = 6
"""A stripe of a lost patch comes after so many pixels."""
CONTRAST = 0.5
"""How far a line's colour is from that of its patch, on the way to white or to black."""


@dataclass(frozen=True)
class Reduction:
    """What one reduction of tokens made of the patches of a picture.

    title   says which one
    note    stands below it
    owner   (rows, columns) the token that stands for each patch; the numbers only tell tokens apart
    lost    (rows, columns) which patches no token stands for
    """

    title: str
    note: str
    owner: NDArray[np.int64]
    lost: NDArray[np.bool_]

    @property
    def groups(self) -> NDArray[np.int64]:
        """`owner`, with the lost patches as one more group, of number -1."""
        return np.where(self.lost, -1, self.owner)


@dataclass(frozen=True)
class Panel:
    """A picture with a line above it, and another one in a paler colour."""

    title: str
    note: str
    pixels: Pixels


def token_picture(pixels: Pixels, reductions: Sequence[Reduction]) -> Image.Image:
    """The picture `pixels`, then one panel for each of `reductions`, of which there is at least one.

    Patches are of equal size; what lies beyond the last whole patch on the right and at the bottom belongs to none,
    and is left out.
    """
    rows, columns = reductions[0].owner.shape
    size = cell_size(pixels, (rows, columns))
    shown = Image.fromarray(_covered(pixels, (rows, columns)))
    shown = shown.resize((columns * size, rows * size), Image.Resampling.BOX)
    note = f"{pixels.shape[1]}x{pixels.shape[0]} pixels, {columns}x{rows} patches"
    panels = [Panel("input", note, np.asarray(shown))]
    panels += [Panel(one.title, one.note, cells(pixels, one, size)) for one in reductions]
    return sheet(panels)


def cell_size(pixels: Pixels, grid: tuple[int, int]) -> int:
    """The width and height of a drawn patch: a whole multiple of the patch's own where that fits into `WIDE`."""
    most = max(grid)
    patch = max(pixels.shape[0] // grid[0], pixels.shape[1] // grid[1])
    fitting = WIDE // most
    return max(LEAST, fitting // patch * patch or fitting)


def group_colours(pixels: Pixels, groups: NDArray[np.int64]) -> Pixels:
    """The mean colour of all pixels of a patch's group, (rows, columns, 3), for `groups` (rows, columns)."""
    rows, columns = groups.shape
    pixels = _covered(pixels, (rows, columns))
    patches = pixels.reshape(rows, pixels.shape[0] // rows, columns, pixels.shape[1] // columns, 3)
    _, numbers = np.unique(groups.ravel(), return_inverse=True)
    sums = np.zeros((numbers.max() + 1, 3))
    np.add.at(sums, numbers, patches.mean((1, 3)).reshape(-1, 3))
    means = sums / np.bincount(numbers)[:, None]
    return means[numbers].reshape(rows, columns, 3).round().astype(np.uint8)


def cells(pixels: Pixels, reduction: Reduction, size: int) -> Pixels:
    """The patches in the colours of their groups, `size` pixels each, with lines between different groups.

    A line is the first row or column of pixels of the patch below it, or to its right.
    """
    groups = _enlarged(reduction.groups, size)
    drawn = _enlarged(group_colours(pixels, reduction.groups), size)
    down, right = np.indices(groups.shape)
    lost = _enlarged(reduction.lost, size)
    drawn[lost] = LOST
    drawn[lost & ((down + right) % STRIPE == 0)] = HATCH
    lines = borders(groups)
    drawn[lines] = _contrasting(drawn[lines])
    return drawn


def borders(groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the number in `groups` (height, width) differs from the one above it, or from the one to its left."""
    found = np.zeros(groups.shape, dtype=np.bool_)
    found[1:] |= groups[1:] != groups[:-1]
    found[:, 1:] |= groups[:, 1:] != groups[:, :-1]
    return found


def sheet(panels: Sequence[Panel]) -> Image.Image:
    """Panels of equal size with their titles, in rows of equal length as far as it goes."""
    down = math.ceil(len(panels) / ACROSS)
    across = math.ceil(len(panels) / down)
    height, width, _ = panels[0].pixels.shape
    step = width + MARGIN, height + 2 * LINE + MARGIN
    paper = Image.new("RGB", (across * step[0] + MARGIN, down * step[1] + MARGIN), PAPER)
    font = ImageFont.load_default(FONT)
    pen = ImageDraw.Draw(paper)
    for number, panel in enumerate(panels):
        left, top = (MARGIN + number % across * step[0], MARGIN + number // across * step[1])
        pen.text((left, top), _shortened(panel.title, font, width), INK, font)
        pen.text((left, top + LINE), _shortened(panel.note, font, width), PALE, font)
        paper.paste(Image.fromarray(panel.pixels), (left, top + 2 * LINE))
    return paper


def _covered(pixels: Pixels, grid: tuple[int, int]) -> Pixels:
    """The part of a picture that whole patches cover."""
    height, width = (length // count * count for length, count in zip(pixels.shape[:2], grid, strict=True))
    return pixels[:height, :width]


def _enlarged(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Each of `values` (rows, columns, ...) as a square of `size` rows and columns."""
    return values.repeat(size, 0).repeat(size, 1)


def _contrasting(colours: Pixels) -> Pixels:
    """For each of `colours` (n, 3) one that stands out from it."""
    dark = colours @ np.array([0.299, 0.587, 0.114]) < 128
    towards = np.where(dark[:, None], 255.0, 0.0)
    return (colours + CONTRAST * (towards - colours)).round().astype(np.uint8)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or as much of its end as `width` pixels take: the paths of modules differ there."""
    if font.getlength(text) <= width:
        return text
    return next(
        short for at in range(1, len(text) + 1) if font.getlength(short := f"...{text[at:]}") <= width
    )
