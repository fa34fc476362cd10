"""What every op is held to lets nothing through that is wrong."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_few_units_where_stock_is_lucky_and_no_more(dtype: torch.dtype) -> None:
    exact = torch.linspace(1, 1.9, 100).to(dtype)
    unit = torch.finfo(dtype).eps

    def off(units: float) -> torch.Tensor:
        return exact + units * unit

    few = 4 if dtype == torch.float32 else 1
    assert_as_accurate(off(few), exact, exact.double())
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(off(2 * few + 1), exact, exact.double())
    assert_as_accurate(off(8), off(4), exact.double())
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(off(20), off(5), exact.double())
    with pytest.raises(AssertionError):
        assert_as_accurate(off(0).double(), exact, exact.double())
