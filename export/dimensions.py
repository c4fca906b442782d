"""Names for the dynamic sizes of a graph, so that inputs, outputs and shape profiles speak of the same thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def name_dimensions(graph: ir.Graph) -> dict[str, str]:
    """Rename the tracer's symbols (`s18`) in every shape of `graph`, in place. Returns old to new names.

    - axis 0 of an input is `batch`. Two symbols that both reach an output are different batches (texts and
      images): the second is `<input>_batch`. One that reaches no output only lost its link to the others (a
      mask).
    - axis 1 of an integer matrix is `sequence`; the length of a key-value cache is `past`.
    - the last two axes of a float input of rank 4 are `height` and `width`.
    - anything else, and any second symbol for a name that is taken, is `<input>_<name or axis>`.
    """
    reaching = {symbol for value in graph.outputs for symbol in _symbols(value)}
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = str(dim)
            if not symbol.isdigit() and symbol not in names:
                names[symbol] = _name(value, axis, names, symbol in reaching)
    for value in _values(graph):
        _rename(value, names)
    return names


def _name(value: ir.Value, axis: int, taken: dict[str, str], reaches_output: bool) -> str:
    base = _base(value, axis)
    clean = re.sub(r"\W", "_", str(value.name))
    if base not in taken.values() or (base == "batch" and not reaches_output):
        return base
    return f"{clean}_{base}" if base.isalpha() else base


def _base(value: ir.Value, axis: int) -> str:
    rank = len(value.shape or ())
    floating = value.dtype is not None and value.dtype.is_floating_point()
    if axis == 0:
        return "batch"
    if is_cache(value):
        return "past"
    if axis == 1 and rank == 2 and not floating:
        return "sequence"
    if rank == 4 and floating and axis >= 2:
        return ("height", "width")[axis - 2]
    return re.sub(r"\W", "_", f"{value.name}_{axis}")


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input is a part of the state that the graph hands on: the exporter marks it with `input.`."""
    return str(value.name).startswith("input.")


def _symbols(value: ir.Value) -> set[str]:
    return {symbol for dim in value.shape or () for symbol in _SYMBOL.findall(str(dim))}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _rename(value: ir.Value, names: dict[str, str]) -> None:
    import onnx_ir as ir

    if value.shape is not None:
        value.shape = ir.Shape(_renamed(str(dim), names) for dim in value.shape)


def _renamed(dim: str, names: dict[str, str]) -> int | str:
    # The tracer writes some fixed sizes as symbols: "2".
    return int(dim) if dim.isdigit() else _SYMBOL.sub(lambda found: names.get(found[0], found[0]), dim)
