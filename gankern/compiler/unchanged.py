"""Whether what guards read by way of dicts may have changed since they held: told by the dicts' versions.

Python, or Dynamo in its place, gives a dict another version at each change. Modules, their parameters and what a class
is made of are all found by way of dicts, so that where these have the versions of a call for which all guards held,
only the rest is to be looked at: the call's arguments, torch's state, code that can be exchanged, the tensors.
"""

from __future__ import annotations

import enum
import gc
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version

#: Whether the dict of an instance gets another version when an attribute is set: from Python 3.13 on not always, as
#: the values may stand in the instance.
IS_TOLD = sys.version_info < (3, 13)

_CONSTANTS = {
    *(bool, int, float, complex, str, bytes, type(None), types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
# What Dynamo checks of a tensor that `Guards` checks too, or that no result depends on.
_OF_TENSORS = {
    *("TENSOR_MATCH", "TYPE_MATCH", "NOT_NONE", "WEAKREF_ALIVE", "NO_TENSOR_ALIASING"),
    *("DIMENSION_DYNAMIC_MARKING_GUARD", "DYNAMIC_INDICES"),
}
# Guards that run code of Python's, and those that look at several things.
_ANYTHING = {"LAMBDA_GUARD", "OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"}
# Ways from a module to what its dicts and its class hold; an attribute may be computed.
_BY_DICT = {"GetGenericDictGuardAccessor", "DictGetItemGuardAccessor", "TypeGuardAccessor"}


class Unchanged:
    """The part of a tree of Dynamo's guards that no dict's version answers for, and these versions.

    Parameters
    ----------
    tree
        Dynamo's root of all guards.
    critic
        What is called.
    scope : dict of str to Any
        The names "L" and "G" of the guards' expressions: the call's arguments and the globals.
    modules : sequence of nn.Module
        Whose dicts are watched, and whose classes.
    dicts : sequence of dict
        Which are watched besides: of classes, say.
    empty : iterable of dict
        Which are to stay so.
    tensors : sequence of Tensor
        That are checked at each call.
    """

    def __init__(
        self,
        tree: Any,
        critic: Any,
        scope: dict[str, Any],
        modules: Sequence[nn.Module],
        dicts: Iterable[dict[Any, Any]],
        empty: Iterable[dict[Any, Any]],
        tensors: Sequence[Tensor],
    ) -> None:
        # Plans must not keep the critic alive.
        self._critic = weakref.ref(critic) if isinstance(critic, nn.Module) else None
        self._types = [type(m) for m in modules]
        own = (d for m in modules for d in (vars(m), m._parameters, m._buffers, m._modules))
        found = {id(d): d for d in (scope["G"], *own, *dicts) if type(d) is dict}
        self._dicts = watched = list(found.values())
        # Nor what is in the dicts of a module that is gone.
        self._modules = [weakref.ref(m, lambda _: watched.clear()) for m in modules]
        self._empty = list(empty)
        self._sets: list[Any] = []
        self._watched = {*found, *map(id, modules)}
        self._tensors = set(map(id, tensors))
        kept: set[str] = set()
        self._keep(tree, scope, kept, False)
        del self._watched, self._tensors
        clone = getattr(tree, "clone_manager", None)
        self.check: Callable[[Any], bool] = clone(lambda node: node.get_source() in kept).check if clone else tree.check

    def now(self, critic: Any) -> Any:
        """What is the same as long as nothing watched has changed; None where it cannot be told."""
        if not IS_TOLD or (self._critic is not None and self._critic() is not critic):
            return None
        if any(self._empty) or any(now != then for now, then in self._sets):
            return None
        if [type(module()) for module in self._modules] != self._types:
            return None
        return list(map(dict_version, self._dicts))

    def _keep(self, node: Any, scope: dict[str, Any], kept: set[str], by_dict: bool) -> bool:
        """Add to `kept` what versions do not answer for, a node and those below it; whether there is such."""
        source = node.get_source()
        top = source == "G" or (source == "L['critic']" and self._critic is not None)
        try:
            value = eval(source, scope)
        except Exception:
            watched = follows = False
        else:
            watched = (by_dict or top) and self._is_watched(value, _names(node.get_leaf_guards()))
            follows = isinstance(value, type | types.ModuleType) or _names(node.get_accessors()) <= _BY_DICT
        below = [self._keep(child, scope, kept, watched and follows) for child in _children(node)]
        if watched and not any(below):
            return False
        kept.add(source)
        return True

    def _is_watched(self, value: Any, guards: set[str]) -> bool:
        """Whether something that stands in a watched dict is the same as long as that has its version."""
        if not guards.isdisjoint(_ANYTHING):
            return False
        if isinstance(value, Tensor):
            return id(value) in self._tensors and guards <= _OF_TENSORS
        if type(value) in (dict, OrderedDict) and not value:
            self._empty.append(value)
            return True
        if type(value) is set and all(map(_is_constant, value)):
            self._sets.append((value, frozenset(value)))
            return True
        if isinstance(value, type):
            return id(dict_of(value)) in self._watched
        if isinstance(value, types.ModuleType):
            # Others change at each assignment in a notebook.
            return value.__name__.partition(".")[0] == "torch" and self._watch(vars(value))
        return id(value) in self._watched or _is_constant(value)

    def _watch(self, namespace: dict[str, Any]) -> bool:
        if id(namespace) not in self._watched:
            self._watched.add(id(namespace))
            self._dicts.append(namespace)
        return True


def dict_of(kind: type) -> Any:
    """The dict of a class, which shows a proxy of it."""
    return gc.get_referents(vars(kind))[0]


def _names(parts: Iterable[Any]) -> set[str]:
    return {type(part).__name__ for part in parts}


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(map(_is_constant, value))
    return type(value) in _CONSTANTS or isinstance(value, enum.Enum)


def _children(node: Any) -> Iterator[Any]:
    yield from node.get_child_managers()
    pairs = node.get_key_value_managers().values() if hasattr(node, "get_key_value_managers") else ()
    yield from (child for pair in pairs for child in pair if child is not None)
