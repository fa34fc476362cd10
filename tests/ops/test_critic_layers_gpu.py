"""The critic layers by the kernels of the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

from gankern import _triton, backends
from gankern.ops.critic_layers import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "d2_grad_output", "d2_input", "d2_weight")


def adapter(*tensors: Tensor) -> Any:
    return backends.select("critic_layers", *tensors)


def units(dtype: torch.dtype) -> float:
    """Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 3 if dtype == torch.bfloat16 and _triton.interprets() else 1


def norm_results(module: Any, x: Tensor, grad: Tensor, tangent: Tensor, affine: list[Any], groups: int) -> list[Tensor]:
    """Of layer norm where there are no groups."""
    name, options = ("group_norm", (groups,)) if groups else ("layer_norm", ())
    y, mean, rstd = getattr(module, f"{name}_forward")(x, *affine, *options, 1e-2)
    first = getattr(module, f"{name}_backward")(grad, x, affine[0], mean, rstd, True)
    second = getattr(module, f"{name}_double_backward")(tangent, grad, x, affine[0], mean, rstd, True)
    return [y, *first, *second]


def check_norm(given: tuple[Tensor, ...], affine: list[Any], groups: int, dtype: torch.dtype) -> None:
    def results(module: Any, kind: torch.dtype) -> list[Tensor]:
        params = [None if t is None else t.to(kind) for t in affine]
        return norm_results(module, *(t.to(kind) for t in given), params, groups)

    # The plain formulas in float32 stand for stock in half types, which has none of its own at this precision.
    wide = dtype if dtype == torch.float64 else torch.float32
    sides = results(adapter(given[0]), dtype), results(reference, wide), results(reference, torch.float64)
    for name, g, s, e in zip(NAMES, *sides, strict=True):
        # What cancels leaves rounding errors of the terms, not of the difference.
        floor = e.norm() * 2e-6 + 1e-5 * given[0][0].numel() ** 0.5
        if dtype != torch.float32 or (g.double() - e).norm() > floor:
            assert_as_accurate(g, s.to(dtype), e, f"{name} {dtype}", units(dtype))


# Around packs, a block's threads and the tiles; the largest are slow without a GPU.
ROWS = [*((shape, dtype) for shape in [(2, 37), (3, 16)] for dtype in DTYPES), ((1, 2), torch.float32)]
ROWS += [((2, 1100), torch.float64), ((1, 4300), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_layer_norm_kernels(gpu: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad, tangent = torch.randn(3, *shape, device=gpu).to(dtype)
    for affine in ([None, None], list(torch.randn(2, shape[1], device=gpu).to(dtype))):
        check_norm((x + 3, grad, tangent), affine, 0, dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        *(((2, 6, 37), g) for g in (1, 3, 6)),
        ((1, 70, 3), 35),
        ((1, 2, 1100), 2),
        ((2, 16, 1), 4),
        ((5, 8, 4), 8),
    ],
    ids=str,
)
def test_group_norm_kernels(gpu: torch.device, shape: tuple[int, int, int], groups: int, last: bool) -> None:
    dtypes = DTYPES if groups == 3 else (torch.float64,)
    for dtype in dtypes:
        given = (
            torch.randn(3, *shape, device=gpu)
            .to(dtype)
            .add(torch.tensor([3.0, 0, 0], device=gpu).view(3, 1, 1, 1).to(dtype))
            .unbind()
        )
        if last:
            given = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given)
        for affine in ([None, None], list(torch.randn(2, shape[1], device=gpu).to(dtype))):
            check_norm(given, affine, groups, dtype)


def test_samples_are_parted_for_the_gradients_of_parameters(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several samples a part, the last part with fewer."""
    from gankern.ops.critic_layers import norms

    monkeypatch.setattr(norms, "_BLOCKS", 3)
    for shape, groups in (((10, 37), 0), ((7, 6, 5), 3), ((8, 2, 3), 1)):
        given = torch.randn(3, *shape, device=gpu, dtype=torch.float64).unbind()
        check_norm(given, list(torch.randn(2, shape[1], device=gpu, dtype=torch.float64)), groups, torch.float64)


@pytest.mark.parametrize("name", ["layer", "group"])
def test_norms_take_what_is_not_aligned(gpu: torch.device, name: str) -> None:
    """Arrays that start at no multiple of 16 bytes, gradients in another order, only weights."""
    shape = (3, 16) if name == "layer" else (3, 8, 8)
    size = 3 * 16 if name == "layer" else 3 * 64
    x = torch.randn(size + 1, device=gpu, dtype=torch.float64)[1:].view(shape)
    grad = torch.randn(1, *shape[1:], device=gpu, dtype=torch.float64).expand(shape)
    tangent = torch.randn(shape[::-1], device=gpu, dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))
    groups = 0 if name == "layer" else 2
    affine = [torch.randn(shape[1], device=gpu, dtype=torch.float64), None]
    for a, b in zip(
        norm_results(adapter(x), x, grad, tangent, affine, groups),
        norm_results(reference, x, grad, tangent, affine, groups),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_norms_far_from_zero_and_of_what_is_not_finite(gpu: torch.device) -> None:
    x = torch.randn(4, 40, device=gpu) + 1000
    x[2] = 7.0
    x[3, 5] = float("nan")
    ours, stock, exact = (
        m.layer_norm_forward(t, None, None, 1e-5)[0]
        for m, t in ((adapter(x), x), (reference, x), (reference, x.double()))
    )
    assert_as_accurate(ours[:2], stock[:2], exact[:2])
    assert ours[2].eq(0).all()
    assert ours[3].isnan().all()
    y = x[:, :, None].contiguous()
    grouped = adapter(y).group_norm_forward(y, None, None, 4, 1e-5)[0].flatten(1)
    assert grouped[2].eq(0).all()
    assert torch.equal(grouped[3].isnan().nonzero().flatten().cpu(), torch.arange(10))


def test_same_bits_on_every_run(gpu: torch.device) -> None:
    given = torch.randn(3, 9, 6, 50, device=gpu).unbind()
    affine = list(torch.randn(2, 6, device=gpu))
    first, second = (norm_results(adapter(given[0]), *given, affine, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
