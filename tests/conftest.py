from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Before a kernel is defined: without a GPU, Triton's run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_on_cpu.launcher import Launcher
from triton import language as tl
from triton.runtime import interpreter

from gankern import _cuda, backend, workspace
from gankern.ops.gradient_penalty import autograd, small

fuse = importlib.import_module("gankern.nn.fuse")

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A kernel's argument as the end of a range: Triton's own way is an error with numpy 2.4."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(self: Any, a: Any, b: Any, *args: Any) -> Any:
    """Triton's own multiplies the bits, as integers."""
    if str(a.dtype) == "bf16":
        wide = [(x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
        a, b = (interpreter.TensorHandle(x, tl.float32) for x in wide)
    return _create_dot(self, a, b, *args)


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates holds NaN, so that an element it never writes shows."""
    if {"ops", "nn", "optim"} & set(request.path.parts):
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(workspace, "_empty", _poisoned(workspace._empty))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small: kernels run in them all the same, but where the choice by size is tested."""
    if request.node.get_closest_marker("by_size") is None:
        monkeypatch.setattr(small, "is_small", lambda *args: False)
        monkeypatch.setattr(autograd, "_FEW_VALUES", 0)
        monkeypatch.setattr(fuse, "_FEW_PRODUCTS", 0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(
    params=[
        pytest.param(("triton", "cpu"), id="triton-interpreter"),
        pytest.param(("cuda", "cpu"), id="cuda-on-cpu"),
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
