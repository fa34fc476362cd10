from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Before a kernel is defined: without a GPU, Triton's run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from cuda_on_cpu.launcher import Launcher
from triton.runtime import interpreter

from gankern import _cuda, backend, workspace
from gankern.nn import stretch
from gankern.ops.gradient_penalty import autograd, small
from gankern.ops.minibatch_discrimination import autograd as pairs

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A kernel's argument as the end of a range: Triton's own way is an error with numpy 2.4."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A kernel's argument as the end of a range: Triton's own way is an error with numpy 2.4."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A kernel's argument as the end of a range: Triton's own way is an error with numpy 2.4."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton patches its language at each call of a helper, which takes most of the time: once is enough.
    interpreter._patch_lang(triton.language.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


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
        monkeypatch.setattr(stretch, "_FEW_PRODUCTS", 0)
        monkeypatch.setattr(pairs, "_FEW_DIFFERENCES", 0)


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
