"""Records one forward as a graph, and what it depended on."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gankern.nn.tracing.guards import MISSING, Container, Guards, holds
from gankern.nn.tracing.proxies import Proxy
from gankern.nn.tracing.values import Leaf, Untraceable, check_defaults, in_library, is_constant, is_simple
from gankern.nn.tracing.vetting import Watch


class _OnlyRecorded(TorchFunctionMode):
    """Lets no function run that does not go into the trace: it would make a constant, or use up random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(t, fx.Proxy) for t in types):
            raise Untraceable(f"it calls {getattr(func, '__name__', func)} on nothing that it was given")
        return func(*args, **(kwargs or {}))


class Tracer(fx.Tracer):
    """Traces one forward; children are called, not traced into.

    Parameters
    ----------
    guards : Guards
        Where to record what the trace depends on.
    """

    proxy_buffer_attributes = True

    def __init__(self, guards: Guards) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.guards = guards
        self.types: dict[str, type] = {}
        self._containers: list[Container] = []
        self._may_return_none = False
        self._thread = threading.get_ident()

    def trace_call(self, root: nn.Module, forward: FunctionType, args: Any, kwargs: Any) -> fx.Graph:
        """The graph of ``forward(root, *args, **kwargs)``, its tensors in the order of `flatten` as placeholders."""
        self._call = forward, args, kwargs
        self.guards.add_children(root)
        return self.trace(root)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        forward, args, kwargs = self._call
        args, kwargs = self._placeholders(args), self._placeholders(kwargs)

        def call() -> Any:
            before, watch = sys.getprofile(), Watch(self, forward)
            try:
                with _OnlyRecorded():
                    sys.setprofile(watch)
                    try:
                        output = forward(self.root, *args, **kwargs)
                    finally:
                        sys.setprofile(before)
            finally:
                changed = [container.restore() for container in reversed(self._containers)]
            if any(changed) or any(holds(output, container.value) for container in self._containers):
                raise Untraceable("it changes or returns a list or dict that it did not make")
            if watch.asks_for_none and self._may_return_none:
                raise Untraceable("it asks whether something is None, and calls a module that may return that")
            return output

        return call, []

    def _placeholders(self, value: Any) -> Any:
        if isinstance(value, Leaf):
            proxy = self.create_proxy("placeholder", f"input_{len(self.types)}", (), {})
            self.types[proxy.node.name] = value.type
            return proxy
        if type(value) is tuple:
            return tuple(map(self._placeholders, value))
        if type(value) is list:
            value = list(map(self._placeholders, value))
        elif type(value) is dict:
            value = {k: self._placeholders(v) for k, v in value.items()}
        else:
            return value
        self._containers.append(Container(value, copy.copy(value)))
        return value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    # fx patches nn.Module for all threads; only this one traces.
    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not all(_from_torch(module) for module in m.modules()):
            self._may_return_none = True
            if _has_container((args, kwargs)):
                raise Untraceable(f"it gives a list or dict to {self.path_of_module(m)}, which may change it")
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        if isinstance(attr_val, Tensor):
            tensors = [*self.root.named_parameters(remove_duplicate=False)]
            tensors += self.root.named_buffers(remove_duplicate=False)  # type: ignore[arg-type]
            if sum(t is attr_val for _, t in tensors) > 1:
                raise Untraceable(f"it reads {attr}, which has more than one name")
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        known = kind in (tuple, list, dict, slice, range, torch.Size) or issubclass(kind, (fx.Proxy, fx.Node))
        named = issubclass(kind, tuple) and hasattr(a, "_fields")
        # fx would keep other tensors as constants, and set them as attributes of the module.
        tensor = isinstance(a, Tensor) and (
            any(a is p for p in self.root.parameters()) or any(a is b for b in self.root.buffers())
        )
        if not (known or named or tensor or is_simple(a)):
            what = "a tensor that is no parameter or buffer" if isinstance(a, Tensor) else f"a {kind.__name__}"
            raise Untraceable(f"it passes on {what}")
        return super().create_arg(a)

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Record that the forward read an attribute, or found none."""
        if value is MISSING:
            self._read_missing(module, name)
        elif name == "_modules":
            self.guards.add_children(module)
        elif isinstance(getattr(type(module), name, None), property) or isinstance(value, fx.Proxy):
            pass  # what it is made of is recorded by itself
        elif isinstance(value, MethodType) and value.__self__ is module and name not in module.__dict__:
            check_defaults(value.__func__)  # what it does is watched when it is called
            self.guards.names.append((module.__dict__, name, MISSING))
            self.guards.attributes.append((type(module), name, value.__func__))
        elif type(value) is list and all(map(is_simple, value)):
            self.guards.lists.append((module, name, list(value)))
            self._containers.append(Container(value, list(value)))
        elif is_constant(value):
            self.guards.attributes.append((module, name, value))
        else:
            raise Untraceable(f"it reads {self._name(module)}.{name}, a {type(value).__name__}, that may change")

    def _read_missing(self, module: nn.Module, name: str) -> None:
        if name in module._modules:
            self.guards.add_children(module)
            return
        for tensors in (module._parameters, module._buffers):
            if tensors.get(name) is not None:
                self.guards.present.append((tensors, name))
                return
        value = None if name in module._parameters or name in module._buffers else MISSING
        self.guards.attributes.append((module, name, value))

    def _name(self, module: nn.Module) -> str:
        path = (self.submodule_paths or {}).get(module)
        return f"self.{path}" if path else "self"


def _has_container(value: Any) -> bool:
    """Whether a list or dict is among a call's arguments."""
    args, kwargs = value

    def has(value: Any) -> bool:
        return type(value) in (list, dict) or (type(value) is tuple and any(map(has, value)))

    return any(map(has, (*args, *kwargs.values())))


def _from_torch(module: nn.Module) -> bool:
    """Whether a module's forward is one of torch's, or stands for one."""
    own = "forward" in module.__dict__
    return not own and type(module).forward.__module__.startswith(("torch.nn.", "gankern.nn.stretch"))


_lock = threading.Lock()


@contextmanager
def _recording(tracer: Tracer) -> Iterator[None]:
    """Has `Tracer.read` called for what user code of this thread reads of modules."""
    thread = threading.get_ident()

    def __getattribute__(module: nn.Module, name: str) -> Any:
        watched = threading.get_ident() == thread and not in_library(sys._getframe(1))
        try:
            value = get(module, name)
        except AttributeError:
            if watched:
                tracer.read(module, name, MISSING)
            raise
        if watched:
            tracer.read(module, name, value)
        return value

    before = nn.Module.__dict__.get("__getattribute__")
    get = before or object.__getattribute__
    nn.Module.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = before  # type: ignore[method-assign]


def trace(root: nn.Module, forward: Any, args: Any, kwargs: Any, guards: Guards) -> fx.Graph | None:
    """Trace ``forward(root, *args, **kwargs)``, arguments as `flatten` gives them.

    Returns None where this is not the moment: another thread traces, or a mode watches torch's functions.

    Raises
    ------
    Untraceable
        With what stands against it; `guards` has what was read until then.
    """
    if not isinstance(forward, FunctionType):
        raise Untraceable("it is no plain function")
    check_defaults(forward)
    # A default device is a mode as well, that leaves what is recorded alone.
    modes = _get_current_function_mode_stack()
    if any(type(mode) is not DeviceContext for mode in modes) or not _lock.acquire(blocking=False):
        return None
    tracer = Tracer(guards)
    try:
        with _recording(tracer):
            return tracer.trace_call(root, forward, args, kwargs)
    except Untraceable:
        raise
    except Exception as error:  # user code may raise anything when it meets a proxy
        raise Untraceable(str(error).split("\n")[0] or type(error).__name__) from None
    finally:
        _lock.release()
