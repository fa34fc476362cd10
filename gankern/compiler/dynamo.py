"""``torch.compile(..., backend="gankern")``: graphs that Dynamo captured, run by the plans of fused modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gankern import compiler
from gankern.arguments import first_line
from gankern.compiler import strict
from gankern.compiler.forward import ForwardPlan
from gankern.compiler.guards import Held
from gankern.compiler.refusal import Refused

log = logging.getLogger("gankern.compiler")


class _Given:
    """In the place of guards, which are Dynamo's: a graph's tensors are its arguments."""

    def __init__(self, args: Sequence[Tensor]) -> None:
        self._held = [Held(f"args[{i}]", t, None) for i, t in enumerate(args)]

    def take(self) -> list[Held]:
        held, self._held = self._held, []
        return held

    def fetch(self, call: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(call["args"])


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Run a captured graph of one output by a plan of its forward and backward; any other as it is, by torch.

    Registered under the name ``gankern`` with ``torch.compile``, which checks what a graph depends on.

    Parameters
    ----------
    graph : fx.GraphModule
        Of torch's functions; parameters and buffers are arguments.
    inputs : sequence
        Like those that it will be called with.
    options : mapping of str to str, optional
        ``pointwise``, as :func:`gankern.fuse` takes it.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        If there is another option, or another value.
    """
    for name in options or {}:
        if name != "pointwise":
            raise ValueError(f"options may have pointwise; got {name!r}")
    pointwise = compiler.check_pointwise((options or {}).get("pointwise", "torch"))
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    if len(results) != 1 or not inputs or not all(isinstance(value, Tensor) for value in inputs):
        log.info("no plan: a graph of %d outputs, or of arguments that are no tensors", len(results))
        return graph.forward
    plan: ForwardPlan | None = None
    tried = False

    def only(*args: Any) -> Any:
        return graph.forward(*args)[0]

    def run(*args: Any) -> Any:
        nonlocal plan, tried
        call = {"critic": only, "x": args[0], "args": args[1:], "kwargs": {}}
        if not tried:
            tried = True
            try:
                plan = ForwardPlan(call, None, _Given(args[1:]), pointwise)
                if compiler.is_strict():
                    output, apart = strict.forward(plan, call)
                    if apart:
                        plan = None
                        log.error("the plan of a graph differs from stock: %s; stock runs", apart)
                    elif output is not None:
                        return (output,)
            except Exception as error:
                plan = None
                reason = str(error) if isinstance(error, Refused) else f"deriving it failed with {first_line(error)}"
                log.info("no plan: %s", reason)
        if plan is not None:
            try:
                output = plan(call)
            except Refused as error:
                log.info("no plan: %s", error)
                output = None
            if output is not None:
                return (output,)
        return graph.forward(*args)

    return torch.compiler.disable(run)
