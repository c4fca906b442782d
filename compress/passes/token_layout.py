"""The layouts of reducers that a stack allows, for the settings of `merge_tokens`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from compress.errors import Unsuitable
from compress.layers.tokens import How, Layout
from compress.numerics.token_clusters import Clusters
from compress.passes.blocks import run_stack
from compress.passes.calibration import numbered
from compress.passes.token_fit import require_mergeable, routed_attentions
from compress.passes.token_grid import centres_for, clustered, fitted, grid_of
from compress.passes.token_schedule import Costs, Schedules, candidate_places, costs_of, default_places
from compress.passes.token_tuning import BATCHES, drawn
from compress.passes.token_views import Views, find_views

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph.structure import Stack
    from compress.model import Model
    from compress.passes.base import Context
    from compress.passes.merge_tokens import MergeTokens

QUANTILE = 0.95
"""Behind a reduction by `sample` there is room for the drawn tokens of this share of the calibration data."""


@dataclass(frozen=True)
class Site:
    """A stack in which tokens can be reduced: a layout without reductions, what blocks cost, and their states.

    `hidden` are the states before each block on the model's example.
    """

    model: Model
    layout: Layout
    costs: Costs
    hidden: tuple[Tensor, ...]


def site_of(model: Model, stack: Stack, settings: MergeTokens) -> Site:
    """What `stack` is like. Raises `Unsuitable` with the reason if its tokens cannot be reduced."""
    require_mergeable(model, stack, settings)
    run = run_stack(model.module, stack.blocks, model.example, 1)
    batch, count, width = run.last.shape
    attentions = routed_attentions(model, stack, batch, count)
    views = find_views(model.module, stack.blocks, model.example, run)
    head = model.graph.attentions[0].head_size
    step = _step(settings, views, width, head)
    layout = Layout(
        stack.blocks,
        attentions,
        count,
        left=(count,) * len(stack.blocks),
        reduces=(False,) * len(stack.blocks),
        protected=views.protected,
        restored=views.restored,
        slot=run.calls[0].slot,
        biased=any(one.positions == "relative" for one in model.graph.attentions),
    )
    return Site(
        model,
        layout,
        costs_of(model.graph, stack.blocks, batch, count, lambda n, m: batch * step(n, m)),
        run.hidden,
    )


def layouts(site: Site, settings: MergeTokens, how: How, context: Context) -> list[Layout]:
    """What the settings ask for: one layout, or those among which calibration data chooses."""
    if settings.method == "cluster":
        places = (_default_cluster(site),) if settings.at is None else _required(settings.at, site)
        return [_clustered(site, settings, places[0], context)]
    if settings.method == "sample" and settings.keep is settings.remove is settings.left is None:
        return [_sampled(site, settings, how, context)]
    halves = settings.method in {"transform", "tome"}
    schedules = Schedules(site.costs, site.layout.protected, halves, settings.multiple)
    if settings.left is not None:
        return [_with(site, _given(settings.left, schedules))]
    if settings.remove is not None:
        return [_with(site, schedules.constant(settings.remove))]
    assert settings.keep is not None, "one schedule is given"
    if settings.at is not None:
        return [_with(site, schedules.largest(settings.keep, _required(settings.at, site)))]
    if context.calibration is None:
        return [_with(site, schedules.largest(settings.keep, default_places(schedules.blocks)))]
    return _reachable(site, schedules, settings.keep)


def _reachable(site: Site, schedules: Schedules, keep: float) -> list[Layout]:
    found, refused = [], None
    for places in candidate_places(schedules.blocks):
        try:
            found.append(_with(site, schedules.largest(keep, places)))
        except Unsuitable as reason:
            refused = refused or reason
    if not found and refused:
        raise refused
    return found


def _required(places: Sequence[int], site: Site) -> tuple[int, ...]:
    blocks = len(site.layout.blocks)
    if not places or min(places) < 1 or max(places) >= blocks:
        raise Unsuitable(
            f"`at: {list(places)}` names blocks that cannot be reduced before: there are blocks 1 to {blocks - 1}.",
            "Name blocks by number; what the first block reads is never reduced.",
        )
    return tuple(places)


def _with(site: Site, left: tuple[int, ...]) -> Layout:
    steps = zip((site.layout.count, *left), left, strict=False)
    return replace(site.layout, left=left, reduces=tuple(after < before for before, after in steps))


def _given(left: tuple[int, ...], schedules: Schedules) -> tuple[int, ...]:
    count = schedules.costs.count
    steps = list(pairwise(left))
    fits = len(left) == schedules.blocks and left[0] == count
    if not fits or not all(
        after == before or schedules.least(before) <= after < before for before, after in steps
    ):
        raise Unsuitable(
            f"`left: {list(left)}` is no schedule for {schedules.blocks} blocks and {count} tokens, "
            f"{schedules.protected} of them special.",
            f"Give {schedules.blocks} numbers that begin with {count} and do not rise"
            + ("; one step merges at most half of the tokens." if schedules.halves else "."),
        )
    return left


def _default_cluster(site: Site) -> int:
    return 1 + len(site.layout.blocks) // 4


def _clustered(site: Site, settings: MergeTokens, place: int, context: Context) -> Layout:
    protected, count = site.layout.protected, site.layout.count
    assert settings.keep is not None, "`cluster` takes `keep`"
    grid = grid_of(site.model, count - protected)
    centres = centres_for(site.costs, settings.keep, place, grid)
    clusters = Clusters(
        grid, centres, settings.iterations, settings.reach, settings.nearest, settings.temperature or 1.0
    )
    if settings.temperature is None:
        clusters = fitted(clusters, _features(site, place, context), protected)
    return replace(_with(site, clustered(site.costs, place, protected + clusters.count)), clusters=clusters)


def _features(site: Site, place: int, context: Context) -> list[Tensor]:
    """The states before the block `place`, on the calibration data or the example."""
    if context.calibration is None:
        return [site.hidden[place]]
    module, blocks = site.model.module, site.layout.blocks
    return [
        run_stack(module, blocks, batch, number).hidden[place]
        for number, batch in islice(numbered(context, "`merge_tokens`"), BATCHES)
    ]


def _sampled(site: Site, settings: MergeTokens, how: How, context: Context) -> Layout:
    """All tokens stay, and are hidden where not drawn; or there is room for most of those drawn on the data."""
    blocks = len(site.layout.blocks)
    places = range(max(1, blocks // 4), blocks) if settings.at is None else _required(settings.at, site)
    masked = replace(site.layout, reduces=tuple(number in places for number in range(blocks)))
    if settings.mask:
        return masked
    counts = drawn(site.model.module, masked, how, context)
    left, found = site.layout.count, []
    for number in range(blocks):
        if number in counts:
            ordered = sorted(counts[number])
            left = min(left, ordered[math.ceil(QUANTILE * len(ordered)) - 1])
        found.append(left)
    return replace(masked, left=tuple(found))


def _step(settings: MergeTokens, views: Views, width: int, head: int) -> Callable[[int, int], float]:
    """What a reduction of one row from n tokens to m costs, in multiply-accumulates."""
    protected = views.protected
    compared = {"transform": width, "tome": head}.get(settings.method, 0)

    def cluster(before: int, after: int) -> float:
        # Pooling or merging, two products an iteration; where places are read the last distances, and giving back.
        products = 1 + 2 * settings.iterations + 2 * any(views.restored) + sum(views.restored)
        return products * (before - protected) * (after - protected) * width

    def other(before: int, after: int) -> float:
        # Others move to half of the tokens, or to the one that `prune` makes of them.
        takers = (before - protected) / 2 if compared else settings.method == "prune"
        merged = (after * before if settings.by == "matrix" else takers * (before - after)) * width
        looks = (1 if protected else before) * before * width if not compared else 0
        return before * before / 4 * compared + looks + merged

    return cluster if settings.method == "cluster" else other
