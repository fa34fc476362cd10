"""What every op is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gankern import _triton, backends

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cuts(dtype: torch.dtype) -> bool:
    """Whether results are cut off where a GPU rounds them, as Triton's interpreter does to bfloat16."""
    return dtype == torch.bfloat16 and _triton.interprets() and backends.requested() == "triton"


def assert_as_accurate(ours: Tensor, stock: Tensor, exact: Tensor, what: str = "", units: float = 1) -> None:
    """Error at most twice stock's against float64, above what is nobody's fault: stock's may be small by luck.

    That is so many units in the last place of the result, and a few of the type that it is computed in.
    """
    assert ours.dtype == stock.dtype, (what, ours.dtype, stock.dtype)
    assert ours.shape == exact.shape, (what, ours.shape, exact.shape)
    assert exact.dtype == torch.float64
    if ours.dtype == torch.float64:
        # Stock is itself the oracle, whose own error is unknown.
        floor = 1000 * torch.finfo(torch.float64).eps
    else:
        floor = (3 if cuts(ours.dtype) else units) * torch.finfo(ours.dtype).eps + 4 * torch.finfo(torch.float32).eps
    error, allowed = ((t.double() - exact).norm() for t in (ours, stock))
    assert error <= 2 * allowed + floor * exact.norm(), f"{what}: error {error:.2e}, stock's {allowed:.2e}"


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout that a caller may hand over."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1) + 1)
    wide[..., 1::2] = tensor
    backward = tensor.permute(*range(tensor.dim() - 1, -1, -1)).contiguous()
    found = {
        "contiguous": tensor.contiguous(),
        "sliced": wide[..., 1::2],
        "transposed": backward.permute(*range(tensor.dim() - 1, -1, -1)),
        "expanded": tensor[:1].expand_as(tensor),
    }
    if tensor.dim() == 4:
        found["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    return found


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output of a function and the gradients of its inputs for an incoming gradient, in the inputs' layouts."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
