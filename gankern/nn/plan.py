"""Chains of modules in a traced forward, and the forward with each of them run as a sequential would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gankern.nn.stretch import CONVS, NORMS, FusedSequential, Step, Stretch, find_stretches, run_steps

# Functions and methods that are activations, each with its default slope.
_FUNCTIONS: dict[Any, tuple[str, float]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", 0.0)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", 0.01)),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ("tanh", 0.0)),
}


@dataclass(frozen=True)
class Found:
    """A stretch of a graph: its nodes' names as a reader knows them, and why it is none."""

    names: tuple[str, ...]
    gap: str | None = None
    stretch: Stretch | None = None

    @property
    def reason(self) -> str | None:
        """Why it stays stock, as things are now."""
        return self.gap if self.stretch is None else self.stretch.refusal()


@dataclass(frozen=True)
class _Chain:
    """Nodes that follow each other, each with what it calls."""

    nodes: list[fx.Node]
    steps: list[Step]
    stretches: list[Stretch]


def _function(node: fx.Node) -> tuple[str, float] | None:
    """The activation that a node calls as a function, with its slope."""
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None
    name, default = _FUNCTIONS[node.target]
    order = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    options = {**dict(zip(order, node.args[1:], strict=False)), **node.kwargs}
    slope = options.get("negative_slope", default)
    known = set(options) <= set(order) and isinstance(options.get("inplace", False), bool)
    return (name, float(slope)) if known and isinstance(slope, (int, float)) and len(node.args) > 0 else None


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _step(root: nn.Module, node: fx.Node) -> Step | None:
    """What a node calls with the one before it alone, if a sequential could as well."""
    function = _function(node)
    if function is not None:
        return function
    module = _module(root, node)
    if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    known = type(module).__module__.startswith("torch.nn.") or isinstance(module, FusedSequential)
    return module if known else None


def _name(node: fx.Node) -> str:
    function = _function(node)
    return function[0] if function is not None else str(node.target)


def _gap(before: fx.Node, after: fx.Node) -> str | None:
    """Why two calls cannot be one."""
    uses = sum(arg is before for user in before.users for arg in user.all_input_nodes)
    if uses > 1:
        return f"the output of {before.target} is used {uses} times"
    between = before.next
    while between is not after:
        if between.op not in ("placeholder", "get_attr"):
            return f"{_name(between)} is called between {_name(before)} and {_name(after)}"
        between = between.next
    return None


def _chains(root: nn.Module, graph: fx.Graph) -> tuple[list[_Chain], list[Found]]:
    """Chains with stretches in them, and the stretches that would be longer but for the reason given."""
    chains, refused = [], []
    nodes: list[fx.Node] = []
    steps: list[Step] = []

    def close() -> None:
        stretches = find_stretches(steps)
        # A convolution by itself has nothing to be fused with.
        if stretches and stretches != [Stretch(s := stretches[0].start, s + 1, stretches[0].conv, None, None)]:
            chains.append(_Chain(list(nodes), list(steps), stretches))
        nodes.clear()
        steps.clear()

    for node in graph.nodes:
        step = _step(root, node)
        if step is None:
            if isinstance(module := _module(root, node), CONVS + NORMS):
                refused.append(Found((_name(node),), f"{type(module).__name__} is called with more than its input"))
            continue
        before = node.args[0]
        if not nodes or before is not nodes[-1] or (gap := _gap(before, node)) is not None:
            close()
            # What the two would have been, had they followed each other.
            pair = [] if not isinstance(before, fx.Node) or (last := _step(root, before)) is None else [last, step]
            if any(s.start == 0 and s.stop == 2 for s in find_stretches(pair)):
                gap = _gap(before, node)
                if gap is not None:
                    refused.append(Found((_name(before), _name(node)), gap))
        nodes.append(node)
        steps.append(step)
    close()
    return chains, refused


def find(root: nn.Module, graph: fx.Graph) -> list[Found]:
    """The stretches of a traced forward, and those that would be longer, with the reason."""
    chains, refused = _chains(root, graph)
    found = [
        Found(tuple(map(_name, chain.nodes[s.start : s.stop])), stretch=s) for chain in chains for s in chain.stretches
    ]
    return found + refused


def compile_graph(root: nn.Module, graph: fx.Graph) -> Callable[..., Any] | None:
    """A function of the module and the graph's inputs that runs chains as sequentials do; None without any.

    Modules are looked up by name at every call, as the forward does.
    """
    chains, _ = _chains(root, graph)
    for chain in chains:
        start, stop = chain.stretches[0].start, chain.stretches[-1].stop
        nodes, steps = chain.nodes[start:stop], chain.steps[start:stop]
        with graph.inserting_before(nodes[-1]):
            called = [
                step if isinstance(step, tuple) else graph.get_attr(str(node.target))
                for node, step in zip(nodes, steps, strict=True)
            ]
            run = graph.call_function(run_steps, (tuple(called), nodes[0].args[0]))
        nodes[-1].replace_all_uses_with(run)
        for node in reversed(nodes):
            graph.erase_node(node)
    if not chains:
        return None
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<gankern.fuse>", "exec"), namespace)
    return namespace["forward"]
