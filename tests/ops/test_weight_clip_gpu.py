"""Weight clipping and RMSProp by the kernels of the GPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn

import gankern
from gankern import _cuda
from gankern.ops.weight_clip import autograd, cuda

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the sizes of a pack, a block's threads and a chunk.
SHAPES = [(5, 7), (1,), (0,), (4096,), (4097,), (3, 4, 2, 2), (9001,)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"centered": True, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.5},
]


def given(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    # The last starts at no multiple of a pack.
    storage = torch.randn(300, device=device).to(dtype)
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES] + [storage[3:260]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.4])
def test_rmsprop_is_as_accurate_as_stock(
    gpu: torch.device, dtype: torch.dtype, options: dict[str, Any], clip: float | None
) -> None:
    options = {"lr": 0.05, "eps": 1e-3, **options}
    sides: list[tuple[list[Tensor], Any]] = []
    start = given(dtype, gpu)
    for kind in (dtype, dtype, torch.float64):
        params = [p.to(kind, copy=True).requires_grad_() for p in start]
        own = not sides
        make: Any = gankern.optim.RMSprop if own else torch.optim.RMSprop
        sides.append((params, make(params, **options, **({"clip": clip} if own else {}))))
    for _ in range(3):
        grads = [torch.randn_like(p) for p in start]
        for params, optimizer in sides:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
            if clip is not None:
                with torch.no_grad():
                    [p.clamp_(-clip, clip) for p in params]
    names = ["square_avg"] + ["grad_avg"] * ("centered" in options) + ["momentum_buffer"] * ("momentum" in options)
    for name in ("param", *names):
        found = [
            torch.cat([(p if name == "param" else optimizer.state[p][name]).detach().flatten() for p in params])
            for params, optimizer in sides
        ]
        assert_as_accurate(*found, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_has_the_bits_of_clamp(gpu: torch.device, dtype: torch.dtype) -> None:
    params = given(dtype, gpu)
    params[0].view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    want = [p.clamp(-0.5, 0.5) for p in params]
    around = params[-1].as_strided((300,), (1,), 0).clone()
    gankern.clip_weights_(params, 0.5)
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=0, equal_nan=True)
    whole = params[-1].as_strided((300,), (1,), 0)
    assert torch.equal(whole[:3], around[:3])
    assert torch.equal(whole[260:], around[260:])


def test_layouts_and_lists_that_a_kernel_cannot_walk(gpu: torch.device) -> None:
    dense = torch.randn(6, 5, device=gpu).t()
    sliced = torch.randn(8, 6, device=gpu)[:, ::2]
    want = [dense.clamp(-0.1, 0.1), sliced.clamp(-0.1, 0.1)]
    gankern.clip_weights_([dense, sliced], 0.1)
    assert torch.equal(dense, want[0])
    assert torch.equal(sliced, want[1])


def test_steps_follow_new_memory(gpu: torch.device) -> None:
    """Other gradients, other parameters and freed memory must be seen."""
    model = nn.Linear(7, 9).to(gpu)
    stock = copy.deepcopy(model)
    ours = gankern.optim.RMSprop(model.parameters(), lr=0.1, clip=0.3)
    theirs = torch.optim.RMSprop(stock.parameters(), lr=0.1)
    for step in range(4):
        for p, q in zip(model.parameters(), stock.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 0.1 / (step + 2)
        for p, q in zip(model.parameters(), stock.parameters(), strict=True):
            q.data.clamp_(-0.3, 0.3)
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_learning_rate_and_bound_on_the_device(gpu: torch.device, momentum: float) -> None:
    start = [torch.randn(5, device=gpu), torch.randn(4100, device=gpu)]
    sides = [[p.clone() for p in start] for _ in range(3)]
    grads = [torch.randn_like(p) for p in start]
    buffers: list[list[Tensor]] = [[torch.zeros_like(p) for p in start] if momentum else [] for _ in range(3)]
    averages = [[torch.ones_like(p) for p in start] for _ in range(3)]
    lr, clip = torch.tensor(0.25, device=gpu), torch.tensor(0.75, device=gpu, dtype=torch.float64)
    options = (0.9, 1e-3, 0.0, momentum, False)
    run: Any = autograd.rmsprop_clip_
    run(sides[0], grads, averages[0], [], buffers[0], 0.25, *options, 0.75)
    run(sides[1], grads, averages[1], [], buffers[1], 0.0, *options, 0.0, lr, clip)
    with gankern.backend("reference"):
        run(sides[2], grads, averages[2], [], buffers[2], 0.0, *options, 0.0, lr, clip)
    torch.testing.assert_close(sides[1], sides[0], rtol=0, atol=0)
    torch.testing.assert_close(sides[2], sides[0])


def test_more_tensors_than_a_launch_takes(gpu: torch.device) -> None:
    """As many elements as two chunks among them, and empty ones, in any order."""
    sizes = [3 + i % 7 if i % 11 else (0, 4097, 9000)[i % 3] for i in range(150)]
    params = [torch.randn(size, device=gpu) for size in sizes]
    stock = [p.clone().requires_grad_() for p in params]
    want = [p.clamp(-0.5, 0.5) for p in params]
    gankern.clip_weights_(params, 0.5)
    assert all(torch.equal(p, w) for p, w in zip(params, want, strict=True))
    ours = [p.detach().clone().requires_grad_() for p in stock]
    for side in (stock, ours):
        for i, p in enumerate(side):
            p.grad = torch.full_like(p, 1.0 + i)
    torch.optim.RMSprop(stock, lr=0.1).step()
    gankern.optim.RMSprop(ours, lr=0.1).step()
    torch.testing.assert_close(ours, stock)


def test_a_launch_holds_all_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph may be replayed after anything that the host kept is gone: nothing is copied to the device."""
    launched: list[Any] = []
    monkeypatch.setattr(_cuda, "launcher", lambda *call: launched.append(call))
    params, grads, averages = ([torch.randn(n) for n in (5, 4097)] for _ in range(3))
    with monkeypatch.context() as patched, gankern.backend("cuda"):
        for name in ("tensor", "empty", "empty_like"):
            patched.setattr(torch, name, lambda *args, **kwargs: pytest.fail("allocates"))
        autograd.rmsprop_clip_(params, grads, averages, [], [], 0.1, 0.9, 1e-3, 0.0, 0.0, False, None)
    (_, grid, _, (struct, *_), *_) = launched[0]
    (lists,) = np.frombuffer(struct, cuda._LISTS)
    assert grid == (3, 1, 1)
    assert lists["at"][:3, :2].tolist() == [[t.data_ptr() for t in row] for row in (params, grads, averages)]
    assert (lists["sizes"][:2].tolist(), lists["first"][:2].tolist(), lists["count"]) == ([5, 4097], [0, 1], 2)
    assert len(struct) + 13 * 8 <= 4096, "a kernel's arguments"
