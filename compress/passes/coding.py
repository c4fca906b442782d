"""What `factorize_sparse` begins with: for each linear map a dictionary, and sparse codes of its rows in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import Unsuitable
from compress.layers.coded import CodedLinear, LatentCodes, latent_linear
from compress.layers.linear import matrix
from compress.layers.quantized import swap
from compress.numerics.low_rank import allocate, decompose
from compress.numerics.sparse_coding import affordable, learn_dictionary, refitted_atoms, stored_bytes
from compress.passes.metric import Metric

SHARES = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Sizes of a dictionary that are tried, as shares of the largest: what it spans, or what the bytes buy."""
MULTIPLE = 8
"""Dictionaries have multiples of so many atoms: bits fill bytes, and kernels like them."""
SMALLEST = 4
"""The budget is spent by ranks in multiples of this: what low rank stores with it always has room for codes, too."""
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


def forms(weight: Tensor, keep: float, share: float | None = None) -> list[Form]:
    """The forms of `weight` (out, in) that take the share `keep` of its bytes, one a size of the dictionary; or the one
    whose size is `share` of what the dictionary spans."""
    rows, side, item = max(weight.shape), min(weight.shape), weight.element_size()
    wanted = [share * side] if share else [one * largest(weight, keep) for one in SHARES]
    sizes = dict.fromkeys(max(1, int(one) // MULTIPLE * MULTIPLE or int(one)) for one in wanted)
    counts = {size: affordable(rows, side, size, keep * weight.nbytes, item) for size in sizes}
    return [
        Form(size, count, stored_bytes(rows, side, size, count, item))
        for size, count in counts.items()
        if count
    ]


def best_share(weight: Tensor, keep: float, metric: Metric, seed: int) -> float:
    """The size of the dictionary with which `weight` (out, in) loses least at `keep`, as a share of the largest."""
    tried = [start(weight, form, metric, seed, TRIED_ROUNDS) for form in forms(weight, keep)]
    return min(tried, key=lambda one: one.lost).form.atoms / largest(weight, keep)


def largest(weight: Tensor, keep: float) -> float:
    """The size of the largest dictionary for `weight`: what it spans, or what the share `keep` of the bytes buys."""
    return min(*weight.shape, keep * max(weight.shape))


def budget(
    weights: Mapping[str, Tensor], metric: Callable[[str], Metric], relative: bool, keep: float
) -> dict[str, float]:
    """The shares of their bytes that `weights` (out, in) keep, by path, of one budget: what low rank would spend on
    each, where it lowers the error most. 1: stays as it is. `metric` gives that of a path, and errors count as a share
    of each weight's own square if `relative`. Raises `Unsuitable` if even the smallest ranks cost more."""
    offers = {
        path: decompose(weight, *metric(path)).offer(float(weight.numel()), relative)
        for path, weight in weights.items()
    }
    total = sum(one.dense for one in offers.values())
    try:
        ranks = allocate(list(offers.values()), keep * total, SMALLEST)
    except ValueError as error:
        raise Unsuitable(f"`keep: {keep}` cannot be reached: {error}.", "Keep more.") from error
    return {path: one.cost(rank) / one.dense for (path, one), rank in zip(offers.items(), ranks, strict=True)}


def two_sided(metric: Metric, weight: Tensor) -> Metric:
    """`metric` of `weight` (out, in), with the identity for a side that it has none of."""
    sides = zip(metric, reversed(weight.shape), strict=True)
    return Metric(*(torch.eye(size, dtype=torch.float64) if one is None else one for one, size in sides))


def start(weight: Tensor, form: Form, metric: Metric, seed: int, rounds: int = ROUNDS) -> Start:
    """Codes and dictionary of `weight` (out, in) in `form`, in a metric with both sides.

    Codes are found in the metric of the side that the dictionary spans. The dictionary is then refitted in both: the
    metric of the rows would tie the rows' codes to each other.
    """
    turned = len(weight) < weight.shape[1]
    rows = (weight.T if turned else weight).double()
    span, other = reversed(metric) if turned else metric
    assert span is not None
    assert other is not None
    generator = torch.Generator().manual_seed(seed)
    made = learn_dictionary((rows @ span).float(), form.atoms, form.count, generator, rounds)
    codes = made.codes.double()
    atoms = torch.linalg.solve_triangular(span, made.atoms.double(), upper=False, left=False)
    atoms = refitted_atoms(rows, codes, atoms, other @ other.T)
    lengths = atoms.norm(dim=1).clamp(min=1e-12)
    lost = _energy(rows - codes @ atoms, span, other) / max(_energy(rows, span, other), 1e-300)
    return Start(form, (codes * lengths).to(weight), (atoms / lengths[:, None]).to(weight), lost)


def coded(module: nn.Module, starts: Mapping[str, Start]) -> dict[str, CodedLinear]:
    """Put layers that train from `starts` in the place of the linear maps at their paths, in place."""
    layers = {path: module.get_submodule(path) for path in starts}
    new = {}
    for path, layer in layers.items():
        one, weight = starts[path], matrix(layer)
        codes, atoms, turned = one.codes.to(weight), one.atoms.to(weight), len(weight) < weight.shape[1]
        made = latent_linear(codes, one.form.count, atoms, getattr(layer, "bias", None), turned)
        new[path] = made.train(layer.training)
    swap(module, {layers[path]: one for path, one in new.items()})
    return new


def renamed(names: Sequence[str], layers: Mapping[str, CodedLinear]) -> list[str]:
    """The parameters called `names` before there were codes, as they are called now."""
    found = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path not in layers:
            found.append(name)
        elif leaf == "weight":
            found += [f"{path}.codes.latent", f"{path}.dictionary.weight"]
        else:
            found.append(f"{path}.{'dictionary' if layers[path].codes.turned else 'codes'}.{leaf}")
    return found


def freeze(layers: Iterable[CodedLinear]) -> None:
    """From now on the codes of `layers` keep their places."""
    for layer in layers:
        assert isinstance(layer.codes, LatentCodes)
        layer.codes.freeze()


def take_back(module: nn.Module, begun: Mapping[str, Tensor], layers: Iterable[CodedLinear]) -> None:
    """Give the parameters of `module` the values that they began with, and free the places of codes again."""
    with torch.no_grad():
        for name, values in begun.items():
            module.get_parameter(name).copy_(values)
    for layer in layers:
        assert isinstance(layer.codes, LatentCodes)
        layer.codes.kept = None


def settle(module: nn.Module, layers: Iterable[CodedLinear]) -> None:
    """Put packed layers in the place of `layers`, in place."""
    swap(module, {layer: layer.packed().train(layer.training) for layer in layers})


def _energy(rows: Tensor, across: Tensor, along: Tensor) -> float:
    """The square of `rows` in the metric of both roots."""
    return float((along.T @ rows @ across).square().sum())
