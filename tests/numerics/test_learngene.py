"""The least-squares line through the tensors of a stack."""

import pytest
import torch

from compress.numerics.learngene import Line, fit_line, on_line


@pytest.mark.parametrize("count", [2, 3, 12])
def test_a_line_is_recovered(count):
    torch.manual_seed(0)
    line = Line(torch.randn(5, 7), torch.randn(5, 7))
    fit = fit_line([line.at(place, count) for place in range(count)])
    torch.testing.assert_close(fit.line.base, line.base, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.line.slope, line.slope, rtol=0, atol=2e-5)
    assert fit.r2 == pytest.approx(1)
    assert fit.error == pytest.approx(0, abs=1e-12)


def test_it_is_the_least_squares_solution():
    torch.manual_seed(0)
    stack = torch.randn(6, 4, 3, dtype=torch.float64)
    design = torch.stack([torch.ones(6), torch.arange(6) / 6], 1).double()
    solution = torch.linalg.lstsq(design, stack.flatten(1)).solution
    fit = fit_line(list(stack))
    torch.testing.assert_close(fit.line.base, solution[0].reshape(4, 3))
    torch.testing.assert_close(fit.line.slope, solution[1].reshape(4, 3))
    residual = (stack.flatten(1) - design @ solution).square().sum()
    assert fit.error == pytest.approx(float(residual / stack.square().sum()))
    assert fit.r2 == pytest.approx(float(1 - residual / (stack - stack.mean(0)).square().sum()))


def test_noise_is_a_poor_fit():
    torch.manual_seed(0)
    # A line through 12 independent values explains one of their 11 degrees of freedom.
    assert fit_line(list(torch.randn(12, 100, 100))).r2 == pytest.approx(1 / 11, abs=0.005)


def test_a_single_tensor_and_equal_ones_fit():
    one = torch.randn(3)
    for tensors in ([one], [one] * 4, [torch.zeros(3)] * 2):
        fit = fit_line(tensors)
        torch.testing.assert_close(fit.line.base, tensors[0])
        assert fit.line.slope.abs().max() < 1e-6
        assert (fit.r2, fit.error) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


def test_types_stay_and_one_operation_makes_a_block():
    tensors = [torch.randn(3).bfloat16() for _ in range(3)]
    line = fit_line(tensors).line
    assert line.base.dtype == line.slope.dtype == torch.bfloat16
    assert line.at(1, 3).dtype == torch.bfloat16
    assert torch.equal(line.at(0, 3), line.base)
    assert torch.equal(line.at(1, 2), on_line(line.base, line.slope, 0.5))
