"""Which line of the user's code, and which of his modules, a node of a graph stands for.

A node of the forward is made while that line runs. A node of a derivative is made while one of autograd's runs, which
has the number that it got in the forward: it stands for the line that made something under this number.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_TORCH, _GANKERN = (os.path.join(os.path.dirname(path), "") for path in (torch.__file__, os.path.dirname(__file__)))
_READ = os.path.join(_GANKERN, "models", "")
_ENGINE: Any = torch.autograd.graph._engine_run_backward
_CALL: Any = nn.Module._call_impl


class Origin(NamedTuple):
    """Where a node comes from.

    Attributes
    ----------
    line : str
        File and line, of the innermost frame that is neither torch's nor gankern's; empty where there is none.
    module : str
        Name of the innermost module that was called; empty where that is the outermost.
    order : int
        Of the derivative that it is in: 0 in the forward.
    """

    line: str = ""
    module: str = ""
    order: int = 0


@functools.cache
def _is_users(file: str) -> bool:
    """Whether a file is neither torch's nor gankern's; what one reads of gankern's, its networks, is the user's."""
    if file.startswith("<"):
        return not file.startswith(("<frozen", "<string", "<eval_with_key", "<gankern"))
    return not file.startswith((_TORCH, _GANKERN)) or file.startswith(_READ)


def line_of(file: str, number: int | None) -> str:
    """A place in the user's code as reports have it."""
    inside = os.path.join(os.getcwd(), "")
    return f"{file[len(inside) :] if file.startswith(inside) else os.path.basename(file)}:{number}"


def at(error: BaseException) -> str:
    """In words, the innermost line of the user's that an error, or Dynamo while it traced, came from; or nothing.

    The error's own traceback begins where it is caught.
    """
    frames = [*traceback.extract_tb(error.__traceback__), *(getattr(error, "real_stack", None) or ())]
    users = [frame for frame in frames if _is_users(frame.filename)]
    return f", at {line_of(users[-1].filename, users[-1].lineno)}" if users else ""


def at_store(classes: Iterable[type], names: Collection[str]) -> str:
    """In words, the first line of classes of the user's that sets an attribute under one of the names; or nothing."""
    codes = (f.__code__ for kind in classes for f in vars(kind).values() if isinstance(f, FunctionType))
    for code in (code for code in codes if _is_users(code.co_filename)):
        line, begins = code.co_firstlineno, dict(dis.findlinestarts(code))
        for op in dis.get_instructions(code):
            line = begins.get(op.offset) or line
            if op.opname == "STORE_ATTR" and op.argval in names:
                return f", at {line_of(code.co_filename, line)}"
    return ""


def _here(frame: FrameType | None, names: Mapping[int, str]) -> Origin | None:
    """The line that runs, and the module that it is in; None between the nodes that autograd runs."""
    line = module = None
    while frame is not None and (line is None or module is None):
        code = frame.f_code
        if code is _ENGINE.__code__:
            return None
        if module is None and code is _CALL.__code__:
            module = names.get(id(frame.f_locals["self"]))
        if line is None and _is_users(code.co_filename):
            line = line_of(code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return Origin(line or "", module or "")


@contextmanager
def noted(names: Mapping[int, str]) -> Iterator[None]:
    """Nodes that make_fx makes inside have their origin in ``meta``; modules are known by name, under their ids."""
    mode: Any = get_proxy_mode()
    create: Callable[..., fx.Node] = mode.tracer.create_node
    numbers: dict[int, Origin] = {}
    last = Origin()

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        nonlocal last
        node = create(*args, **kwargs)
        running: Any = torch._C._current_autograd_node()
        if running is None:
            last = _here(sys._getframe(1), names) or last
        else:
            made = numbers.get(running._sequence_nr())
            last = last if made is None else made._replace(order=made.order + 1)
        node.meta["origin"] = last
        # The number of what autograd has made last, for what this computes.
        numbers.setdefault(torch.autograd._get_sequence_nr() - 1, last)
        return node

    mode.tracer.create_node = create_node
    try:
        yield
    finally:
        del mode.tracer.create_node


@contextmanager
def inherited(graph: fx.Graph) -> Iterator[None]:
    """Nodes that passes put into a graph inside are of the origin of the node that they are put beside."""
    create = graph.create_node

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        beside: fx.Node = graph._insert.__self__  # type: ignore[attr-defined]
        node = create(*args, **kwargs)
        # At the end, of what they are made of.
        source = next((n for n in (beside, *node.all_input_nodes) if "origin" in n.meta), beside)
        node.meta.update({key: source.meta[key] for key in ("origin", "also") if key in source.meta})
        return node

    graph.create_node = create_node  # type: ignore[method-assign]
    try:
        yield
    finally:
        del graph.create_node


def absorb(node: fx.Node, other: fx.Node) -> None:
    """Note that a node computes what another did that is about to go."""
    node.meta["also"] = (*node.meta.get("also", ()), *of(other))


def of(node: fx.Node) -> tuple[Origin, ...]:
    """The origins of what a node computes, its own first."""
    own = (node.meta["origin"],) if "origin" in node.meta else ()
    return tuple(dict.fromkeys((*own, *node.meta.get("also", ()))))
