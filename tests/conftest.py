from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Before torch is loaded: threads that wait for others leave the processor to other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# To make a plan takes a second: only tests about plans do, also in processes that tests start.
os.environ["GANKERN_PLAN"] = "0"

import torch

# Before a kernel is defined: without a GPU, Triton's run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from browser import chromium  # noqa: F401 a fixture
from cuda_on_cpu.launcher import Launcher
from triton_interpreter import mend

from gankern import _cuda, _native, backend, dispatch, workspace
from gankern.compiler import planning
from gankern.compiler.choice import everywhere
from gankern.ops.conv_act import cpu as conv_cpu
from gankern.ops.gradient_penalty import autograd, small
from gankern.ops.minibatch_discrimination import small as few_pairs

if os.environ.get("TRITON_INTERPRET") == "1":
    mend()

# Values drawn at import name tests, which are to be the same in each process that runs a part of them.
torch.manual_seed(0)
# As many on every machine, where several processes share it.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first, so that no process ends long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is loaded and collected stays: no garbage collection goes through it again."""
    import torch._dynamo
    import torch.fx.experimental.proxy_tensor  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny work that is timed: on several threads it waits for the slowest of them on a busy machine."""
    threads = torch.get_num_threads()
    if {"bench", "profile"} & set(request.path.parts):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates holds NaN, so that an element it never writes shows."""
    if {"ops", "nn", "optim"} & set(request.path.parts):
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    if {"ops", "nn", "optim", "compiler"} & set(request.path.parts):
        monkeypatch.setattr(workspace, "_empty", _poisoned(workspace._empty))


@pytest.fixture(autouse=True)
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small: kernels run in them all the same, but where the choice by size is tested."""
    if request.node.get_closest_marker("by_size") is None:
        monkeypatch.setattr(small, "is_small", lambda *args: False)
        monkeypatch.setattr(autograd, "_FEW_VALUES", 0)
        monkeypatch.setattr(_native, "_FEW_ELEMENTS", 0)
        monkeypatch.setattr(few_pairs, "_FEW_DIFFERENCES", 0)
        monkeypatch.setattr(conv_cpu, "_LEAVES_THIN", False)
        monkeypatch.setattr(dispatch, "goes_by_size", lambda device, captured=False: False)


@pytest.fixture(autouse=True)
def plans(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name not in ("compiler", "nn"):
        with planning(False):
            yield
        return
    by_size = request.node.get_closest_marker("by_size") is not None
    with planning(True), contextlib.nullcontext() if by_size else everywhere():
        yield


@pytest.fixture(params=[int(n) for n in os.environ.get("GANKERN_TEST_THREADS", "1 2").split()])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(
    params=[
        pytest.param(("triton", "cpu"), id="triton-interpreter"),
        pytest.param(("cuda", "cpu"), id="cuda-on-cpu", marks=pytest.mark.cuda_on_cpu),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A backend of the GPU is in force: on the GPU, or without one in Triton's interpreter and by cuda_on_cpu.

    Yields the device that its tensors are to be on.
    """
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if (name, device) == ("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off where there is a GPU")
    if (name, device) == ("cuda", "cpu"):
        monkeypatch.setattr(_cuda, "launcher", Launcher())
    with backend(name):
        yield torch.device(device)
