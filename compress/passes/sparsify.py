"""Pruning of single weights: zeros where they cost least, anywhere or as a pattern n:m along the inputs.

Scores: SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), Wanda (Sun et al. 2023, arXiv 2306.11695), and the
magnitude; see `compress.numerics.sparsity`. All weights are pruned on what the dense model gives. The zeros stay
through training, see `compress.layers.sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.progress import track
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model import Model
    from compress.numerics.sparsity import Choice

HALF = 0.5
"""The share of zeros where none is given."""


class Sparsify(Pass):
    """Set weights of linear maps and convolutions to zero, and keep them there."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["sparsify"] = "sparsify"
    score: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    """What decides which weights go: the error of the output that the weights left cannot make up for, and they do make
    up for the rest; the magnitude times the norm of the input; the magnitude."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The share of zeros, 0.5 if not given: of each weight with `magnitude`, of each of its rows with `wanda`, of
    each `block` of its inputs with `sparsegpt`."""
    pattern: str | None = Field(default=None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """"n:m": n of every m consecutive inputs stay, of convolutions n of m channels at each place of the kernel. It
    stands in place of `sparsity`."""
    damping: float = Field(default=0.01, gt=0)
    """Of `sparsegpt`: added to the inputs' second moment, as a share of its mean diagonal."""
    block: int = Field(default=128, ge=1)
    """Of `sparsegpt`: so many inputs are pruned before the others are touched; a multiple of m."""
    head: bool = False
    """Also prune the output head."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'write it in quotes, as "2:4"; without them YAML reads the number {value}.')
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Sparsify:
        if self.pattern is None:
            return self
        kept, size = self.of_groups
        if self.sparsity is not None:
            raise ValueError(
                f'`pattern: "{self.pattern}"` says how many zeros there are; leave `sparsity` out.'
            )
        if kept >= size:
            raise ValueError(f'`pattern: "{self.pattern}"` keeps {kept} of {size}, and prunes none.')
        if self.block % size:
            raise ValueError(
                f'`block: {self.block}` is no multiple of the {size} of `pattern: "{self.pattern}"`.'
            )
        return self

    @property
    def of_groups(self) -> tuple[int, int]:
        """n and m of the pattern; (0, 1) without one."""
        kept, size = (self.pattern or "0:1").split(":")
        return int(kept), int(size)

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights cannot be pruned.",
                "Put `sparsify` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.calibration import required
        from compress.passes.plain_maps import plain_maps
        from compress.passes.seen_inputs import moment_key, moments_of_rows

        self.check(model)
        required(context, self.use)
        weights, skips = plain_maps(model, self.scope, self.head, self._refuse)
        if not weights:
            return Result(model.module, (), tuple(skips))
        moments = moments_of_rows(model, context, weights, "sparsify: second moments")
        changes: list[Change] = []
        for weight in track(context.observer, "sparsify: weights", weights):
            layer, key = model.module.get_submodule(weight.path), moment_key(weight)
            if key in moments.inputs and moments.inputs[key].any():
                changes.append(self._prune(layer, weight.path, moments.mean(key)))
            else:
                skips.append(Skip(weight.path, "reads nothing but zeros in the calibration data, or nothing"))
        record = {"sparse": [change.target for change in changes]}
        module = self.restore(model.module, record)
        changes += [_stored(module, record["sparse"])] if changes else []
        return Result(module, tuple(changes), tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.quantized import swap
        from compress.layers.sparse import sparse

        layers = [module.get_submodule(path) for path in record["sparse"]]
        swap(module, {layer: sparse(layer) for layer in layers})
        return module

    def _refuse(self, layer: nn.Module) -> str:
        """Why `layer` cannot be pruned, or ""."""
        from compress.layers.linear import is_conv, is_linear
        from compress.layers.unfolded import neighbours

        kind, size = type(layer).__name__, self.of_groups[1]
        if not (is_linear(layer) or is_conv(layer)):
            return f"{kind} is no plain linear map or 2-d convolution"
        if is_conv(layer) and layer.groups != 1:
            return f"a convolution in {layer.groups} groups"
        width = neighbours(layer)
        return f"its {width} inputs are no multiple of {size}" if width % size else ""

    def _prune(self, layer: nn.Module, path: str, moment: Tensor) -> Change:
        """Prune `layer` in place; `moment` is that of its inputs."""
        from compress.layers.unfolded import weight_matrix, write_matrix
        from compress.numerics.sparsity import lost_share

        before = weight_matrix(layer).clone()
        after = self._pruned(before, moment)
        write_matrix(layer, after)
        lost = lost_share(before, after, moment)
        zeros = float((after == 0).double().mean())
        shape = "x".join(map(str, layer.get_parameter("weight").shape))
        pattern = f"as {self.pattern}" if self.pattern else "anywhere"
        return Change(
            path,
            "sparsified",
            f"{type(layer).__name__} {shape}",
            f"{100 * zeros:.1f} % zeros, {pattern}; {100 * lost:.2g} % of the output's energy lost",
        )

    def _pruned(self, weight: Tensor, moment: Tensor) -> Tensor:
        from compress.numerics.sparsity import pruned, sparsegpt, wanda_scores

        choice = self._choice()
        if self.score == "sparsegpt":
            return sparsegpt(weight, moment, choice, self.damping, self.block)
        scores = wanda_scores(weight, moment) if self.score == "wanda" else weight.abs()
        return pruned(weight, scores, choice)

    def _choice(self) -> Choice:
        from compress.numerics.sparsity import by_row, of_groups, overall

        if self.pattern:
            return of_groups(*self.of_groups)
        return (by_row if self.score == "wanda" else overall)(
            HALF if self.sparsity is None else self.sparsity
        )


def _stored(module: nn.Module, paths: Sequence[str]) -> Change:
    """What the zeros save in memory and files: nothing."""
    weights = [module.get_submodule(path).get_parameter("weight") for path in paths]
    count, size = sum(one.numel() for one in weights), sum(one.nbytes for one in weights)
    zeros = sum(int((one == 0).sum()) for one in weights)
    return Change(
        "the model",
        "stored",
        f"{size} bytes in {len(weights)} weights",
        f"as many: {100 * zeros / count:.1f} % of the numbers are zeros, and are stored like any other",
    )
