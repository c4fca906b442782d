"""`python -m benchmarks.gpu_sparse`: what zeros in weights gain on an NVIDIA GPU, one linear map at a time, in float16.

Random weights of each shape, at a count of rows (tokens), all at `--keep` of the bytes but the first two:

- `dense`: the map as it is; `2:4`: with two of four inputs zero, in torch's semi-structured form;
- `low rank`: two products through as few features as the bytes allow;
- `codes`: a dictionary, and codes with half of their places zero, as a dense product;
- `codes, 2:4`: the same, with two of four places zero, in torch's semi-structured form.

Each as one CUDA graph; variants take turns. Every semi-structured product is compared with the dense one first. Writes
JSON with all rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from benchmarks.cuda import captured, lines, rounds_of

SHAPES = ((384, 1536), (1024, 4096), (4096, 4096), (4096, 14336))
"""Inputs and outputs."""
MULTIPLE = 64
"""Of the counts of features and atoms."""
CODE_BYTES = 2 + 2 / 8
"""Of a code in float16 with its share of the places: two bits a code that is kept, two of four."""


def calls(inputs: int, outputs: int, rows: int, keep: float) -> dict[str, Callable[[], Tensor]]:
    """What is timed at one shape. Raises `AssertionError` where a semi-structured product is not the dense one."""
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
    budget = keep * 2 * inputs * outputs
    rank = _multiple(budget / (2 * (inputs + outputs)))
    atoms = _multiple(budget / (2 * inputs + CODE_BYTES * outputs / 2))
    whole, codes = two_of_four(outputs, inputs), two_of_four(outputs, atoms)
    down, up, dictionary = _random(rank, inputs), _random(outputs, rank), _random(atoms, inputs)
    packed, packed_codes = map(to_sparse_semi_structured, (whole, codes))
    found = {
        "dense": partial(linear, x, whole),
        "2:4": partial(linear, x, packed),
        "low rank": partial(_two, x, down, up),
        "codes": partial(_two, x, dictionary, codes),
        "codes, 2:4": partial(_two, x, dictionary, packed_codes),
    }
    for name, plain in (("2:4", "dense"), ("codes, 2:4", "codes")):
        torch.testing.assert_close(found[name](), found[plain](), rtol=1e-2, atol=1e-1)
    return found


def two_of_four(rows: int, columns: int) -> Tensor:
    """A random matrix in which the smaller two of each four numbers of a row are zero."""
    groups = _random(rows, columns).view(rows, -1, 4)
    mask = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2).indices, 1)
    return (groups * mask).view(rows, columns)


def _two(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(linear(x, first), second)


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.float16) / columns**0.5


def _multiple(count: float) -> int:
    return max(round(count / MULTIPLE), 1) * MULTIPLE


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_sparse",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu_sparse.json"))
    arguments = parser.parse_args()
    found: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.no_grad():
        for inputs, outputs in SHAPES:
            for rows in arguments.rows:
                name = f"{inputs} to {outputs}, {rows} rows"
                ready = {
                    variant: captured(call)
                    for variant, call in calls(inputs, outputs, rows, arguments.keep).items()
                }
                found[name] = times = rounds_of(ready, arguments.rounds)
                print(f"\n{found['device']}, {name}: milliseconds, times as fast", *lines(times), sep="\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
