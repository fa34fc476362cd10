"""What a step does, as opposed to how long it takes: operations, bytes, calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gankern import _phases, backends
from gankern.profile.formulas import KERNEL_FLOPS


class Work(NamedTuple):
    """Amounts up to some moment.

    Attributes
    ----------
    flops : int
        Operations of products and convolutions.
    bytes : int
        Read and written by each operator: its tensors, each once.
    calls : int
        Operators that do something, views left out.
    allocated : int
        Bytes of new tensors, those in gankern's workspace left out.
    """

    flops: int
    bytes: int
    calls: int
    allocated: int


class _NoModules:
    """In the place of FlopCounterMode's tracker, whose hooks on all modules would keep fused models from fusing."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...


class _Flops(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie apart in memory: an expanded dimension has one."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= extent if stride or not extent else 1
    return size


def _allocated(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    known = {t.untyped_storage().data_ptr() for t in inputs}
    fresh = {s.data_ptr(): s for t in outputs if (s := t.untyped_storage()).data_ptr() not in known}
    # Storages that somebody else owns cannot be resized.
    return sum(storage.nbytes() for storage in fresh.values() if storage.resizable())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class WorkCounter(TorchDispatchMode):
    """Counts inside a ``with`` block; `read` tells the amounts so far."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = _Flops()
        self._bytes = self._calls = self._allocated = self._kernel_flops = 0
        self._in_kernel = False
        self._dtypes: Counter[torch.dtype] = Counter()

    def read(self) -> Work:
        return Work(self._flops.get_total_flops() + self._kernel_flops, self._bytes, self._calls, self._allocated)

    @property
    def dtype(self) -> torch.dtype:
        """Of most operations."""
        return self._dtypes.most_common(1)[0][0] if self._dtypes else torch.float32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._flops.get_total_flops()
        result = func(*args, **kwargs)
        if not self._in_kernel:
            self._note(func, args, kwargs, result, self._flops.get_total_flops() - before)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, flops: int) -> None:
        if func.is_view or func.namespace == "prim" or func.__name__.startswith(("detach", "_unsafe_view")):
            return
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        self._allocated += _allocated(inputs, outputs)
        if func.__name__.startswith(("empty", "new_empty")):
            return
        given = dict(zip((spec.name for spec in func._schema.arguments), args, strict=False)) | kwargs
        changes = {spec.name for spec in func._schema.arguments if spec.alias_info and spec.alias_info.is_write}
        changed = _tensors([value for name, value in given.items() if name in changes])
        fresh = [t for t in outputs if not any(t is c for c in changed)]
        self._add(inputs + fresh, changed, flops)

    def _add(self, read_or_made: list[Tensor], changed: list[Tensor], flops: int) -> None:
        self._calls += 1
        self._bytes += sum(map(_bytes, read_or_made)) + sum(map(_bytes, changed))
        if flops:
            self._dtypes[read_or_made[0].dtype] += flops

    def kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """An adapter's function, counted as one operator whatever it is made of."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel:
                return function(*args, **kwargs)
            before = self._flops.get_total_flops()
            self._in_kernel = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._in_kernel = False
            # Those of torch's operators that it is made of are in the formula.
            self._kernel_flops -= self._flops.get_total_flops() - before
            inputs, outputs = _tensors((args, kwargs)), _tensors(result)
            self._allocated += _allocated(inputs, outputs)
            if name == "room" or all(any(t is i for i in inputs) for t in outputs):
                return result
            flops = KERNEL_FLOPS[name](result, *args) if name in KERNEL_FLOPS else 0
            self._kernel_flops += flops
            self._add(inputs + outputs, [], flops)
            return result

        return run


class _Wrapped:
    """An adapter whose functions are wrapped, each as it is asked for."""

    def __init__(self, adapter: Any, wrap: Callable[[str, Callable[..., Any]], Any]) -> None:
        self._adapter, self._wrap = adapter, wrap

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._adapter, name)
        return self._wrap(name, value) if callable(value) and name != "refuse" else value


def _layers_wrapped(wrap: Callable[[str, Callable[..., Any]], Any]) -> AbstractContextManager[None]:
    return backends.wrapped("critic_layers", lambda adapter: _Wrapped(adapter, wrap))


@contextmanager
def counting() -> Iterator[WorkCounter]:
    """Count what runs inside, gankern's kernels included; what is compiled runs eagerly, since modes see no graph."""
    counter = WorkCounter()
    layers = _layers_wrapped(counter.kernel)
    _phases.inline = True
    try:
        with torch.compiler.set_stance("force_eager"), layers, counter._flops, counter:
            yield counter
    finally:
        _phases.inline = False


def traced() -> AbstractContextManager[None]:
    """Show gankern's kernels in torch's profiler, those too that no operator of the dispatcher calls."""
    return _layers_wrapped(_spanned)


def _spanned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"gankern::{name}"):
            return function(*args, **kwargs)

    return run
