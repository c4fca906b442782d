"""Packed pictures with their classes, and how a model takes them.

A file is an `.npz` with the arrays `data` (all JPEG files, end to end), `offsets` (where each begins, and the end of
the last) and `labels`. Beside a model's weights lies `training.json` with the `mean` and `std` of its channels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def batches(file: Path, model: Path, size: int, count: int | None = None) -> Iterator[Tensor]:
    """The first `count` pictures of `file` (None: all) in batches of `size`, as the model in the folder `model` takes
    them.
    """
    import torch

    packed = _packed(file)
    pictures = [packed["data"][start:end] for start, end in pairwise(packed["offsets"])][:count]
    for start in range(0, len(pictures), size):
        decoded = np.stack([_decoded(one) for one in pictures[start : start + size]])
        yield prepared(torch.from_numpy(decoded), model)


def pixels(file: Path) -> Tensor:
    """All pictures of `file`, which are of one size, as bytes (pictures, height, width, 3)."""
    import torch

    packed = _packed(file)
    decoded = [_decoded(packed["data"][start:end]) for start, end in pairwise(packed["offsets"])]
    return torch.from_numpy(np.stack(decoded))


def classes(file: Path) -> Tensor:
    """The class of each picture of `file`."""
    import torch

    return torch.from_numpy(_packed(file)["labels"].astype(np.int64))


def prepared(pixels: Tensor, model: Path) -> Tensor:
    """Bytes (batch, height, width, 3), scaled to the size that the model was trained on, and normalised as there."""
    import torch
    from torch.nn.functional import interpolate

    side = _read(model / "config.json")["image_size"]
    trained = _read(model / "training.json")
    mean, std = (torch.tensor(trained[name], device=pixels.device)[:, None, None] for name in ("mean", "std"))
    values = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
    return (interpolate(values, size=side, mode="bilinear") - mean) / std


def _packed(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise DataError(f"The pictures are not there: {file} does not exist.", "Correct `--data`.")
    with np.load(file) as arrays:
        return dict(arrays)


def _decoded(jpeg: np.ndarray) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg.tobytes())) as picture:
        return np.asarray(picture.convert("RGB"))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(
            f"Nothing says how the model's pictures are prepared: there is no {file}.",
            "Write `mean` and `std` of the three channels, scaled to 0..1, into training.json in the model's folder.",
        )
    return json.loads(file.read_text(encoding="utf-8"))
