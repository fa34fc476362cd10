from __future__ import annotations

import math

import pytest
import torch

from gankern.bench.check import Wrong, compare, relative_error


def test_error_is_relative_in_norm_over_all_tensors():
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.5])], [torch.tensor([3.0]), torch.tensor([4.0])]) == 0.1


def test_none_is_zero():
    assert relative_error([None, None], [torch.zeros(2), None]) == 0
    assert relative_error([None], [torch.ones(2)]) == 1


def test_shapes_and_counts_must_agree():
    assert relative_error([torch.ones(1)], [torch.ones(2)]) == math.inf
    assert relative_error([], [torch.ones(2)]) == math.inf


@pytest.mark.parametrize("value", [1.1, math.nan, math.inf])
def test_a_wrong_value_does_not_pass(value):
    with pytest.raises(Wrong, match="output"):
        compare({"output": [torch.tensor([value])]}, {"output": [torch.ones(1)]}, 1e-2)


def test_a_reference_that_is_not_finite_is_told_apart():
    with pytest.raises(Wrong, match="output: not finite in the reference itself"):
        compare({"output": [torch.ones(1)]}, {"output": [torch.tensor([math.nan])]}, 1e-2)


def test_missing_results_do_not_pass():
    with pytest.raises(Wrong, match="gradient"):
        compare({"output": []}, {"output": [], "gradient": []}, 1e-2)
