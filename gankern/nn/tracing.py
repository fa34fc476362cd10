"""Symbolic traces of forwards as people write them, which know what they depend on.

A trace freezes what Python decided while it was made. So it is only made of code whose decisions can be told: of what
it reads, each value that may change is recorded and compared at every later call, and what cannot be recorded
(lists, the time, a random number, a side effect) is refused before it is run.
"""

from __future__ import annotations

import copy
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gankern.nn.vetting import Names, Untraceable, Watch, check_defaults, in_library, is_constant, is_simple

_MISSING = object()
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Guards:
    """What a trace depended on.

    Attributes
    ----------
    attributes : list of (object, str, object)
        Attributes of modules that the forward read, and their values.
    present : list of (dict, str)
        Parameters and buffers that were not None.
    children : list of (dict, list of str, list of nn.Module)
        The children of modules, in order.
    lists : list of (object, str, list)
        Attributes that are lists of values, and copies of them.
    names : list of (dict, str, object)
        Global names, and their values.
    """

    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    present: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    children: list[tuple[dict[str, Any], list[str], list[Any]]] = field(default_factory=list)
    lists: list[tuple[Any, str, list[Any]]] = field(default_factory=list)
    names: Names = field(default_factory=list)

    def hold(self) -> bool:
        return (
            all(_same(getattr(owner, name, _MISSING), value) for owner, name, value in self.attributes)
            and all(tensors.get(name) is not None for tensors, name in self.present)
            and all(list(now) == names and list(now.values()) == modules for now, names, modules in self.children)
            and all(_same_list(getattr(owner, name, None), values) for owner, name, values in self.lists)
            and all(_same(namespace.get(name, _MISSING), value) for namespace, name, value in self.names)
        )

    def add_children(self, module: nn.Module) -> None:
        """Of the module and of the lists and dicts among its children."""
        children = module._modules
        if not any(children is seen for seen, *_ in self.children):
            self.children.append((children, list(children), list(children.values())))
            for child in children.values():
                if isinstance(child, _CONTAINERS):
                    self.add_children(child)


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if not is_simple(before) or type(now) is not type(before):
        return False
    return all(map(_same, now, before)) and len(now) == len(before) if type(now) is tuple else now == before


def _same_list(now: Any, before: list[Any]) -> bool:
    return type(now) is list and _same(tuple(now), tuple(before)) if all(map(is_simple, before)) else False


_MAY_BE_NONE = frozenset({"grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks", "__dict__", "__class__"})


class _Recorded:
    """What fx's proxies leave out: in-place operators, and questions about a value's type."""

    node: fx.Node
    tracer: Any

    def _type(self) -> type:
        if in_library(sys._getframe(1)):
            return type(self)
        if self.node.op == "placeholder":
            return self.tracer.types[self.node.name]
        if self.node.op == "get_attr":
            return Tensor
        raise Untraceable("it asks for the type of a computed value")

    __class__ = property(_type)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name in _MAY_BE_NONE or not (hasattr(Tensor, name) or hasattr(torch.Size, name)):
            raise Untraceable(f"it asks a tensor for {name}")
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        if not in_library(sys._getframe(1)):
            raise Untraceable("it makes text of a tensor")
        return fx.Proxy.__repr__(self)  # type: ignore[arg-type]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Recorded, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Proxy(_Recorded, fx.Proxy):
    pass


class _Attribute(_Recorded, Attribute):
    pass


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
        self._containers: list[_Container] = []
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
            if any(changed) or any(_holds(output, container.value) for container in self._containers):
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
        self._containers.append(_Container(value, copy.copy(value)))
        return value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
        if value is _MISSING:
            self._read_missing(module, name)
        elif name == "_modules":
            self.guards.add_children(module)
        elif isinstance(getattr(type(module), name, None), property) or isinstance(value, fx.Proxy):
            pass  # what it is made of is recorded by itself
        elif isinstance(value, MethodType) and value.__self__ is module and name not in module.__dict__:
            check_defaults(value.__func__)  # what it does is watched when it is called
            self.guards.names.append((module.__dict__, name, _MISSING))
            self.guards.attributes.append((type(module), name, value.__func__))
        elif type(value) is list and all(map(is_simple, value)):
            self.guards.lists.append((module, name, list(value)))
            self._containers.append(_Container(value, list(value)))
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
        value = None if name in module._parameters or name in module._buffers else _MISSING
        self.guards.attributes.append((module, name, value))

    def _name(self, module: nn.Module) -> str:
        path = (self.submodule_paths or {}).get(module)
        return f"self.{path}" if path else "self"


@dataclass(frozen=True)
class Leaf:
    """Where a call has a tensor, or a number that the trace leaves open."""

    type: type


@dataclass(frozen=True)
class _Container:
    """A list or dict that the forward was given or read, and what it held."""

    value: Any
    held: Any

    def restore(self) -> bool:
        """Undo what the forward did to it; whether there was something."""
        same = len(self.value) == len(self.held)
        if isinstance(self.value, dict):
            same = same and all(k in self.value and self.value[k] is v for k, v in self.held.items())
        else:
            same = same and all(a is b for a, b in zip(self.value, self.held, strict=False))
        if not same and isinstance(self.value, list):
            self.value[:] = self.held
        return not same


def _has_container(value: Any) -> bool:
    """Whether a list or dict is among a call's arguments."""
    args, kwargs = value

    def has(value: Any) -> bool:
        return type(value) in (list, dict) or (type(value) is tuple and any(map(has, value)))

    return any(map(has, (*args, *kwargs.values())))


def _from_torch(module: nn.Module) -> bool:
    """Whether a module's forward is one of torch's, or stands for one."""
    return type(module).forward.__module__.startswith(("torch.nn.", "gankern.nn.stretch"))


def _holds(value: Any, container: Any) -> bool:
    if type(value) in (tuple, list):
        return value is container or any(_holds(v, container) for v in value)
    return type(value) is dict and any(_holds(v, container) for v in value.values())


def flatten(value: Any, leaves: list[Any], key: list[Any], *, open_floats: bool) -> Any:
    """The value with `Leaf` for tensors, which go to `leaves`; Untraceable if it is made of other things.

    `key` gets all else that two calls must share to be alike, types included.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter or (kind is float and open_floats):
        leaves.append(value)
        key.append(kind is float)
        return _FLOAT if kind is float else _TENSOR
    key.append(kind)
    if kind in (tuple, list):
        key.append(len(value))
        return kind([flatten(v, leaves, key, open_floats=open_floats) for v in value])
    if kind is dict:
        key.append(tuple(value))
        return {k: flatten(v, leaves, key, open_floats=open_floats) for k, v in value.items()}
    if not is_simple(value):
        raise Untraceable(f"it is given a {kind.__name__}")
    key.append(value)
    return value


_TENSOR, _FLOAT = Leaf(Tensor), Leaf(float)
_lock = threading.Lock()


@contextmanager
def _recording(tracer: Tracer) -> Iterator[None]:
    """Has `Tracer.read` called for what user code of this thread reads of modules."""
    thread = threading.get_ident()

    def __getattribute__(module: nn.Module, name: str) -> Any:
        watched = threading.get_ident() == thread and not in_library(sys._getframe(1))
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            if watched:
                tracer.read(module, name, _MISSING)
            raise
        if watched:
            tracer.read(module, name, value)
        return value

    before = nn.Module.__dict__.get("__getattribute__")
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
