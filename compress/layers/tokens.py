"""Token reduction inside a model: reducers before the blocks of a stack, and attention that knows the tokens' sizes.

No forward is copied. A `TokenReducer` is a child of its block and reduces what the block is given, in a hook. The
attentions of the stack go through transformers' registry (see `compress.layers.attention`), where the logarithm of a
token's size is added to the scores of its key: a token that stands for five is looked at as five would be. What one run
knows of its tokens is in a `TokenFlow`, which all of them share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.calls import Slot, given, placed, states, with_states
from compress.numerics.token_choice import prune_plan, tome_plan, transform_plan
from compress.numerics.token_plan import TokenPlan, merge_by_matrix, take

Method = Literal["transform", "tome", "prune"]
MASKED = -1e4
"""The score of a key that stands for nothing; float16 holds it."""


@dataclass(frozen=True)
class Layout:
    """What a stack's reducers are built from; a step's record holds it in JSON values.

    left        how many tokens each block runs on, the first among `count`
    protected   so many of the first tokens are never merged
    restored    the blocks behind which every first position is given back, since something reads them there
    slot        where the blocks take their hidden states
    """

    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    count: int
    left: tuple[int, ...]
    protected: int
    restored: tuple[bool, ...]
    slot: Slot


@dataclass(frozen=True)
class How:
    """The method of a reducer, and what else its settings say."""

    method: Method
    fuse: bool = True
    proportional: bool = True
    by: Literal["gather", "matrix"] = "gather"

    @property
    def keeps_all(self) -> bool:
        """Whether each first position has a token that stands for it."""
        return self.method != "prune" or self.fuse


@dataclass
class TokenFlow:
    """What one run of a stack knows of its tokens. It is emptied when a run begins and when it is done.

    count     how many tokens the first block was given
    wants     whether tokens are reduced behind the present block, by what its attention sees
    size      (batch, tokens) how many of the first tokens each stands for; None as long as all are there
    owner     (batch, first tokens) the present token that has most of each, if any block gives positions back
    lost      (batch, first tokens, channels) the states of positions when their token was lost, and which are
    hidden    the present states, where the block before gave every position back
    mask      (batch, 1, 1, tokens) what the model adds to the scores of its keys
    keys      (batch, heads, tokens, channels) of the last attention
    scores    (batch, tokens) how much the protected tokens, or all if there are none, look at each
    """

    how: How
    protected: int
    tracks: bool = False
    count: int = 0
    wants: bool = False
    size: Tensor | None = None
    owner: Tensor | None = None
    hidden: Tensor | None = None
    lost: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    scores: Tensor | None = None

    def clear(self) -> None:
        """Forget the run."""
        self.size = self.owner = self.lost = self.hidden = self.mask = self.keys = self.scores = None

    def attend(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
        """The mask (batch, 1, 1, tokens) of one attention, from the sizes once there are any, else as it is."""
        if self.size is None:
            self.mask = mask
        elif self.how.proportional or self.mask is not None:
            mask = self._bias(key.dtype).expand(-1, 1, query.shape[2], -1)
        else:
            mask = None
        if self.wants and self.how.method == "tome":
            self.keys = key
        if self.wants and self.how.method == "prune":
            self.scores = self._looks(query, key, mask, scaling)
        return mask

    def reduce(self, hidden: Tensor, left: int) -> Tensor:
        """The states of `left` tokens for those of all present ones, (batch, tokens, channels)."""
        size = self._sizes(hidden) if self.size is None else self.size
        plan = self._plan(hidden, size, left)
        mass = size if self.how.method != "prune" else size * self._weights(hidden)
        if self.tracks:
            self._track(plan, hidden)
        merge = TokenPlan.merge if self.how.by == "gather" else merge_by_matrix
        self.size = plan.add(size)
        return merge(plan, hidden, mass)

    def restore(self, hidden: Tensor) -> Tensor:
        """Every first position, with the state of the token that has most of it, or the last one it had."""
        if self.owner is None:
            return hidden
        found = take(hidden, self.owner)
        return found if self.lost is None else torch.where(self.lost[1][..., None], self.lost[0], found)

    def _sizes(self, hidden: Tensor) -> Tensor:
        """The sizes of tokens that are still all there: one, and zero for padding."""
        ones = hidden.new_ones(hidden.shape[:2])
        return ones if self.mask is None else ones * (self.mask[:, 0, 0] > MASKED / 2).to(hidden.dtype)

    def _track(self, plan: TokenPlan, hidden: Tensor) -> None:
        """Note which token of `plan` has each first position, and what a position was that has none any more."""
        batch, count = hidden.shape[:2]
        owner = (
            torch.arange(count, device=hidden.device).expand(batch, -1) if self.owner is None else self.owner
        )
        moved_to, kept = plan.owners()
        if not self.how.keeps_all:
            gone = ~kept.gather(1, owner)
            gone = gone if self.lost is None else gone | self.lost[1]
            self.lost = self.restore(hidden), gone
        self.owner = moved_to.gather(1, owner)

    def _plan(self, hidden: Tensor, size: Tensor, left: int) -> TokenPlan:
        if self.how.method == "transform":
            return transform_plan(hidden, size, left, self.protected)
        if self.how.method == "tome":
            assert self.keys is not None, "no attention has run before the first reducer"
            return tome_plan(self.keys, size, left, self.protected)
        return prune_plan(self._weights(hidden), left, self.protected, self.how.fuse, hidden.dtype)

    def _weights(self, hidden: Tensor) -> Tensor:
        assert self.scores is not None, "no attention has run before the first reducer"
        return self.scores.to(hidden.dtype)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        assert self.size is not None
        size = self.size.float()[:, None, None, :]
        scale = size.clamp(min=1e-6).log() if self.how.proportional else torch.zeros_like(size)
        return torch.where(size > 0, scale, MASKED).to(dtype)

    def _looks(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        rows = query[:, :, :1] if self.protected else query
        shared = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(shared, 1) if shared > 1 else key
        scores = (rows @ key.transpose(2, 3)).float() * scaling
        if mask is not None:
            scores = scores + mask[:, :, :1].float()
        return scores.softmax(-1).mean((1, 2))


class TokenReducer(nn.Module):
    """Reduces what its block is given; behind the last block, and where asked, gives every position back."""

    def __init__(self, flow: TokenFlow, layout: Layout, number: int) -> None:
        super().__init__()
        self.flow = flow
        self.slot = layout.slot
        self.number = number
        self.last = number == len(layout.blocks) - 1
        self.count, self.left = layout.count, layout.left[number]
        self.followed = not self.last and layout.left[number + 1] < self.left
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
        left = self._left()
        if left < hidden.shape[1]:
            hidden = self.flow.reduce(hidden, left)
        return placed(self.slot, args, kwargs, hidden)

    def after(self, block: nn.Module, args: Any, output: Any) -> Any:
        """The hook behind the block."""
        del block, args
        hidden = states(output)
        if self.restores and self.flow.owner is not None:
            self.flow.hidden = hidden
            output = with_states(output, self.flow.restore(hidden))
        if self.last:
            self.flow.clear()
        return output

    def _left(self) -> int:
        """How many tokens to leave of an input that may have more or fewer than the example's."""
        first = self.flow.count
        return self.left if first == self.count else round(self.left * first / self.count)


def install(module: nn.Module, layout: Layout, how: How) -> None:
    """Put reducers into the blocks of `module` that `layout` names, in place, and its attentions onto the registry."""
    from compress.layers.attention import use_attention

    flow = TokenFlow(how, layout.protected, tracks=any(layout.restored))
    for number, path in enumerate(layout.blocks):
        block = module.get_submodule(path)
        reducer = TokenReducer(flow, layout, number)
        block.token_reducer = reducer
        block.register_forward_pre_hook(reducer.before, with_kwargs=True)
        block.register_forward_hook(reducer.after)
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


def _is_reducer(hook: Callable[..., Any]) -> bool:
    return isinstance(getattr(hook, "__self__", None), TokenReducer)
