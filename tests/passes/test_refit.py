"""The sequential update of low-rank factors, on models of several kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.compare import forward
from compress.errors import DataError
from compress.layers.linear import matrix
from compress.layers.low_rank import LowRankLinear
from compress.passes.base import Context
from compress.passes.factorize import Factorize
from tests.zoo import build, fresh, varied


def factorized(name: str, update: bool, data: list[dict[str, Tensor]] | None = None, **settings) -> nn.Module:
    model = fresh(name)
    found = Factorize(**{"multiple": 1, "keep": 0.5, **settings}, update=update)
    return found.apply(model, Context(calibration=data or varied(model, 8))).module


def inputs(module: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What each factorized layer reads, (positions, in)."""
    seen: dict[str, list[Tensor]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LowRankLinear):
            rows = seen.setdefault(path, [])
            layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            module(**batch)
    return {path: torch.cat(rows).double() for path, rows in seen.items()}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[("llama", method) for method in ("svd", "asvd", "svd_llm", "fisher")],
        *[(name, "svd_llm") for name in ("bert", "gpt2", "t5", "vit")],
    ],
)
def test_the_update_never_loses_more_in_any_layer(name, method):
    """On the inputs that the compressed part before each layer gives; with biases, Conv1D and shared inputs."""
    settings = {"method": method, "ranks": "uniform"}
    before, after = factorized(name, False, **settings), factorized(name, True, **settings)
    lost = {False: 0.0, True: 0.0}
    for path, x in inputs(after, varied(build(name), 8)).items():
        dense, layers = matrix(build(name).module.get_submodule(path)).double(), {}
        for update, module in ((False, before), (True, after)):
            layer = module.get_submodule(path)
            layers[update] = float((x @ (dense - layer.weight.detach().double()).T).square().sum())
            lost[update] += layers[update]
        assert layers[True] <= layers[False] * (1 + 1e-4), path
        assert torch.equal(
            before.get_submodule(path).reduce.weight, after.get_submodule(path).reduce.weight
        ), path
    assert 0 < lost[True] < lost[False]


def test_biases_stay():
    module = factorized("gpt2", True, method="svd_llm")
    path = next(path for path, layer in module.named_modules() if isinstance(layer, LowRankLinear))
    assert torch.equal(module.get_submodule(path).bias, build("gpt2").module.get_submodule(path).bias)


def test_all_batches_count():
    """One large batch says what its parts say, and the last part alone something else."""
    parts = varied(build("llama"), 4)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    settings = {"method": "svd", "ranks": "uniform", "update": True}
    first, second = factorized("llama", data=parts, **settings), factorized("llama", data=[whole], **settings)
    last = factorized("llama", data=parts[-1:], **settings)
    one, other, third = (forward(module, whole)["logits"] for module in (first, second, last))
    assert (one - other).norm() < 0.01 * (one - third).norm()


def test_it_repeats():
    first, second = factorized("llama", True), factorized("llama", True)
    assert all(
        torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_weights_that_read_one_tensor_share_one_run_that_ends_there():
    model, calls = fresh("llama"), {"": 0, "lm_head": 0}
    weights = model.graph.weights  # the trace is a run, too

    def count(path: str) -> None:
        def seen(*_: object) -> None:
            calls[path] += 1

        model.module.get_submodule(path).register_forward_pre_hook(seen)

    count("")
    count("lm_head")
    data = varied(model, 3)
    result = Factorize(multiple=1, method="svd", ranks="uniform", update=True).apply(
        model, Context(calibration=data)
    )
    reads = {weight.reads for weight in weights if weight.path in result.record["ranks"]}
    assert len(reads) < len(result.record["ranks"])
    assert calls == {"": 3 * len(reads), "lm_head": 0}


def test_without_data():
    with pytest.raises(DataError, match="factorize: update needs calibration data, and there is none"):
        Factorize(multiple=1, method="svd", update=True).apply(fresh("bert"), Context())
