"""What a trace depended on, to be compared at every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gankern.nn.tracing.values import is_simple

MISSING = object()
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
    names: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def hold(self) -> bool:
        return (
            all(_same(getattr(owner, name, MISSING), value) for owner, name, value in self.attributes)
            and all(tensors.get(name) is not None for tensors, name in self.present)
            and all(list(now) == names and list(now.values()) == modules for now, names, modules in self.children)
            and all(_same_list(getattr(owner, name, None), values) for owner, name, values in self.lists)
            and all(_same(namespace.get(name, MISSING), value) for namespace, name, value in self.names)
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


@dataclass(frozen=True)
class Container:
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


def holds(value: Any, container: Any) -> bool:
    if type(value) in (tuple, list):
        return value is container or any(holds(v, container) for v in value)
    return type(value) is dict and any(holds(v, container) for v in value.values())
