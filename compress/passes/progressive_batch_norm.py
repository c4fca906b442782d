"""Train layer and RMS norms away: a batch norm takes the place of each, and goes into the weights beside it.

After SLAB's PRepBN (Guo et al. 2024, arXiv 2405.11582): y = lambda norm(x) + (1 - lambda) (BN(x) + alpha x), with
lambda falling from 1 to 0 while the model trains to answer as the one with the norms. A batch norm with fixed
statistics is a scale and a shift for each feature, which the linear maps that read it take on: no norm is left. Beyond
the paper, the batch norms begin as the best linear fit to the norms, and in the end their statistics are measured anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.taught import Taught, lessons, require_fall
from compress.report import Change, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Model
    from compress.passes.fading import Learnt


class ProgressiveBatchNorm(Taught):
    """Let batch norms take the place of layer and RMS norms as the model trains, and fold them into the weights."""

    use: Literal["progressive_batch_norm"] = "progressive_batch_norm"
    steps: int = Field(default=2000, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """The largest learning rate."""
    loss: Literal["auto", "logits", "hidden", "both", "minilm"] = "both"
    """What is compared with the teacher, see `distill`. `both`: logits and hidden states, or these alone where there
    are no logits."""
    decay: float = Field(default=0.6, ge=0, le=1)
    """The share of the steps in which lambda falls from 1 to 0. In the rest the batch norms are alone."""
    alpha: float = 0.0
    """What alpha begins with; it trains. The batch norms are fitted to the norms with it. The paper begins with 1 for
    models that are trained from the start: in a trained one the residual stream is wide, and its share grows from block
    to block."""
    statistics: int = Field(default=64, ge=1)
    """So many of the training batches, evenly spread, give the statistics in the end."""
    merge: bool = True
    """Fold the batch norms into the weights beside them. `false` keeps them, for more training."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights neither train nor take on batch norms.",
                "Put `progressive_batch_norm` before `quantize` in the recipe, and start from the float model.",
            )
        kinds = {str(one.dtype) for one in model.module.parameters() if one.is_floating_point()}
        if not kinds <= {"torch.float32", "torch.float64"}:
            raise Unsuitable(
                f"`progressive_batch_norm` trains in float32, and the model is in {', '.join(sorted(kinds))}.",
                "Load it with `dtype: float32`; `precision: bfloat16` trains under autocast.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.fading import fading_norms, teach
        from compress.passes.norm_places import replaceable_norms
        from compress.passes.unnormed import keep, merge

        self.check(model)
        norms, skips = replaceable_norms(model, self.scope)
        if not norms:
            return Result(model.module, (), tuple(skips))
        kinds = {path: type(model.module.get_submodule(path)).__name__ for path in norms}
        with lessons(self, model, context) as lesson:
            with fading_norms(model.module, norms, self.alpha) as fading:
                learnt = teach(model.module, fading, lesson, self.decay, self.statistics)
            after = lesson.mean_loss(model.module)
        why = f"the loss ({lesson.kind}) does not depend on it, so that nothing would train what takes its place"
        skips += [Skip(path, why) for path in learnt.unreached]
        norms = {path: features for path, features in norms.items() if path not in learnt.unreached}
        if not norms:
            return Result(model.module, (), tuple(skips))
        require_fall(self.use, learnt.before, after)
        became, record = merge(model, norms) if self.merge else keep(norms)
        changes = [self._change(lesson.kind, learnt, after)]
        changes += [
            Change(one.path, one.what, f"{kinds[one.path]} of {norms[one.path]} features", one.after)
            for one in became
        ]
        return Result(model.module, tuple(changes), tuple(skips), record)

    def _change(self, kind: str, learnt: Learnt, after: float) -> Change:
        before = f"loss {learnt.before:.4g} with fitted batch norms"
        trained = f"{len(learnt.names)} tensors, {self.steps} steps"
        return Change("the model", f"trained on {kind}", before, f"loss {after:.4g} ({trained})")

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.unnormed import restore_batch

        restore_batch(module, record)
        return module
