"""Depth pruning: take out the blocks that matter least, and train nothing.

Scores: Block Influence (ShortGPT, arXiv 2403.03853), angular distance over one run of blocks (arXiv
2403.17887), the loss without the block (SLEB, arXiv 2402.09025), Macro Influence (FuseGPT, arXiv 2411.14507);
see `compress.passes.influence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Change, Effect
from compress.scope import Scope

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.graph.structure import Stack
    from compress.model import Model
    from compress.progress import Observer

Score = Literal["influence", "angular", "perplexity", "macro"]


class DropLayers(Pass):
    """Remove whole blocks of a stack."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["drop_layers"] = "drop_layers"
    remove: int = Field(ge=1)
    """How many blocks to remove."""
    score: Score = "influence"
    """What chooses them: each block's own influence; the angular distance over one run of blocks; the loss of the text
    without the block, one after the other; the influence on what the whole stack gives, one after the other."""
    protect: int = Field(default=1, ge=0)
    """So many of the first and of the last blocks stay."""

    def check(self, model: Model) -> None:
        require_depth_first(model, self.use)
        if self.score == "perplexity" and model.task != "text-generation":
            raise Unsuitable(
                f"`score: perplexity` needs a model that writes text; the task is {model.task}.",
                "Choose `influence`, `angular` or `macro`.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.depth import remove_blocks
        from compress.passes.blocks import chosen_stack

        self.check(model)
        stack = chosen_stack(model, self.scope, "`drop_layers`")
        free = removable(stack, self.scope, self.protect, self.remove)
        batches = _batches(context)
        chosen, scores = self._choose(model.module, stack, free, batches, context.observer)
        places = [place_in_container(stack.blocks[number]) for number in chosen]
        count = children(model.module, stack.path)
        changes = tuple(
            Change(stack.blocks[number], "removed", f"block {number} of {len(stack.blocks)}", scores[number])
            for number in chosen
        )
        remove_blocks(model.module, stack.path, places)
        return Result(model.module, changes, record={"stack": stack.path, "count": count, "removed": places})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.depth import restore_depth

        restore_depth(module, record["stack"], record["count"], record["removed"])
        return module

    def _choose(
        self,
        module: nn.Module,
        stack: Stack,
        free: list[int],
        batches: list[dict[str, Tensor]],
        observer: Observer,
    ) -> tuple[list[int], dict[int, str]]:
        """The numbers of the blocks to remove, in order, and what is said of each."""
        from compress.passes.influence import block_influences, run_distances

        if self.score == "angular":
            distances = run_distances(module, stack.blocks, batches, self.remove, observer)
            starts = [start for start in free if set(range(start, start + self.remove)) <= set(free)]
            if not starts:
                raise Unsuitable(
                    f"There is no run of {self.remove} blocks that may go.", "Remove fewer, or protect fewer."
                )
            best = min(starts, key=distances.__getitem__)
            said = f"angular distance over the run {distances[best]:.4f}"
            return list(range(best, best + self.remove)), dict.fromkeys(range(best, best + self.remove), said)
        if self.score == "influence":
            scores = block_influences(module, stack.blocks, batches, observer)
            order = sorted(free, key=scores.__getitem__)[: self.remove]
            return sorted(order), {number: f"influence {scores[number]:.4f}" for number in order}
        return self._one_by_one(module, stack, free, batches, observer)

    def _one_by_one(
        self,
        module: nn.Module,
        stack: Stack,
        free: list[int],
        batches: list[dict[str, Tensor]],
        observer: Observer,
    ) -> tuple[list[int], dict[int, str]]:
        """Score again after each removal: a block next to one that went may matter more."""
        import copy

        from compress.depth import remove_blocks
        from compress.passes.influence import losses_without, macro_influences

        by_loss = self.score == "perplexity"
        measure, what = (losses_without, "loss") if by_loss else (macro_influences, "macro influence")
        trial, left, said = copy.deepcopy(module), list(range(len(stack.blocks))), dict[int, str]()
        for _ in range(self.remove):
            paths = stack.blocks[: len(left)]
            scores = measure(trial, paths, batches, observer)
            place = min(
                (place for place, number in enumerate(left) if number in free), key=scores.__getitem__
            )
            said[left.pop(place)] = f"{what} {scores[place]:.4f}"
            remove_blocks(trial, stack.path, [place_in_container(paths[place])])
        return sorted(said), said


def require_depth_first(model: Model, use: str) -> None:
    """Raise `Unsuitable` if an earlier pass has noted modules by their place in the stack."""
    for step in model.history:
        # A record of a changed depth says how many blocks there were.
        if step.record and "count" not in step.record:
            raise Unsuitable(
                f"`{use}` comes after `{step.name}`, whose changes are kept by block number.",
                f"Put `{use}` before `{step.name}` in the recipe.",
            )


def removable(stack: Stack, scope: Scope, protect: int, remove: int) -> list[int]:
    """The numbers of the blocks that may go. Raises `Unsuitable` if they are fewer than `remove`."""
    count = len(stack.blocks)
    free = [number for number in range(protect, count - protect) if stack.blocks[number] in scope]
    if len(free) < remove or remove >= count:
        raise Unsuitable(
            f"`remove: {remove}` of the {count} blocks of `{stack.path}`: only {min(len(free), count - 1)} may go "
            f"(`protect: {protect}` at each end, and the scope).",
            "Remove fewer, protect fewer, or widen the scope.",
        )
    return free


def children(module: nn.Module, path: str) -> int:
    """How many modules the list at `path` holds."""
    return len(list(module.get_submodule(path).children()))


def place_in_container(block: str) -> int:
    """The place of a block in its list, from its path."""
    return int(block.rpartition(".")[2])


def _batches(context: Context) -> list[dict[str, Tensor]]:
    from compress.passes.calibration import numbered

    return [batch for _, batch in numbered(context, "drop_layers: calibration data")]
