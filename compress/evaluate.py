"""One score of a model, or of an artifact of it, on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from compress.data import Origin, grouped, read_examples, spread
from compress.errors import DataError, Unproved
from compress.labels import class_numbers, labels_of
from compress.reading import whole_text

if TYPE_CHECKING:
    import torch

    from compress.model import Model

Metric = Literal["spearman", "accuracy", "perplexity"]
Run = Callable[..., Any]
"""Forward keyword arguments to named outputs (attributes or a mapping): a module or a loaded artifact."""


class Evaluation(Origin):
    """Labelled examples and a metric.

    `spearman`: pairs of sentences (`columns`) with a similarity (`label`); 100 times the rank correlation
    with the cosine of mean-pooled embeddings. `accuracy`: texts or pictures with a class, in per cent;
    pictures lie in one subfolder a class. `perplexity`: one long text, in windows of `max_length` tokens.
    """

    metric: Metric
    samples: int | None = Field(
        default=None, ge=1, description="Take this many, evenly spread; all of them by default."
    )

    @model_validator(mode="after")
    def _fits_metric(self) -> Evaluation:
        if self.metric == "spearman" and not (self.columns and self.label):
            raise ValueError("`spearman` needs a table with `columns: [FIRST, SECOND]` and `label: SCORE`.")
        if self.metric == "accuracy" and self.kind == "text":
            raise ValueError("`accuracy` needs a table with `column` and `label`, or a folder of `images`.")
        if self.metric == "accuracy" and self.kind != "images" and not self.label:
            raise ValueError("`accuracy` needs `label`: the column of the class.")
        if self.metric == "perplexity" and self.kind != "text":
            raise ValueError("`perplexity` needs `text`: one long text.")
        return self


@dataclass(frozen=True)
class Score:
    """A metric's value over `samples`: spearman times 100, accuracy in per cent, perplexity as it is."""

    metric: Metric
    value: float
    samples: int


def drop(metric: Metric, before: float, after: float) -> float:
    """What was lost from `before` to `after`: points, or for perplexity its rise in per cent."""
    return 100 * (after / before - 1) if metric == "perplexity" else before - after


def evaluate(run: Run, evaluation: Evaluation, model: Model) -> Score:
    """Score `run`, which takes what `model` takes, on `evaluation`. Raises `DataError` for unfit data."""
    score = {"spearman": _spearman, "accuracy": _accuracy, "perplexity": _perplexity}[evaluation.metric]
    value, samples = score(run, evaluation, model)
    if value != value:
        raise Unproved(
            f"The {evaluation.metric} of {samples} samples is not a number: all scores or labels are equal.",
            "Check the column `label`, and the model's outputs.",
        )
    return Score(evaluation.metric, value, samples)


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of two vectors `(n,)`; equal values get the mean of their ranks."""
    import torch

    return float(torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, float64 `(n,)`."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[group]


def mean_pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `states` `(batch, length, size)` over the positions where `mask` `(batch, length)` is 1."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def _spearman(run: Run, evaluation: Evaluation, model: Model) -> tuple[float, int]:
    from torch.nn.functional import cosine_similarity

    labels, pairs = _labelled(evaluation)
    first, second = (_embedded(run, texts, evaluation, model) for texts in zip(*pairs, strict=True))
    return 100 * rank_correlation(cosine_similarity(first, second), _numbers(labels, evaluation)), len(pairs)


def _embedded(run: Run, texts: Sequence[str], evaluation: Evaluation, model: Model) -> torch.Tensor:
    """Mean-pooled embeddings, float32 `(texts, size)`. Sorted by length inside, so that little is padded."""
    import torch

    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    pooled = [
        mean_pooled(_output(outputs, "last_hidden_state").float(), inputs["attention_mask"])
        for inputs, outputs in _outputs(run, [texts[number] for number in order], evaluation, model)
    ]
    return torch.cat(pooled)[torch.tensor(order).argsort()]


def _accuracy(run: Run, evaluation: Evaluation, model: Model) -> tuple[float, int]:
    import torch

    labels, examples = _labelled(evaluation)
    guesses = [
        _output(outputs, "logits").argmax(-1) for _, outputs in _outputs(run, examples, evaluation, model)
    ]
    right = torch.cat(guesses) == torch.tensor(class_numbers(labels, evaluation, model))
    return 100 * float(right.double().mean()), len(examples)


def _perplexity(run: Run, evaluation: Evaluation, model: Model) -> tuple[float, int]:
    import torch
    from torch.nn.functional import cross_entropy

    from compress.encoding import windows

    path = evaluation.path
    assert path is not None, "perplexity reads a text file"
    examples = spread(windows(whole_text(path), evaluation.max_length, model), evaluation.samples)
    loss, tokens = 0.0, 0
    for inputs, outputs in _outputs(run, examples, evaluation, model):
        logits, wanted = _output(outputs, "logits")[:, :-1].float(), inputs["input_ids"][:, 1:]
        loss += float(cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        tokens += wanted.numel()
    return float(torch.tensor(loss / tokens, dtype=torch.float64).exp()), len(examples)


def _outputs(
    run: Run, examples: Sequence[Any], evaluation: Evaluation, model: Model
) -> Iterator[tuple[Any, Any]]:
    """The inputs and outputs of each batch."""
    import torch

    for inputs in grouped(examples, evaluation, model):
        with torch.inference_mode():
            outputs = run(**inputs)
        yield inputs, outputs


def _output(outputs: Any, name: str) -> torch.Tensor:
    import torch

    named = dict(outputs) if isinstance(outputs, Mapping) else vars(outputs)
    if name not in named:
        raise DataError(
            f"The metric reads the output `{name}`, and the model gives {', '.join(named)}.",
            "Load the model for another task, or choose another metric.",
        )
    tensor = torch.as_tensor(named[name])
    if tensor.isnan().any():
        bad = int(tensor.isnan().sum())
        raise Unproved(
            f"The output `{name}` has {bad} NaN, of {tensor.numel()} values.", "Look at the model."
        )
    return tensor


def _labelled(evaluation: Evaluation) -> tuple[list[Any], list[Any]]:
    """Labels and examples, as many as are asked for."""
    examples = read_examples(evaluation)
    labels = labels_of(evaluation, examples)
    both = spread(list(zip(labels, examples, strict=True)), evaluation.samples)
    return [label for label, _ in both], [example for _, example in both]


def _numbers(labels: Sequence[Any], evaluation: Evaluation) -> torch.Tensor:
    import torch

    try:
        return torch.tensor([float(label) for label in labels], dtype=torch.float64)
    except ValueError as error:
        where = f"The column `{evaluation.label}` of {evaluation.path or evaluation.dataset}"
        raise DataError(
            f"{where} holds something that is no number: {error}.", "Name another `label`."
        ) from error
