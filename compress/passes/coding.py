"""What `factorize_sparse` begins with: for each linear map a dictionary, and sparse codes of its rows in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.layers.coded import LatentCoded
from compress.layers.linear import matrix
from compress.layers.quantized import swap
from compress.numerics.low_rank import root
from compress.numerics.sparse_coding import affordable, learn_dictionary, refitted_atoms, stored_bytes
from compress.passes.metric import Metric

SHARES = (1 / 4, 1 / 3, 5 / 12, 1 / 2, 7 / 12, 2 / 3, 3 / 4, 1)
"""Sizes of a dictionary that are tried, as shares of what it spans."""
MULTIPLE = 8
"""Dictionaries have multiples of so many atoms: bits fill bytes, and kernels like them."""
DAMPING = 0.01
"""Of both metrics, as a share of the mean diagonal: what the calibration data does not reach counts a little."""
TRIED_ROUNDS, ROUNDS = 2, 4


@dataclass(frozen=True)
class Form:
    """A dictionary of `atoms`, `count` non-zeros a code, and the bytes of both."""

    atoms: int
    count: int
    bytes: int


@dataclass(frozen=True)
class Start:
    """Codes (rows, atoms) and dictionary (atoms, side) of a map, and the share of the squared error of leaving the map
    out."""

    form: Form
    codes: Tensor
    atoms: Tensor
    lost: float


def forms(weight: Tensor, keep: float, shares: Sequence[float] = SHARES) -> list[Form]:
    """The forms of `weight` (out, in) that take the share `keep` of its bytes, one a size of the dictionary."""
    rows, side, item = max(weight.shape), min(weight.shape), weight.element_size()
    found = {}
    for share in shares:
        size = max(
            1, round(share * side / MULTIPLE) * MULTIPLE if side >= 2 * MULTIPLE else round(share * side)
        )
        count = affordable(rows, side, size, keep * weight.numel() * item, item)
        if count:
            found[size] = Form(size, count, stored_bytes(rows, side, size, count, item))
    return list(found.values())


def started(
    layers: Mapping[str, nn.Module],
    offered: Mapping[str, Sequence[Form]],
    metric: Callable[[str], Metric],
    seed: int,
    said: Callable[[Sequence[str]], Sequence[str]],
) -> dict[str, Start]:
    """A start for each of `layers` by path. The form is the best of those `offered`, tried on one map of each shape."""
    best: dict[tuple[int, ...], Form] = {}
    starts = {}
    for path in said(list(layers)):
        weight, known = matrix(layers[path]).cpu(), metric(path)
        shape = tuple(weight.shape)
        if shape not in best:
            tried = [start(weight, form, known, seed, TRIED_ROUNDS) for form in offered[path]]
            best[shape] = min(tried, key=lambda one: one.lost).form
        starts[path] = start(weight, best[shape], known, seed, ROUNDS)
    return starts


def start(weight: Tensor, form: Form, metric: Metric, seed: int, rounds: int) -> Start:
    """Codes and dictionary of `weight` (out, in) in `form`.

    Codes are found in the metric of the side that the dictionary spans. The dictionary is then refitted in both: the
    metric of the rows would tie the rows' codes to each other.
    """
    turned = len(weight) < weight.shape[1]
    rows = (weight.T if turned else weight).double()
    across, along = (_damped(one, size) for one, size in zip(metric, reversed(weight.shape), strict=True))
    if turned:
        across, along = along, across
    span = root(across)
    generator = torch.Generator().manual_seed(seed)
    made = learn_dictionary((rows @ span).float(), form.atoms, form.count, generator, rounds)
    codes = made.codes.double()
    atoms = torch.linalg.solve_triangular(span, made.atoms.double(), upper=False, left=False)
    atoms = refitted_atoms(rows, codes, atoms, along)
    lengths = atoms.norm(dim=1).clamp(min=1e-12)
    lost = _energy(rows - codes @ atoms, across, along) / max(_energy(rows, across, along), 1e-300)
    return Start(form, (codes * lengths).to(weight), (atoms / lengths[:, None]).to(weight), lost)


def coded(module: nn.Module, starts: Mapping[str, Start]) -> dict[str, LatentCoded]:
    """Put layers that train from `starts` in the place of the linear maps at their paths, in place."""
    layers = {path: module.get_submodule(path) for path in starts}
    new = {}
    for path, layer in layers.items():
        one, weight = starts[path], matrix(layer)
        codes, atoms, turned = one.codes.to(weight), one.atoms.to(weight), len(weight) < weight.shape[1]
        made = LatentCoded(codes, atoms, getattr(layer, "bias", None), turned, one.form.count)
        new[path] = made.train(layer.training)
    swap(module, {layers[path]: one for path, one in new.items()})
    return new


def settle(module: nn.Module, layers: Mapping[str, LatentCoded]) -> None:
    """Put packed layers in the place of `layers`, in place."""
    swap(module, {layer: layer.packed().train(layer.training) for layer in layers.values()})


def _damped(moment_root: Tensor | None, size: int) -> Tensor:
    """The second moment with the lower triangular root `moment_root`, damped; the identity if None. Float64."""
    if moment_root is None:
        return torch.eye(size, dtype=torch.float64)
    moment = moment_root @ moment_root.T
    moment.diagonal().add_(DAMPING * float(moment.diagonal().mean()))
    return moment


def _energy(rows: Tensor, across: Tensor, along: Tensor) -> float:
    """The square of `rows` in both metrics."""
    return float(((along @ rows) * (rows @ across)).sum())
