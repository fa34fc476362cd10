"""What Dynamo is told of a training step while it follows one for its guards.

Backward passes, updates by optimizers and penalties are calls that it cannot trace on all versions of torch. Here it is
told what they give, and no more: its graph is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from gankern import _library
from gankern.compiler.guards import _name, _NotTraced

#: Keeps in Dynamo's graph what a backward pass is of.
_read = _library.define("step_read(Tensor x) -> Tensor", lambda x: x.new_empty(()), lambda x: x.new_empty(()))
torch.fx.node.has_side_effect(_read)

#: Methods of an optimizer or module that run as themselves in a planned step.
OPAQUE = {"step": (Optimizer,), "zero_grad": (Optimizer, nn.Module)}


def call_step(critic: Any, x: Any, args: Any, kwargs: Any) -> Any:
    """Runs a step, for Dynamo alone."""
    if not torch.compiler.is_compiling():
        raise _NotTraced
    # A graph that holds something, whatever the step returns.
    return critic(*args, **kwargs), torch.ones(()) + 1


def _backward(*tensors: Any, **others: Any) -> None:
    for t in (*tensors, *others.values()):
        if isinstance(t, Tensor):
            _read(t)


def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    for o in (outputs,) if isinstance(outputs, Tensor) else outputs:
        _read(o)
    return tuple(i.clone() for i in ((inputs,) if isinstance(inputs, Tensor) else inputs))


def _penalty(
    critic: Any,
    points: Tensor,
    inputs: Any,
    critic_kwargs: Any,
    weight: Any = 0.0,
    target: Any = 0.0,
    one_sided: Any = False,
    squared: Any = False,
    params: Any = None,
    create_graph: Any = False,
) -> Any:
    return critic(points, *inputs, **critic_kwargs).sum() * (points.sum() * 0)


def _receiver(fn: Any, scope: dict[str, Any]) -> tuple[Any, Any, str] | None:
    """The object whose method is called, its source, and the method's name."""
    from torch._dynamo.source import AttrSource
    from torch._dynamo.variables import TensorVariable
    from torch._dynamo.variables.misc import GetAttrVariable

    source = getattr(fn, "source", None)
    if isinstance(fn, GetAttrVariable):
        if isinstance(fn.obj, TensorVariable):
            return fn.obj, None, fn.name
        base, name = fn.obj.source, fn.name
    elif isinstance(source, AttrSource):
        base, name = source.base, source.member
    else:
        return None
    if name not in OPAQUE or base is None:
        return None
    return eval(_name(base), scope), base, name


def _switch(tensor: Any, requires_grad: Any = None) -> None:
    """Note that a step has switched a tensor's gradient on or off."""
    on = True if requires_grad is None else requires_grad.as_python_constant()
    tensor.requires_grad = on
    value = tensor.proxy.node.meta["example_value"]
    if value.is_leaf:
        value.requires_grad_(on)


@contextmanager
def followed(opaque: dict[str, Any], derivatives: list[Any]) -> Iterator[None]:
    """Dynamo follows steps inside.

    Noted are optimizers and modules with opaque calls, by their expressions, and functions that took derivatives
    besides backward passes.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._dynamo.variables import ConstantVariable, UserFunctionVariable

    from gankern.ops.gradient_penalty import penalty_at

    stand_ins: dict[Any, Any] = {torch.autograd.grad: _grad, penalty_at: _penalty}
    base: Any = InstructionTranslatorBase
    backward: Any = _backward
    before = base.call_function

    def call_function(tx: Any, fn: Any, args: Any, kwargs: Any) -> None:
        root = tx.output.root_tx
        found = _receiver(fn, {"L": root.f_locals, "G": root.f_globals})
        if found is not None:
            thing, source, name = found
            if source is None:
                if name == "backward":
                    tx.push(UserFunctionVariable(backward).call_function(tx, [thing, *args], kwargs))
                    return
                if name == "item":
                    # The derivation lets nobody compute with it.
                    tx.push(thing)
                    return
                if name == "requires_grad_":
                    _switch(thing, *args, **kwargs)
                    tx.push(thing)
                    return
            if source is not None and isinstance(thing, OPAQUE[name]):
                for value in (*args, *kwargs.values()):
                    value.realize()
                opaque[_name(source)] = thing
                tx.push(ConstantVariable.create(None))
                return
        if type(fn).__name__.startswith("Lazy"):
            fn = fn.realize()
        value = getattr(fn, "fn", getattr(fn, "value", None))
        stand_in = stand_ins.get(value) if callable(value) and getattr(value, "__hash__", None) else None
        if stand_in is not None:
            derivatives.append(value)
            for given in (*args, *kwargs.values()):
                given.realize()
            tx.push(UserFunctionVariable(stand_in).call_function(tx, args, kwargs))
            return
        before(tx, fn, args, kwargs)

    # No other thread may be tracing.
    with compile_lock:
        base.call_function = call_function
        try:
            yield
        finally:
            base.call_function = before
