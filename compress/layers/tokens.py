"""Token reduction inside a model: reducers before the blocks of a stack, and attention that knows the tokens' sizes.

No forward is copied. A `TokenReducer` is a child of its block and reduces what the block is given, in a hook. The
attentions of the stack go through transformers' registry (see `compress.layers.attention`), where the logarithm of a
token's size is added to the scores of its key: a token that stands for five is looked at as five would be. What one run
knows of its tokens is in a `TokenFlow`, which all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.calls import Slot, given, placed, states, with_states
from compress.errors import Unsuitable
from compress.numerics.token_choice import prune_plan, sample_plan, tome_plan, transform_plan
from compress.numerics.token_clusters import Clusters, cluster_plan
from compress.numerics.token_plan import SoftPlan, TokenPlan, leading, take

Method = Literal["transform", "tome", "prune", "sample", "cluster"]
MASKED = -1e4
"""The score of a key that stands for nothing; float16 holds it."""
TINY = 1e-30
"""A size whose logarithm stands for that of zero until `MASKED` is added."""


@dataclass(frozen=True)
class Layout:
    """What a stack's reducers are built from; a step's record holds it in JSON values.

    left        how many tokens each block runs on, the first among `count`
    reduces     before which blocks tokens are reduced
    protected   so many of the first tokens are never merged
    restored    the blocks behind which every first position is given back, since something reads them there
    slot        where the blocks take their hidden states
    biased      whether the model adds a term for each pair of positions to the scores
    clusters    of the method `cluster`
    """

    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    count: int
    left: tuple[int, ...]
    reduces: tuple[bool, ...]
    protected: int
    restored: tuple[bool, ...]
    slot: Slot
    biased: bool = False
    clusters: Clusters | None = None


@dataclass(frozen=True)
class How:
    """The method of a reducer, and what else its settings say."""

    method: Method
    fuse: bool = True
    proportional: bool = True
    samples: int | None = None
    by: Literal["gather", "matrix"] | None = None

    @property
    def scores(self) -> bool:
        """Whether tokens are chosen by how much they are looked at."""
        return self.method in {"prune", "sample"}


@dataclass(frozen=True)
class TokenMap:
    """Where the first tokens are after a reduction before block `number` of the stack.

    owner   (batch, first tokens) the present token that has most of each
    lost    (batch, first tokens) which have none
    alive   (batch, present tokens) which of the present tokens stand for any
    """

    number: int
    owner: Tensor
    lost: Tensor
    alive: Tensor


@dataclass
class TokenFlow:
    """What one run of a stack knows of its tokens. It is emptied when a run begins and when it is done.

    count     how many tokens the first block was given
    wants     whether tokens are reduced behind the present block, by what its attention sees
    size      (batch, tokens) how many of the first tokens each stands for; None as long as that is one
    bias      (batch, 1, 1, tokens) the logarithms of the sizes, added to the scores of the keys
    origin    (batch, tokens) the first position that each present token was, if the model adds terms for pairs of them
    owner     (batch, first tokens) the present token that has most of each, if any block gives positions back
    lost      (batch, first tokens, channels) the states of positions when their token was lost, and which are
    clusters  the plan of the method `cluster`
    clustered the states that it merged and those that it made of them, if any block gives positions back
    hidden    the present states, where the block before gave every position back
    mask      what the model adds to the scores of its keys, (batch, 1, 1, tokens)
    keys      (batch, heads, tokens, channels) of the last attention
    scores    (batch, tokens) how much the protected tokens, or all if there are none, look at each
    seen      where each reduction's `TokenMap` is put, if anyone asks
    """

    how: How
    layout: Layout
    tracks: bool = False
    count: int = 0
    wants: bool = False
    size: Tensor | None = None
    bias: Tensor | None = None
    origin: Tensor | None = None
    owner: Tensor | None = None
    lost: tuple[Tensor, Tensor] | None = None
    clusters: SoftPlan | None = None
    clustered: tuple[Tensor, Tensor] | None = None
    hidden: Tensor | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    scores: Tensor | None = None
    seen: list[TokenMap] | None = None

    def clear(self) -> None:
        """Forget the run."""
        self.size = self.bias = self.origin = self.owner = self.lost = self.clusters = None
        self.clustered = self.hidden = self.mask = self.keys = self.scores = None

    @property
    def is_reduced(self) -> bool:
        """Whether there are other tokens now than the model believes."""
        return self.bias is not None or self.clusters is not None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """What to add to the scores of one attention, in the place of the model's `mask`, for the present tokens."""
        if self.is_reduced:
            mask = self._present(query, mask)
        else:
            self.mask = mask
        if self.wants and self.how.method == "tome":
            self.keys = key
        if self.wants and self.how.scores:
            self.scores = self._looks(query, key, mask, scaling)
        if self.wants and self.how.method == "sample":
            assert self.scores is not None
            self.scores = self.scores * value.float().square().sum((1, 3)).sqrt()
        return mask

    def reduce(self, hidden: Tensor, left: int, number: int) -> Tensor:
        """The states of `left` tokens for all present ones, (batch, tokens, channels), before block `number`."""
        if self.layout.clusters is not None:
            self.clusters = cluster_plan(hidden, self.layout.clusters, self.layout.protected, self.tracks)
            merged = self.clusters.merge(hidden)
            self.clustered = (hidden, merged) if self.tracks else None
            if self.seen is not None:
                everyone = torch.ones(merged.shape[:2], dtype=torch.bool, device=merged.device)
                self._note(number, self.clusters.owner, everyone)
            return merged
        if self.size is None:
            self.size = self._padding(hidden)
        plan, drawn = self._plan(hidden, left)
        self._track(plan, hidden)
        size = _times(self.size, drawn, hidden.dtype)
        merge = plan.merge if self._by_matrix(hidden) else plan.gather
        if self.how.method == "prune":
            merged, _ = merge(hidden, _times(size, self._weights(hidden), hidden.dtype))
            mass = plan.add(hidden.new_ones(hidden.shape[:2]) if size is None else size)
        else:
            merged, mass = merge(hidden, size)
        self.size = mass
        self.bias = self._bias(mass, hidden.dtype)
        self._note(number, self.owner, mass > 0)
        return merged

    def restore(self, hidden: Tensor) -> Tensor:
        """Every first position, with the state of the token that has most of it, or the last one it had.

        Of clusters: with the state that it had, changed as those of the clusters nearest to it were.
        """
        if self.clusters is not None:
            assert self.clustered is not None, "the way back was not asked for"
            return self.clusters.restore(hidden, *self.clustered)
        if self.owner is None:
            return hidden
        found = take(hidden, self.owner.clamp(max=hidden.shape[1] - 1))
        return found if self.lost is None else torch.where(self.lost[1][..., None], self.lost[0], found)

    def _by_matrix(self, hidden: Tensor) -> bool:
        """Whether one product is computed: on a GPU its few operations are faster than gathering rows."""
        return hidden.is_cuda if self.how.by is None else self.how.by == "matrix"

    def _padding(self, hidden: Tensor) -> Tensor | None:
        """The sizes of tokens that are still all there: zero for padding, else one. None if nothing says what is."""
        if self.mask is None:
            return None
        kept = (self.mask[:, 0, 0] > MASKED / 2).to(hidden.dtype)
        return kept.expand(hidden.shape[0], -1)

    def _plan(self, hidden: Tensor, left: int) -> tuple[TokenPlan, Tensor | None]:
        """The plan, and which tokens count, if not all do."""
        protected = self.layout.protected
        if self.how.method == "transform":
            return transform_plan(hidden, self.size, left, protected, self.size_hides), None
        if self.how.method == "tome":
            assert self.keys is not None, "no attention has run before the first reducer"
            return tome_plan(self.keys, self.size, left, protected, self.size_hides), None
        scores = self._weights(hidden)
        if self.how.method == "prune":
            return prune_plan(scores, left, protected, self.how.fuse), None
        return sample_plan(scores, left, protected, self.how.samples or self.count - protected)

    def _weights(self, hidden: Tensor) -> Tensor:
        assert self.scores is not None, "no attention has run before the first reducer"
        return self.scores.to(hidden.dtype)

    def _track(self, plan: TokenPlan, hidden: Tensor) -> None:
        """Note which token of `plan` has each first position, and what a position was that has none any more."""
        first = leading(hidden, hidden.shape[1])
        if self.layout.biased:
            self.origin = (first if self.origin is None else self.origin).gather(1, plan.founders())
        if not self.tracks:
            return
        owner = first if self.owner is None else self.owner.clamp(max=hidden.shape[1] - 1)
        moved = plan.place.gather(1, owner)
        if self.how.scores:
            gone = moved == plan.left
            gone = gone if self.lost is None else gone | self.lost[1]
            self.lost = self.restore(hidden), gone
        self.owner = moved

    def _note(self, number: int, owner: Tensor | None, alive: Tensor) -> None:
        """Tell those who ask what has become of the first tokens."""
        if self.seen is not None and owner is not None:
            lost = torch.zeros_like(owner, dtype=torch.bool) if self.lost is None else self.lost[1]
            self.seen.append(TokenMap(number, owner, lost, alive))

    def _present(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to the scores among the tokens left, where the model's `mask` is of all."""
        if mask is not None and self.count not in (mask.shape[-1], 1):
            raise Unsuitable(
                f"An attention's mask is of shape {tuple(mask.shape)}, and the model began with {self.count} tokens.",
                "It cannot be told which of its columns belong to the tokens left: leave `merge_tokens` out.",
            )
        pairs = None
        if self.origin is not None and mask is not None:
            pairs = _among(mask, self.origin)
        if self.bias is None or not (self.how.proportional or self.size_hides):
            return pairs
        bias = self.bias.expand(-1, 1, query.shape[2], -1)
        return bias if pairs is None else pairs + self.bias

    @property
    def size_hides(self) -> bool:
        """Whether a token may have size zero, so that none must look at it."""
        return self.how.method == "sample" or self.mask is not None

    def _bias(self, size: Tensor, dtype: torch.dtype) -> Tensor:
        size = size.float()
        bias = size.clamp(min=TINY).log() if self.how.proportional else torch.zeros_like(size)
        if self.size_hides:
            bias = bias + (size <= 0).float() * MASKED
        return bias.to(dtype)[:, None, None, :]

    def _looks(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The mean probability over heads, and over the rows that count, with which each key is looked at."""
        rows = query[:, :, :1] if self.layout.protected else query
        shared = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(shared, 1) if shared > 1 else key
        scores = (key @ rows.transpose(2, 3)).transpose(2, 3).float() * scaling  # to turn few rows costs less
        if mask is not None:
            scores = scores + mask[:, :, : scores.shape[2]].float()
        return scores.softmax(-1).mean((1, 2))


class TokenReducer(nn.Module):
    """Reduces what its block is given; behind the last block, and where asked, gives every position back."""

    def __init__(self, flow: TokenFlow, number: int) -> None:
        super().__init__()
        layout = flow.layout
        self.flow = flow
        self.slot = layout.slot
        self.number = number
        self.last = number == len(layout.blocks) - 1
        self.count, self.left = layout.count, layout.left[number]
        self.reduces = layout.reduces[number]
        self.followed = not self.last and layout.reduces[number + 1]
        self.restores = layout.restored[number]

    def before(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before the block."""
        del block
        handed = given(self.slot, args, kwargs)
        if self.number == 0:
            self.flow.clear()
            self.flow.count = handed.shape[1]
        hidden = handed if self.flow.hidden is None else self.flow.hidden
        self.flow.hidden, self.flow.wants = None, self.followed
        if self.reduces:
            hidden = self.flow.reduce(hidden, self._left(hidden.shape[1]), self.number)
        return placed(self.slot, args, kwargs, hidden)

    def after(self, block: nn.Module, args: Any, output: Any) -> Any:
        """The hook behind the block."""
        del block, args
        if self.restores and self.flow.is_reduced:
            self.flow.hidden = states(output)
            output = with_states(output, self.flow.restore(self.flow.hidden))
        if self.last:
            self.flow.clear()
        return output

    def _left(self, present: int) -> int:
        """How many tokens to leave of an input that may have more or fewer than the example's."""
        first = self.flow.count
        return self.left if first == self.count else min(present, round(self.left * first / self.count))


def install(module: nn.Module, layout: Layout, how: How) -> None:
    """Put reducers into the blocks of `module` that `layout` names, in place, and its attentions onto the registry.

    Their hooks run before those that record hidden states, which so see every position where they are read.
    """
    from compress.layers.attention import use_attention

    flow = TokenFlow(how, layout, tracks=any(layout.restored))
    for number, path in enumerate(layout.blocks):
        block = module.get_submodule(path)
        reducer = TokenReducer(flow, number)
        block.token_reducer = reducer
        block.register_forward_pre_hook(reducer.before, with_kwargs=True)
        block.register_forward_hook(reducer.after, prepend=True)
    for path in layout.attentions:
        module.get_submodule(path).token_flow = flow
    use_attention(module)


def remove(module: nn.Module) -> None:
    """Take all reducers out of `module` again, in place: it computes as it did before."""
    for part in list(module.modules()):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number in [number for number, hook in hooks.items() if _is_reducer(hook)]:
                del hooks[number]
        if isinstance(getattr(part, "token_reducer", None), TokenReducer):
            del part.token_reducer
        if hasattr(part, "token_flow"):
            del part.token_flow


def is_reduced(module: nn.Module) -> bool:
    """Whether a module inside `module` reduces tokens."""
    return any(isinstance(part, TokenReducer) for part in module.modules())


@contextmanager
def watched(module: nn.Module) -> Iterator[list[TokenMap]]:
    """Inside the block each reduction in a run of `module` puts a `TokenMap` into the list."""
    flow = next(part.flow for part in module.modules() if isinstance(part, TokenReducer))
    tracks, seen = flow.tracks, []
    flow.tracks, flow.seen = True, seen
    try:
        yield seen
    finally:
        flow.tracks, flow.seen = tracks, None


def _times(one: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The product of two masses, where None is one."""
    if one is None or other is None:
        return one if other is None else other.to(dtype)
    return one * other.to(dtype)


def _among(pairs: Tensor, origin: Tensor) -> Tensor:
    """The terms `pairs` (1 or batch, heads, N, N) of the present tokens, which were `origin` (batch, M) once.

    (batch, heads, M, M).
    """
    count = pairs.shape[-1]
    batch, left = origin.shape
    flat = (origin[:, :, None] * count + origin[:, None, :]).flatten(1)
    pairs = pairs.expand(batch, -1, count, -1).flatten(2)
    found = pairs.gather(2, flat[:, None, :].expand(-1, pairs.shape[1], -1))
    return found.reshape(batch, -1, left, left)


def _is_reducer(hook: Callable[..., Any]) -> bool:
    return isinstance(getattr(hook, "__self__", None), TokenReducer)
