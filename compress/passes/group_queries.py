"""Fewer key and value heads: multi-head attention becomes grouped-query attention, or a grouped one has fewer groups.

Each group of heads gets one key and value head (Ainslie et al. 2023, arXiv 2305.13245): their mean, as in the paper, or
a head fitted jointly to all of them, after "Align Attention Heads Before Merging Them" (arXiv 2412.20677), which is
known to us by its abstract alone. Which heads are grouped is chosen by their likeness, by their order, or by the norms
of their keys: the static form of key-driven grouping (arXiv 2408.08454), allocated once on calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Attention
    from compress.model import Model
    from compress.numerics.grouping import Groups
    from compress.passes.head_fit import Seen
    from compress.passes.head_forms import Plan
    from compress.passes.kv_setting import Setting


class GroupQueries(Pass):
    """Let groups of query heads share one key and value head."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["group_queries"] = "group_queries"
    kv_heads: int = Field(ge=1)
    """How many key and value heads each attention keeps."""
    grouping: Literal["similarity", "in_order", "norms"] = "similarity"
    """Which heads are grouped: those alike in what they compute, equally many in each group; neighbours, equally many;
    neighbours, the fewer the smaller the norm of their keys is."""
    pooling: Literal["joint", "mean"] = "joint"
    """What a shared head is: fitted to all heads of its group, with a map of each in its queries and in the output; or
    the mean of the heads."""
    unhealed: bool = False
    """Go on with the shared heads although no pass after this one trains them."""

    def owes(self, before: Sequence[Pass]) -> str:
        del before
        return "" if self.unhealed else "key and value heads that were pooled and not trained"

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer weights cannot be pooled.",
                "Put `group_queries` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.head_fit import input_moments
        from compress.passes.head_forms import write_repeated, write_setting

        self.check(model)
        attentions, skips = self._choose(model)
        if not attentions:
            return Result(model.module, (), tuple(skips))
        moments = input_moments(model, context, attentions)
        grouped, left = self._grouped(model, attentions, moments)
        setting, grouped, told_apart = self._form(model, grouped)
        skips += left + told_apart
        if not grouped:
            return Result(model.module, (), tuple(skips))
        plans = [self._plan(model, *one) for one in grouped]
        changes = tuple(_change(one, self.pooling, setting) for one in plans)
        module = model.module
        record = write_setting(model, plans, setting) if setting else write_repeated(module, plans)
        return Result(module, changes, tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.head_forms import restore_form

        restore_form(module, record)
        return module

    def _choose(self, model: Model) -> tuple[list[Attention], list[Skip]]:
        """The attentions to group, and those in scope that stay as they are."""
        from compress.passes.head_choice import reason_to_skip

        chosen, skips = [], []
        if not model.graph.attentions:
            why = "the trace shows no attention: no softmax of products of queries and keys alone that weighs values"
            skips.append(Skip("the model", why))
        for attention in model.graph.attentions:
            if attention.path in self.scope:
                why = reason_to_skip(model, attention, self.kv_heads, even=self.grouping != "norms")
                skips += [Skip(attention.path, why)] if why else []
                chosen += [] if why else [attention]
        return chosen, skips

    def _grouped(
        self, model: Model, attentions: Sequence[Attention], moments: dict[str, Any]
    ) -> tuple[list[tuple[Attention, Groups, Seen]], list[Skip]]:
        """The groups of each attention that is proved to be what the trace says, and the others."""
        from compress.passes.head_fit import groups_of, seen_by
        from compress.passes.head_maps import read_maps
        from compress.passes.head_proof import moved_by, turned

        moved = moved_by(model, attentions, turned) if self.pooling == "joint" else []
        found, skips = [], []
        for one in attentions:
            seen = seen_by(one, moments)
            if one in moved:
                why = "a map of its keys or values is not undone by its inverse behind them; set `pooling: mean`"
                skips.append(Skip(one.path, why))
            elif seen is None:
                skips.append(Skip(one.path, "reads nothing in the calibration data"))
            else:
                maps = read_maps(model.module, one)
                groups = groups_of(one, maps, seen, self.kv_heads, self.grouping, self.pooling)
                found.append((one, groups, seen))
        return found, skips

    def _form(
        self, model: Model, grouped: list[tuple[Attention, Groups, Seen]]
    ) -> tuple[Setting | None, list[tuple[Attention, Groups, Seen]], list[Skip]]:
        """The setting of the config that holds the groups, or None if maps repeat heads; with it, heads are reordered,
        and an attention that this changes is left out.
        """
        from compress.passes.head_forms import setting_for
        from compress.passes.head_maps import reordered
        from compress.passes.head_proof import moved_by

        setting = setting_for(model.module, [(one, groups) for one, groups, _ in grouped])
        if setting is None:
            return None, grouped, []
        orders = {one: [head for group in groups for head in group] for one, groups, _ in grouped}
        mixed = [one for one, order in orders.items() if order != sorted(order)]
        moved = moved_by(model, mixed, lambda one, maps: reordered(maps, orders[one])) if mixed else []
        why = "its heads cannot change places, as more than their maps tells them apart; set `grouping: in_order`"
        left = [one for one in grouped if one[0] not in moved]
        # The config holds all or none.
        return (None if moved else setting), left, [Skip(one.path, why) for one in moved]

    def _plan(self, model: Model, attention: Attention, groups: Groups, seen: Seen) -> Plan:
        from compress.passes.head_fit import pooled
        from compress.passes.head_forms import Plan
        from compress.passes.head_maps import read_maps

        maps = read_maps(model.module, attention)
        return Plan(attention, groups, pooled(attention, maps, seen, groups, self.pooling))


def _change(plan: Plan, pooling: Literal["joint", "mean"], setting: Setting | None) -> Change:
    from compress.passes.head_fit import is_joint

    keys, values = ("joint" if one else "mean" for one in is_joint(plan.attention, pooling))
    groups = " | ".join(" ".join(map(str, group)) for group in plan.groups)
    form = f"`{setting.name}`" if setting else "repeated behind their maps: a cache does not shrink"
    return Change(
        plan.attention.path,
        "grouped",
        f"{plan.attention.kv_heads} key and value heads",
        f"{len(plan.groups)} ({groups}), keys {keys}, values {values}; {form}",
    )
