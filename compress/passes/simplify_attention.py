"""Linear attention for vision models: softmax gives way to ReLU and a depthwise convolution, while a teacher corrects.

After the simplified linear attention of SLAB (Guo et al. 2024, arXiv 2405.11582); see
`compress.layers.linear_attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.taught import Lesson, Taught, lessons, require_fall, trainable, trained
from compress.report import Change

if TYPE_CHECKING:
    from torch import nn

    from compress.layers.linear_attention import Grid, LinearAttention
    from compress.model import Model
    from compress.passes.linear_sites import Site


class SimplifyAttention(Taught):
    """Replace softmax attention over the patches of a picture by linear attention, and train the model with it."""

    use: Literal["simplify_attention"] = "simplify_attention"
    steps: int = Field(default=1000, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The largest learning rate."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """The numbers of the blocks, from 0 on, whose attention becomes linear; by default all."""
    decay: float = Field(default=0.6, ge=0, le=1)
    """The share of the steps in which softmax gives way; in the rest there is only the linear attention."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized
        from compress.layers.tokens import is_reduced

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights cannot learn another attention.",
                "Put `simplify_attention` before `quantize` in the recipe.",
            )
        if is_reduced(model.module):
            raise Unsuitable(
                "The model's tokens are reduced, and those that are left lie on no grid.",
                "Use one of `merge_tokens` and `simplify_attention`.",
            )
        if not model.graph.attentions:
            raise Unsuitable(
                "The model has no softmax attention.", "Leave `simplify_attention` out for this model."
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.blocks import attends, chosen_stack
        from compress.passes.linear_sites import WHAT, find_grid, find_sites

        self.check(model)
        stack = chosen_stack(model, self.scope, WHAT, attends(model))
        sites, skips = find_sites(model, stack, self.layers)
        if not sites:
            return Result(model.module, (), tuple(skips))
        grid = find_grid(model, stack)
        names = trainable(model, self.scope)
        with lessons(self, model, context) as lesson:
            layers = install(model.module, sites, grid)
            own = [f"{site.path}.linear_attention.{name}" for site in sites for name in OWN]
            names = lesson.reached(model.module, names + own)
            before, after = self._train(model.module, layers, names, lesson)
        require_fall(self.use, before, after)
        changes = [_change(site, grid) for site in sites]
        changes.append(trained(self, model.module, names, lesson.kind, before, after))
        record = {"sites": [asdict(site) for site in sites], "grid": asdict(grid)}
        return Result(model.module, tuple(changes), tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.linear_attention import Grid
        from compress.passes.linear_sites import Site

        if record:
            install(module, [Site(**site) for site in record["sites"]], Grid(**record["grid"]))
        return module

    def _train(
        self, module: nn.Module, layers: Sequence[LinearAttention], names: Sequence[str], lesson: Lesson
    ) -> tuple[float, float]:
        """Train while softmax gives way; the losses without softmax before and after."""
        before = lesson.mean_loss(module)
        lesson.learn(module, names, lambda step: set_blend(layers, self.blend(step)))
        set_blend(layers, 0.0)
        return before, lesson.mean_loss(module)

    def blend(self, step: int) -> float:
        """The share of softmax attention in the step number `step`: 1 in the first, 0 after the share `decay`."""
        return max(0.0, 1 - step / (self.decay * self.steps)) if self.decay else 0.0


OWN = ("positions", "local.weight", "local.bias")
"""The parameters of a linear attention."""


def install(module: nn.Module, sites: Iterable[Site], grid: Grid) -> list[LinearAttention]:
    """Give the attentions of `module` at `sites` linear ones to compute by, in place, with no softmax blended in."""
    from compress.layers.attention import use_attention
    from compress.layers.linear_attention import LinearAttention

    layers = []
    for site in sites:
        caller = module.get_submodule(site.path)
        near = next(caller.parameters())
        layer = LinearAttention(grid, site.heads, site.size, site.value_size)
        caller.linear_attention = layer.to(near.device, near.dtype).eval()
        layers.append(layer)
    use_attention(module)
    return layers


def set_blend(layers: Iterable[LinearAttention], blend: float) -> None:
    """Set the share of softmax attention in each of `layers`."""
    for layer in layers:
        layer.blend = blend


def _change(site: Site, grid: Grid) -> Change:
    from compress.numerics.linear_attention import cheaper

    tokens = f"{grid.count} tokens"
    first = {"state": "keys by values first", "pairs": "queries by keys first"}
    order = first[cheaper(grid.count, grid.count, site.size, site.value_size)]
    after = f"linear, {order}, and a depthwise convolution over {grid.rows} x {grid.columns} patches"
    return Change(site.path, "attention", f"softmax over {tokens}, {site.heads} heads", after)
