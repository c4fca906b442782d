"""Which norms another module can stand in for: modules that norm the last axis of one tensor, and do nothing else."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.model import Model
from compress.numerics.norm_form import divided
from compress.outputs import forward
from compress.report import Skip
from compress.scope import Scope

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments, keyword arguments and output of one run of a module."""

TOLERANCE = 1e-4


def replaceable_norms(model: Model, scope: Scope) -> tuple[dict[str, int], list[Skip]]:
    """The features of each layer and RMS norm in scope that can be replaced, by path, and why the others cannot be."""
    norms = [one for one in model.graph.norms if one.kind != "batch" and one.path in scope]
    calls = _calls(model, [one.path for one in norms])
    places = Counter(part for _, part in model.module.named_modules(remove_duplicate=False))
    found: dict[str, int] = {}
    skips = []
    for one in norms:
        norm = model.module.get_submodule(one.path)
        why = "its module stands in several places" if places[norm] > 1 else _refusal(norm, calls[one.path])
        if one.kind == "group":
            why = "it is a group norm"
        if why:
            skips.append(Skip(one.path, why))
        else:
            found[one.path] = calls[one.path][0][2].shape[-1]
    return found, skips


def _calls(model: Model, paths: list[str]) -> dict[str, list[Call]]:
    """All runs of the modules at `paths` on the example."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}

    def see(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[path].append((args, kwargs, output))

    with ExitStack() as hooks:
        for path in paths:
            hook = model.module.get_submodule(path).register_forward_hook(
                partial(see, path), with_kwargs=True
            )
            hooks.callback(hook.remove)
        forward(model.module, model.example)
    return calls


def _refusal(norm: nn.Module, calls: list[Call]) -> str:
    """Why nothing else can stand in for `norm`, which ran so, or ""."""
    if any(True for _ in norm.children()):
        return "its module does more than this"
    if len(calls) != 1:
        return f"it runs {len(calls)} times"
    ((args, kwargs, output),) = calls
    tensors = [value for value in (*args, *kwargs.values(), output) if isinstance(value, Tensor)]
    if len(args) != 1 or kwargs or len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
        return "its module takes or gives more than one tensor"
    if not _alike_everywhere(norm, *tensors):
        return "it does not norm the last axis alone"
    scales = output.new_full(output.shape[-1:], 2.0)
    if any(True for _ in norm.parameters()) and divided(norm, scales) is None:
        return "its parameters are no weight and bias of its features"
    return ""


def _alike_everywhere(norm: nn.Module, given: Tensor, output: Tensor) -> bool:
    """Whether `norm` treats each position of the last axis alone, and all alike: shuffled ones give shuffled ones."""
    rows, wanted = given.flatten(0, -2), output.flatten(0, -2)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    with torch.no_grad():
        found = norm(rows[order].reshape(given.shape)).reshape(wanted.shape)
    return bool(
        torch.allclose(found, wanted[order], rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()))
    )
