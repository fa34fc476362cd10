"""Which Python code a trace may stand for: code that only calls what is recorded, and reads what can be compared."""

from __future__ import annotations

import builtins
import dis
import enum
import inspect
import math
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gankern.nn.tracing.values import Untraceable, check_defaults, in_library, is_constant

if TYPE_CHECKING:
    from gankern.nn.tracing.tracer import Tracer

# What code does that a trace would lose.
_REFUSED = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global name",
    "DELETE_GLOBAL": "deletes a global name",
    "IMPORT_NAME": "imports",
    "SETUP_FINALLY": "has a try or with block",
    "SETUP_WITH": "has a try or with block",
    "BEFORE_WITH": "has a try or with block",
    "LOAD_SPECIAL": "has a try or with block",
    "PUSH_EXC_INFO": "has a try or with block",
    "GET_AWAITABLE": "awaits",
}
_BUILTINS = frozenset(
    {"abs", "all", "any", "bool", "bytes", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset"}
    | {"getattr", "hasattr", "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next"}
    | {"pow", "range", "reversed", "round", "set", "slice", "sorted", "str", "sum", "super", "tuple", "zip"}
    | {"Ellipsis", "NotImplemented"}
)
# Modules of torch whose functions are recorded when they get a proxy.
_RECORDED = (
    "torch.fx.",
    "torch.nn.functional",
    "torch.functional",
    "torch._tensor",
    "torch._jit_internal",
    "torch.utils._device",
)
_QUESTIONS = frozenset({"__iter__", "__len__", "__getitem__", "__contains__", "keys", "items", "values"})
_CHILDREN = frozenset({"children", "named_children"})
_OF_VALUES = (list, dict, tuple, set, frozenset, str, bytes, int, float, range)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()), type(iter([])))


class Watch:
    """A profile function: sees every call that a forward makes, before it is made, and refuses what it must.

    Parameters
    ----------
    tracer : Tracer
        Its graph grows by what is recorded; its guards get the global names that are read.
    forward : function
        What is traced.

    Attributes
    ----------
    asks_for_none : bool
        Whether the code asks if a value is None, or the same as another, that is more than an argument or attribute.
    """

    def __init__(self, tracer: Tracer, forward: FunctionType) -> None:
        self._tracer = tracer
        self._forward = forward.__code__
        self.asks_for_none = False
        self._inside: FrameType | None = None
        self._pending: list[tuple[Any, int]] = []
        self._vetted: set[tuple[CodeType, int]] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._inside is not None:
            # Nothing that is let in calls user code back.
            if event == "return" and frame is self._inside:
                self._inside = None
        elif event == "call":
            if frame.f_globals.get("__name__", "").startswith("gankern.nn."):
                return
            if in_library(frame):
                self._enter(frame)
            else:
                self._vet(frame)
        elif event == "c_call" and not in_library(frame):
            self._call(arg)
        elif event in ("c_return", "c_exception") and self._pending and self._pending[-1][0] is arg:
            function, count = self._pending.pop()
            if event == "c_return" and len(self._tracer.graph.nodes) == count:
                raise Untraceable(f"it calls {_name(function)}")

    def _enter(self, frame: FrameType) -> None:
        module, name = frame.f_globals["__name__"], frame.f_code.co_name
        asks = (module == "torch.nn.modules.container" and name in _QUESTIONS) or (
            module == "torch.nn.modules.module" and name in _CHILDREN
        )
        if not (asks or module.startswith(_RECORDED)):
            raise Untraceable(f"it calls {module}.{name}")
        if not (frame.f_code.co_flags & inspect.CO_GENERATOR):
            self._inside = frame

    def _call(self, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, _OF_VALUES + _VIEWS) or owner is math:
            return
        if owner is builtins and function.__name__ in _BUILTINS:
            return
        places = (type(owner).__module__, getattr(owner, "__name__", None), getattr(function, "__module__", None))
        if not any(p is not None and (p == "torch" or p.startswith("torch.")) for p in places):
            raise Untraceable(f"it calls {_name(function)}")
        if function is not torch._C._get_tracing_state:
            self._pending.append((function, len(self._tracer.graph.nodes)))

    def _vet(self, frame: FrameType) -> None:
        code = frame.f_code
        key = code, id(frame.f_globals)
        if key in self._vetted:
            return
        self._vetted.add(key)
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise Untraceable(f"{code.co_name} is asynchronous")
        instructions = list(dis.get_instructions(code))
        for i, instruction in enumerate(instructions):
            name = instruction.opname
            if name in _REFUSED:
                raise Untraceable(f"{code.co_name} {_REFUSED[name]}")
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                rest = (n for n in instructions[i + 1 :] if not n.opname.startswith(("PUSH_NULL", "CACHE", "EXTENDED")))
                self._name(frame, instruction.argval, rest)
            elif name.endswith("DEREF") and instruction.argval in code.co_freevars:
                self._free(frame, instruction.argval, stores=name.startswith(("STORE", "DELETE")))
            elif name == "IS_OP" or name.endswith("NONE"):
                self.asks_for_none |= not self._knows(code, instructions[max(i - 2, 0) : i])

    def _knows(self, code: CodeType, operands: list[dis.Instruction]) -> bool:
        """Whether what is compared to None is an argument or attribute, which the trace's guards know."""
        known = [o for o in operands if o.opname == "LOAD_CONST" and o.argval is None]
        operand = operands[0] if known else operands[-1]
        if operand.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_CONST"):
            return True
        stores = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("STORE_FAST")}
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        plain = isinstance(operand.argval, str) and all(isinstance(name, str) for name in stores)
        is_argument = code is self._forward and operand.opname.startswith("LOAD_FAST") and operand.argval in names
        return is_argument and plain and operand.argval not in stores

    def _name(self, frame: FrameType, name: str, rest: Iterator[dis.Instruction]) -> None:
        """Vet a global name and the attributes that are read from it, as in ``config.SCALE``."""
        namespace: dict[str, Any] | None = frame.f_globals
        path = name
        if name not in frame.f_globals:
            value = getattr(builtins, name, None)
            if not (name in _BUILTINS or (isinstance(value, type) and issubclass(value, BaseException))):
                raise Untraceable(f"it uses {name}")
            return
        value = frame.f_globals[name]
        while isinstance(value, (ModuleType, type)):
            if isinstance(value, type) and _is_known(value):
                if type(value) is type(torch.FloatTensor):
                    raise Untraceable(f"it uses {path}")
                return
            instruction = next(rest, None)
            if instruction is None or instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                if isinstance(value, ModuleType) and not _is_torch(value.__name__):
                    raise Untraceable(f"it uses {path}, a module")
                if isinstance(value, type) and not issubclass(value, (nn.Module, tuple)):
                    raise Untraceable(f"it uses {path}, a class")
                return
            name = instruction.argval
            if isinstance(value, ModuleType):
                namespace = value.__dict__
                value = getattr(value, name, None)
            else:
                value, namespace = self._of_class(value, name, path), None
            path += f".{name}"
        if isinstance(value, FunctionType) and not _is_torch(value.__module__ or ""):
            check_defaults(value)
        if not (is_constant(value) or _of_torch(value)):
            raise Untraceable(f"it reads {path}, a {type(value).__name__}, that may change")
        if namespace is not None and _is_torch(namespace.get("__name__", "")):
            if isinstance(value, (bool, int, str)):
                raise Untraceable(f"it reads {path}, a setting")
        elif namespace is not None and namespace is not math.__dict__:
            self._tracer.guards.names.append((namespace, name, value))

    def _of_class(self, owner: type, name: str, path: str) -> Any:
        """Read a constant of a class, by way of the class: its namespace is no dict that keeps."""
        if not (name in owner.__dict__ or issubclass(owner, (nn.Module, enum.Enum))):
            raise Untraceable(f"it reads {path}.{name}")
        value = getattr(owner, name, None)
        self._tracer.guards.attributes.append((owner, name, value))
        return value

    def _free(self, frame: FrameType, name: str, *, stores: bool) -> None:
        outer = frame.f_back
        while outer is not None and not in_library(outer):
            if name in outer.f_code.co_cellvars:
                return
            outer = outer.f_back
        value = frame.f_locals.get(name)
        if stores or not (isinstance(value, type) or (is_constant(value) and callable(value))):
            raise Untraceable(f"it reads {name} of the function around it")


def _name(function: Any) -> str:
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", getattr(function, "__name__", str(function)))
    return f"{module}.{name}" if module and module != "builtins" else name


def _is_torch(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")


def _is_known(kind: type) -> bool:
    return _is_torch(kind.__module__) or kind.__module__ == "builtins"


def _of_torch(value: Any) -> bool:
    return _is_torch(type(value).__module__) and not isinstance(value, (torch.Tensor, nn.Module, torch.Generator))
