"""The gradient penalty by the kernels of the GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate, layouts
from torch import Tensor

from gankern import _triton, backends
from gankern.ops.gradient_penalty import autograd, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around a pack, a warp, a block's threads and a chunk.
SHAPES = [(1, 1), (3, 17), (5, 3, 7, 5), (2, 256), (3, 4096), (2, 9001)]
TAILS = [(10.0, 1.0, False, False), (3.0, 3.0, True, False), (0.5, 9.0, True, True), (1.0 / 3, 0.0, False, False)]


def adapter(*tensors: Tensor) -> Any:
    return backends.select("gradient_penalty", *tensors)


def units(dtype: torch.dtype) -> float:
    """Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 3 if dtype == torch.bfloat16 and _triton.interprets() else 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_as_accurate_as_stock(gpu: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape[1:])
    # Norms about the one-sided target; in float16 larger ones overflow.
    real, fake = (torch.randn(shape, device=gpu, dtype=torch.float64).mul(3 / size**0.5).to(dtype) for _ in range(2))
    alpha = torch.rand(shape[0], device=gpu)
    kinds = (dtype, torch.float64)
    stock, exact = (reference.interpolate(real.to(k), fake.to(k), alpha) for k in kinds)
    points = adapter(real).interpolate(real, fake, alpha)
    assert_as_accurate(points, stock, exact, "interpolate", units(dtype))
    for options in TAILS:
        results = (reference.tail(real.to(k), *options) for k in kinds)
        for got, s, e in zip(adapter(real).tail(real, *options), *results, strict=True):
            assert_as_accurate(got, s, e, f"tail {options}", units(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_interpolation_has_the_bits_of_torch(gpu: torch.device, dtype: torch.dtype) -> None:
    real, fake = torch.randn(2, 5, 4099, device=gpu, dtype=dtype)
    alpha = torch.rand(5, device=gpu, dtype=dtype)
    assert torch.equal(autograd.interpolate(real, fake, alpha), reference.interpolate(real, fake, alpha))


def test_layouts(gpu: torch.device) -> None:
    real, fake = torch.randn(2, 3, 4, 5, 2, device=gpu)
    alpha = torch.rand(3, device=gpu)
    names = layouts(real)
    for first, second in itertools.product(names, names):
        a, b = layouts(real)[first], layouts(fake)[second]
        points = adapter(a, b).interpolate(a, b, alpha)
        torch.testing.assert_close(points, reference.interpolate(a, b, alpha))
        assert points.is_contiguous(memory_format=torch.channels_last) == (first == "channels_last")
    for name, grad in layouts(real).items():
        for got, want in zip(adapter(grad).tail(grad, *TAILS[0]), reference.tail(grad, *TAILS[0]), strict=True):
            torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("options", TAILS, ids=str)
def test_a_zero_gradient_has_the_subgradient_0(gpu: torch.device, options: tuple[Any, ...]) -> None:
    grad = torch.randn(3, 7, device=gpu)
    grad[1] = 0
    loss, cotangent = adapter(grad).tail(grad, *options)
    assert cotangent[1].eq(0).all()
    assert loss.isfinite()
    grad[0, 3] = float("nan")
    loss, cotangent = adapter(grad).tail(grad, *options)
    assert loss.isnan()
    assert cotangent[2].isfinite().all()
    assert options[3] or cotangent[0].isnan().all()


def test_many_samples_and_chunks(gpu: torch.device) -> None:
    """More samples and partial sums than a block adds up at a time."""
    for shape in ((300, 3), (1, 270_000 if _triton.interprets() and backends.requested() == "triton" else 1_060_000)):
        grad = torch.randn(shape, device=gpu, dtype=torch.float64)
        for got, want in zip(adapter(grad).tail(grad, *TAILS[0]), reference.tail(grad, *TAILS[0]), strict=True):
            torch.testing.assert_close(got, want)
