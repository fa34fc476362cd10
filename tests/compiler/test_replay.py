"""Programs compute what their graphs do, and keep large intermediates in the workspace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gankern import _native, workspace
from gankern.compiler.passes.layout import turned
from gankern.compiler.replay import compile_graph

needs_kernels = pytest.mark.skipif(_native.kernels is None, reason="needs the extension")
LAST = torch.channels_last


def padded(x: Tensor) -> Tensor:
    return F.pad(F.pad(x, (1, 2, -1, 3)), (-1, -1), value=2.0)


def written(x: Tensor) -> Tensor:
    y = (x * 3).mul_(2)
    rows = y.flatten(2)
    return (rows + 1).view(x.shape) + F.relu_(y) + rows.view(x.shape)


def layouts(x: Tensor) -> Tensor:
    y = F.elu(x.contiguous(memory_format=LAST))
    return turned(y, tuple(x.stride())) + y.to(torch.float64).to(x.dtype)


FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: torch.where(F.relu(x) > 0.1, F.silu(x) * 2, x.abs()),
    "products": lambda x: F.softmax(x.flatten(1) @ x.flatten(1).t() @ x.flatten(1), 1),
    "pads": padded,
    "layouts": layouts,
    "sizes": lambda x: torch.cat([F.avg_pool2d(F.interpolate(x, scale_factor=2.0), 2), x], 1),
    "kept": lambda x: (h := F.elu(x)) * 2 + h.flatten(1).mean() + h.transpose(2, 3),
    "read twice": lambda x: (h := x + 1).exp() * h * h.flatten().view(x.shape).sin(),
    "given": lambda x: (x.flatten() + 1).view(x.shape).tanh() * x[:, :1].relu() + x,
    "written": written,
    "no room": lambda x: torch.fft.rfft2(x).abs() + x.new_tensor(1.0).expand(1, 8, 64, 33),
}


def program(forward: Callable[[Tensor], Tensor], x: Tensor, **options: bool) -> Callable[..., list[Tensor]]:
    """Of the forward's result, and of what it is made of: twice itself."""

    def outputs(given: Tensor) -> list[Tensor]:
        made = forward(given)
        return [made.mean(), made * 2]

    run: Callable[..., list[Tensor]] = compile_graph(make_fx(outputs, tracing_mode="fake")(x), **options)
    return run


@pytest.mark.parametrize("order", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("name", FORWARDS)
def test_each_run_computes_the_graph(name: str, order: torch.memory_format) -> None:
    x = torch.randn(8, 8, 64, 64).to(memory_format=order)
    x[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    run = program(FORWARDS[name], x)
    want = FORWARDS[name](x) * 2
    for _ in range(3):
        got = run(x)[1]
        assert torch.equal(got.nan_to_num(), want.nan_to_num()) and got.stride() == want.stride()


@needs_kernels
@pytest.mark.parametrize("name", ("elementwise", "products", "pads", "sizes"))
def test_large_results_lie_in_the_workspace_from_the_second_run_on(name: str) -> None:
    x = torch.randn(8, 8, 64, 64)
    run = program(FORWARDS[name], x)
    before = workspace.used_bytes()
    for used in (False, True, True):
        found = run(x)
        assert (workspace.used_bytes() > before) is used
        if used:
            assert workspace.used_bytes() - before >= found[1].nbytes
        del found
        assert workspace.used_bytes() == before


@needs_kernels
def test_results_lie_where_an_argument_lay_that_nobody_reads() -> None:
    x = torch.randn(8, 8, 64, 64)
    run = program(lambda x: F.silu(F.elu(x) * 2).tanh().abs() + 1, x)
    run(x)
    before = workspace.idle_bytes()
    workspace.release()
    run(x)
    assert workspace.idle_bytes() <= 2 * x.nbytes, before


@needs_kernels
def test_nobody_else_has_the_memory_of_a_result_that_is_kept() -> None:
    x = torch.randn(8, 8, 64, 64)
    run = program(FORWARDS["elementwise"], x)
    run(x)
    kept = run(x)[1]
    then = kept.clone()
    run(torch.zeros_like(x))
    assert torch.equal(kept, then)


def test_the_output_is_a_tensor_of_torch_which_can_be_resized() -> None:
    x = torch.randn(8, 8, 64, 64)
    run = compile_graph(make_fx(lambda x: [F.elu(F.elu(x)), x * 2], tracing_mode="fake")(x))
    for _ in range(2):
        assert run(x)[0].resize_(1 << 20).numel() == 1 << 20
