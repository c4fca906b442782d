"""FuseGPT: remove the blocks that matter least, and graft what they knew into their neighbours.

After Pei et al. 2024, arXiv 2411.14507. One block after the other: the one with the least influence goes; its
weights are grafted into the other blocks of its group through low-rank coefficients, which are trained, with low-rank
updates and the norms, to give the group's own output; then all is folded to plain weights. What is left is the model
with fewer blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.drop_layers import children, place_in_container, removable, require_depth_first
from compress.report import Change, Effect
from compress.training import Training, autocast, training_batches

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Model


class FuseLayers(Training, Pass):
    """Remove blocks of a stack, each grafted into its group and healed there."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "training"

    use: Literal["fuse_layers"] = "fuse_layers"
    remove: int = Field(ge=1)
    """How many blocks to remove."""
    group: int = Field(default=6, ge=2)
    """Neighbouring blocks, the removed one included, that are trained together."""
    rank: int = Field(default=128, ge=1)
    """Rank of the coefficients of a removed weight."""
    update_rank: int = Field(default=128, ge=1)
    """Rank of what is added to each weight."""
    steps: int = Field(default=80, ge=1)
    """Steps of the optimizer for each removed block."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """The largest learning rate."""
    score: Literal["substituted", "macro"] = "substituted"
    """Which block has the least influence: judged by what the stack gives with a fitted linear map in its place, or
    without it (the paper's Macro Influence)."""
    protect: int = Field(default=0, ge=0)
    """So many of the first and of the last blocks stay."""
    score_batches: int = Field(default=2, ge=1)
    """How many batches of the training data choose the blocks."""

    def check(self, model: Model) -> None:
        require_depth_first(model, self.use)
        kinds = {str(one.dtype) for one in model.module.parameters() if one.is_floating_point()}
        if kinds != {"torch.float32"}:
            raise Unsuitable(
                f"`fuse_layers` trains in float32, and the model is in {', '.join(sorted(kinds))}.",
                "Load it with `dtype: float32`; `precision: bfloat16` trains under autocast.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.blocks import chosen_stack
        from compress.passes.grafting import fuse
        from compress.passes.influence import macro_influences, substituted_influences

        self.check(model)
        batches = training_batches(context, self.use)
        stack = chosen_stack(model, self.scope, "`fuse_layers`")
        free = set(removable(stack, self.scope, self.protect, self.remove))
        count, left = children(model.module, stack.path), list(range(len(stack.blocks)))
        influences = substituted_influences if self.score == "substituted" else macro_influences
        changes: list[Change] = []
        for _ in range(self.remove):
            blocks = stack.blocks[: len(left)]
            with autocast(self, context):
                scores = influences(model.module, blocks, batches[: self.score_batches], context.observer)
            place = min((at for at, number in enumerate(left) if number in free), key=scores.__getitem__)
            log = fuse(model.module, stack.path, blocks, place, self, batches, context)
            said = f"error of its group {log.first_loss:.4f} -> {log.last_loss:.4f} in {log.steps} steps"
            before = f"{self.score} influence {scores[place]:.4f}"
            changes.append(Change(stack.blocks[left.pop(place)], "fused", before, said))
        gone = [path for number, path in enumerate(stack.blocks) if number not in left]
        record = {"stack": stack.path, "count": count, "removed": [place_in_container(path) for path in gone]}
        return Result(model.module, tuple(changes), record=record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.depth import restore_depth

        restore_depth(module, record["stack"], record["count"], record["removed"])
        return module
