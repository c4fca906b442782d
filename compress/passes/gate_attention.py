"""Gated attention: let each head close, so that it need not make outliers to add nothing.

Bondarenko et al. 2023, "Quantizable Transformers", arXiv 2306.12929, in its form for fine-tuning: gates begin at one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.calming import Calmed, train_calm
from compress.report import Change

if TYPE_CHECKING:
    from torch import nn

    from compress.layers.gates import OutputGate
    from compress.model import Model
    from compress.passes.gate_sites import GateSite


class GateAttention(Calmed):
    """Multiply what each head of an attention gives by a trained gate, for fewer outliers."""

    use: Literal["gate_attention"] = "gate_attention"
    kind: Literal["linear", "mlp", "all"] = "linear"
    """What the gate of a head reads: its share of the features, by a linear map; the same, by a map with one hidden
    layer; all features, by a linear map."""
    opening: float = Field(default=0.25, gt=0, lt=1)
    """Where the gate's sigmoid begins. It counts as one, so a gate may rise to 1 / `opening`."""
    gate_rate: float = Field(default=10, gt=0)
    """The learning rate of gates, in those of the rest."""

    def check(self, model: Model) -> None:
        from compress.layers.gates import is_gated
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights do not train.",
                "Put `gate_attention` before `quantize` in the recipe.",
            )
        if is_gated(model.module):
            raise Unsuitable(
                "The model's attentions have gates already.", "Use one `gate_attention` for all of them."
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.gate_sites import gate_sites

        self.check(model)
        sites, skips = gate_sites(model, self.scope, apart=self.kind != "all")
        if not sites:
            return Result(model.module, (), tuple(skips))
        record = {"sites": [asdict(site) for site in sites]}
        gates = [self._install(model.module, site, 1 / self.opening) for site in sites]
        trained = self._train(model, context, gates)
        for gate, site in zip(gates, sites, strict=True):
            gate.fold(model.module.get_submodule(site.output))
        changes = (*map(self._change, sites), trained)
        return Result(model.module, changes, tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.gate_sites import GateSite

        for site in record["sites"]:
            self._install(module, GateSite(**site), 1.0)
        return module

    def _install(self, module: nn.Module, site: GateSite, scale: float) -> OutputGate:
        from compress.layers.gates import OutputGate, install_gate
        from compress.layers.linear import matrix

        weight = matrix(module.get_submodule(site.output))
        gate = OutputGate(self.kind, site.features, site.heads, scale).to(weight.device, weight.dtype)
        install_gate(module, site.holder, site.query, site.output, gate)
        return gate.eval()

    def _train(self, model: Model, context: Context, gates: list[OutputGate]) -> Change:
        import torch

        generator = torch.Generator().manual_seed(context.seed)
        for gate in gates:
            gate.reset(generator)
        own = {parameter for gate in gates for parameter in gate.parameters()}
        rates = {
            name: self.learning_rate * self.gate_rate
            for name, parameter in model.module.named_parameters()
            if parameter in own
        }
        with ExitStack() as apart:
            for gate in gates:
                apart.enter_context(gate.in_blocks())
            return train_calm(self, model, context, rates=rates)

    def _change(self, site: GateSite) -> Change:
        reads = "all features" if self.kind == "all" else "its share of the features"
        return Change(
            site.holder, "gated", f"{site.heads} heads", f"{site.heads} heads, each gated by {reads}"
        )
