"""Token reduction: later blocks of an encoder run on fewer tokens, without training.

Methods: `transform`, ours, after Token Transforming (arXiv 2506.05709); `tome` (Bolya et al. 2023, arXiv 2210.09461);
`prune` (EViT, Liang et al. 2022, arXiv 2202.07800); see `compress.numerics.token_choice`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.token_schedule import least_left
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from compress.graph.structure import Stack
    from compress.layers.tokens import How, Layout
    from compress.model import Model
    from compress.passes.token_schedule import Costs


class MergeTokens(Pass):
    """Reduce the tokens of a stack of encoder blocks."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "nothing"

    use: Literal["merge_tokens"] = "merge_tokens"
    method: Literal["transform", "tome", "prune"] = "transform"
    """Which tokens go, and where to: merged where that moves the states least; merged where keys are most alike;
    those that the class token looks at least, into one."""
    keep: float | None = Field(default=None, gt=0, lt=1)
    """The share of the model's multiply-accumulates that is left; the schedule is computed from it."""
    at: tuple[int, ...] | None = None
    """With `keep`: the numbers of the blocks, from 1 on, before which tokens are reduced. By default three."""
    remove: int | None = Field(default=None, ge=1)
    """In place of `keep`: so many tokens go before each block but the first."""
    left: tuple[int, ...] | None = None
    """In place of `keep`: how many tokens each block runs on, the first block included."""
    multiple: int = Field(default=1, ge=1)
    """With `keep`: counts are multiples of this, as kernels of half precision like them (8)."""
    fuse: bool = True
    """Of `prune`: what goes becomes one token, its mean weighted by attention."""
    proportional: bool | None = None
    """Whether attention looks at a token as at all those that it stands for. By default, but for `prune`."""
    by: Literal["gather", "matrix"] = "gather"
    """How it is computed: gathered rows, or one product with the whole matrix."""

    @model_validator(mode="after")
    def _one_schedule(self) -> MergeTokens:
        given = [name for name in ("keep", "remove", "left") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(f"`{name}`" for name in given) if given else "none of them"
            raise ValueError(f"give exactly one of `keep`, `remove`, `left`; here is {what}.")
        if self.at is not None and self.keep is None:
            raise ValueError("`at` goes with `keep`.")
        return self

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized
        from compress.layers.tokens import is_reduced

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its ranges were measured with all tokens.",
                "Put `merge_tokens` before `quantize` in the recipe.",
            )
        if not model.graph.attentions:
            raise Unsuitable(
                "The model has no attention: each of its outputs is made for one place of a grid, so no place can go.",
                "Leave `merge_tokens` out for this model.",
            )
        if is_reduced(model.module):
            raise Unsuitable(
                "The model's tokens are reduced already.", "Use one `merge_tokens` for all blocks."
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.layers.tokens import Layout, install
        from compress.passes.blocks import chosen_stack, run_stack
        from compress.passes.token_fit import require_mergeable, routed_attentions
        from compress.passes.token_schedule import costs_of
        from compress.passes.token_views import find_views

        del context
        self.check(model)
        stack = chosen_stack(model, self.scope, "`merge_tokens`", _attends(model))
        require_mergeable(model, stack)
        run = run_stack(model.module, stack.blocks, model.example, 1)
        attentions = routed_attentions(model, stack, *run.last.shape[:2])
        views = find_views(model.module, stack.blocks, model.example, run)
        costs = costs_of(model.graph, stack.blocks, run.last.shape, self._compared(model, run.last.shape[2]))
        left = self._schedule(costs, views.protected)
        layout = Layout(
            stack.blocks, attentions, costs.count, left, views.protected, views.restored, run.calls[0].slot
        )
        changes = _changes(layout, costs)
        if changes:
            install(model.module, layout, self._how())
        return Result(model.module, changes, _skips(layout), _record(layout) if changes else {})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.tokens import Layout, install

        if record:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
            }
            install(module, Layout(**values), self._how())
        return module

    def _how(self) -> How:
        from compress.layers.tokens import How

        proportional = self.method != "prune" if self.proportional is None else self.proportional
        return How(self.method, self.fuse, proportional, self.by)

    def _compared(self, model: Model, width: int) -> int:
        """How many channels of two tokens are compared."""
        return {"transform": width, "tome": model.graph.attentions[0].head_size, "prune": 0}[self.method]

    def _schedule(self, costs: Costs, protected: int) -> tuple[int, ...]:
        from compress.passes.token_schedule import constant, default_places, scheduled

        blocks, halves = len(costs.linear), self.method != "prune"
        if self.left is not None:
            return self._given(self.left, costs.count, blocks, protected)
        if self.remove is not None:
            return constant(costs.count, self.remove, blocks, protected, halves)
        assert self.keep is not None, "one schedule is given"
        places = default_places(blocks) if self.at is None else self.at
        if not places or min(places) < 1 or max(places) >= blocks:
            raise Unsuitable(
                f"`at: {list(places)}` names blocks that cannot be reduced before: there are blocks 1 to {blocks - 1}.",
                "Name blocks by number; what the first block reads is never reduced.",
            )
        return scheduled(costs, self.keep, places, protected, self.multiple, halves)

    def _given(self, left: tuple[int, ...], count: int, blocks: int, protected: int) -> tuple[int, ...]:
        least = [
            protected + 1 if self.method == "prune" else least_left(before, protected) for before in left
        ]
        fits = (
            len(left) == blocks
            and left[0] == count
            and all(low <= after <= before for low, before, after in zip(least, left, left[1:], strict=False))
        )
        if not fits:
            raise Unsuitable(
                f"`left: {list(left)}` is no schedule for {blocks} blocks and {count} tokens, {protected} of them "
                "special.",
                f"Give {blocks} numbers that begin with {count} and do not rise"
                + ("." if self.method == "prune" else "; one step merges at most half of the tokens."),
            )
        return left


def _attends(model: Model) -> Callable[[Stack], bool]:
    """Whether each block of a stack has an attention."""
    paths = [f"{one.path}." for one in model.graph.attentions]
    return lambda stack: all(any(path.startswith(f"{block}.") for path in paths) for block in stack.blocks)


def _changes(layout: Layout, costs: Costs) -> tuple[Change, ...]:
    steps = zip(layout.blocks, (layout.count, *layout.left), layout.left, strict=False)
    share = f"{100 * costs.share(layout.left):.1f} % of the model's multiply-accumulates are left in all"
    changes = [
        Change(block, "tokens", f"{before} tokens", f"{after} tokens")
        for block, before, after in steps
        if after < before
    ]
    return (*changes[:-1], replace(changes[-1], after=f"{changes[-1].after}; {share}")) if changes else ()


def _record(layout: Layout) -> dict[str, Any]:
    """`layout` in JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(layout).items()}


def _skips(layout: Layout) -> tuple[Skip, ...]:
    """The blocks behind which all positions are given back, because something reads them."""
    return tuple(
        Skip(block, "what it gives is read at every position, so all positions are given back behind it")
        for block, restored in zip(layout.blocks, layout.restored, strict=True)
        if restored
    )
