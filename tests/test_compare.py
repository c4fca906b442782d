"""Parity: what is compared, what is refused."""

import pytest
import torch

from compress.compare import flatten_outputs, forward, lowest_cosine, parity, require_finite
from compress.errors import Unproved


def test_parity_of_equal_outputs_is_zero():
    outputs = {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}
    found = parity(outputs, outputs)
    assert (found.max_abs, found.relative) == (0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)


def test_parity_takes_the_worst_of_all_outputs():
    reference = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 10.0]])}
    found = parity(reference, {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[0.0, 10.5]])})
    assert found.max_abs == pytest.approx(1.0)
    assert found.relative == pytest.approx(1.0)
    assert found.cosine == pytest.approx(0.0)


def test_parity_names_the_missing_output():
    with pytest.raises(Unproved, match="The file has no output `logits`"):
        parity({"logits": torch.ones(1)}, {}, "file")


def test_parity_names_both_shapes():
    with pytest.raises(Unproved, match=r"gives `x` of shape \(2, 3\), not \(2, 4\)"):
        parity({"x": torch.ones(2, 4)}, {"x": torch.ones(2, 3)})


def test_parity_counts_values_that_are_not_finite():
    with pytest.raises(Unproved, match="2 values that are not finite in `x`, of 4"):
        parity({"x": torch.ones(4)}, {"x": torch.tensor([1.0, float("nan"), float("inf"), 1.0])})


def test_parity_lets_the_reference_mask_with_infinity():
    masked = {"x": torch.tensor([1.0, float("-inf")])}
    assert parity(masked, masked).max_abs == 0.0


def test_parity_refuses_a_reference_with_nothing_to_compare():
    with pytest.raises(Unproved, match="the reference has no float output"):
        parity({}, {})


def test_outputs_are_named_by_their_path_and_only_floats_count():
    nested = {
        "a": torch.ones(1),
        "b": (torch.ones(2), [torch.ones(3)]),
        "ids": torch.ones(1).long(),
        "none": None,
    }
    assert {name: len(value) for name, value in flatten_outputs(nested).items()} == {
        "a": 1,
        "b.0": 2,
        "b.1.0": 3,
    }
    assert list(flatten_outputs(torch.ones(1))) == ["output"]


def test_forward_runs_without_gradients():
    outputs = forward(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    assert not outputs["output"].requires_grad


def test_rows_of_zeros_are_equal_to_zeros_and_unlike_anything_else():
    zeros, ones = torch.zeros(1, 2, dtype=torch.double), torch.ones(1, 2, dtype=torch.double)
    assert lowest_cosine(zeros, zeros) == 1.0
    assert lowest_cosine(zeros, ones) == 0.0
    assert lowest_cosine(torch.tensor(1.0), torch.tensor(2.0)) == 1.0


def test_nan_is_refused_and_infinity_is_not():
    require_finite({"x": torch.tensor([float("inf")])}, "model")
    with pytest.raises(Unproved, match="The model gives 1 NaN in `x`, of 2 values"):
        require_finite({"x": torch.tensor([float("nan"), 0.0])}, "model")
