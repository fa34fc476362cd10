"""The flat graph of a penalty, both orders of derivatives in it, by autograd itself.

The critic's own code runs once, on fake tensors, under ``make_fx``: no random number is drawn and no buffer written.
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gankern._autograd import derived
from gankern.compiler import attention, origins
from gankern.compiler.refusal import Refused

aten = torch.ops.aten

_MODULE_GETATTR = _symbolic_trace._orig_module_getattr
#: Held while a graph is derived, when make_fx has its own methods in ``nn.Module``, of which it has one set.
lock = threading.RLock()


def _double_backward(
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Second derivative of a convolution, which is bilinear: by the convolution and its two gradients.

    Torch's own takes the groups apart, and writes the gradients as convolutions of transposed tensors.
    """
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    output = grad_input = grad_weight = None
    if mask[0]:
        terms = []
        if gg_input is not None:
            terms.append(aten.convolution.default(gg_input, weight, None, *geometry))
        if gg_weight is not None:
            terms.append(aten.convolution.default(input, gg_weight, None, *geometry))
        if gg_bias is not None:
            terms.append(gg_bias.reshape(1, -1, *[1] * (grad_output.dim() - 2)).expand_as(grad_output))
        for term in terms:
            output = term if output is None else output + term
    backward = aten.convolution_backward.default
    if mask[1] and gg_weight is not None:
        grad_input = backward(grad_output, input, gg_weight, None, *geometry, [True, False, False])[0]
    if mask[2] and gg_input is not None:
        grad_weight = backward(grad_output, gg_input, weight, None, *geometry, [False, True, False])[1]
    return output, grad_input, grad_weight


@contextmanager
def bilinear_convolutions() -> Iterator[None]:
    """Second derivatives of convolutions that are taken inside stay whole in the graph.

    Nothing else should be computed there: torch's other decompositions in Python round otherwise than its kernels, and
    resize to other pixels.
    """
    op: Any = aten._convolution_double_backward.default
    key = DispatchKey.CompositeImplicitAutograd
    with lock:
        before = op.py_kernels.get(key)
        op.py_kernels[key] = _double_backward
        op._dispatch_cache.clear()
        try:
            with enable_python_dispatcher():
                yield
        finally:
            if before is None:
                del op.py_kernels[key]
            else:
                op.py_kernels[key] = before
            op._dispatch_cache.clear()


@contextmanager
def _draws_nothing() -> Iterator[None]:
    """Random numbers that are drawn inside are those to come, and Python's and numpy's are refused.

    Beside other threads, which draw as well, nothing can be told: the guards have seen none of the forward's.
    """
    numpy = sys.modules.get("numpy.random")

    def state() -> tuple[Any, Any, Any]:
        return torch.get_rng_state(), random.getstate(), numpy and pickle.dumps(numpy.get_state())

    before = state()
    try:
        yield
    finally:
        after = state() if threading.active_count() == 1 else before
        if not torch.equal(after[0], before[0]):
            torch.set_rng_state(before[0])
        if after[1:] != before[1:]:
            random.setstate(before[1])
            if numpy:
                numpy.set_state(pickle.loads(before[2]))
            raise Refused("it draws random numbers of Python's or of numpy's")


def derive(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    modules: Mapping[str, nn.Module] | None = None,
    known: Sequence[Any] = (),
) -> fx.GraphModule:
    """Trace a function of tensors, inputs first and state after them.

    Nodes know the user's line that they come from, and which of the modules. Of tensors that it reads from elsewhere,
    `known` has what each place of inputs and state stands for.

    Returns
    -------
    fx.GraphModule
        Placeholders for all inputs and all of the state, in this order.

    Raises
    ------
    Refused
        Where values decide what is computed, or a tensor is read that is in neither list.
    """
    names = {id(module): name for name, module in (modules or {}).items()}

    def located(*tensors: Tensor) -> Any:
        with origins.noted(names):
            return function(*tensors)

    try:
        with lock, _draws_nothing(), derived():
            # make_fx calls modules by those that torch came with.
            if (nn.Module.__call__, nn.Module.__getattr__) != (_symbolic_trace._orig_module_call, _MODULE_GETATTR):
                raise Refused("nn.Module's way of calling was replaced")
            traced = make_fx(located, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs, *state)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Refused(f"values decide what it computes: {error}{origins.at(error)}") from None
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in list(traced.graph.nodes):
        line = getattr(node.meta.get("origin"), "line", "")
        where = f", at {line}" if line else ""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Refused(f"it calls {node.target}{where}")
        # Strides of fake tensors are not always those of real ones, which it goes by.
        if node.target in (aten.as_strided.default, aten.as_strided_.default):
            raise Refused(f"it goes by strides (as_strided){where}")
        literal = all(user.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default) for user in node.users)
        if node.op == "get_attr" and not literal:
            tensor = getattr(traced, node.target)
            place = next((i for i, t in enumerate(known) if t is tensor and not t.requires_grad), None)
            if place is None:
                raise Refused(f"it reads a tensor that no guard knows{where}")
            node.replace_all_uses_with(places[place])
            traced.graph.erase_node(node)
    return traced


def coarsest(graph: fx.Graph) -> torch.dtype:
    """The dtype of the fewest digits that a graph computes in."""
    values = (value for node in graph.nodes for value in pytree.tree_leaves(node.meta.get("val")))
    dtypes = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


class Functions(TorchFunctionMode):
    """Puts gankern's functions in the place of torch's, and refuses what a graph of operators cannot say.

    Parameters
    ----------
    substitutes : mapping
        Functions of gankern's by those of torch's; where one returns NotImplemented torch's runs.
    tensors, leaves : sequence of Tensor
        What a forward reads, and what functions compute with where they are given that.
    """

    # Hooks read what no guard knows; the others make a tensor another one, without an operator that says so.
    _REFUSED: tuple[str, ...] = (
        "register_hook",
        "register_post_accumulate_grad_hook",
        "__set__",
        "__delete__",
        "set_",
        "resize_",
    )

    def __init__(
        self, substitutes: Mapping[Any, Callable[..., Any]], tensors: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self._substitutes = substitutes
        self._leaf_of = {id(t): leaf for t, leaf in zip(tensors, leaves, strict=True)}
        self._tensor_of = {id(leaf): t for t, leaf in zip(tensors, leaves, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_leaves(self._call, func, *args, **(kwargs or {}))

    def on_leaves(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with leaves; what it changed in place and returns goes by its own name again."""
        args, kwargs = pytree.tree_map(self._leaf, (args, kwargs))
        result = function(*args, **kwargs)
        return self._tensor_of.get(id(result), result)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, slice):
            return slice(*map(self._leaf, (value.start, value.stop, value.step)))
        return self._leaf_of.get(id(value), value)

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._REFUSED:
            what = getattr(getattr(func, "__self__", None), "__name__", name)
            raise Refused(f"the forward calls {name} of {what} on a tensor" if what != name else f"it calls {name}")
        if func in attention.SUBSTITUTES:
            return attention.SUBSTITUTES[func](*args, **kwargs)
        substitute = self._substitutes.get(func)
        result = NotImplemented if substitute is None else substitute(*args, **kwargs)
        if result is NotImplemented:
            return func(*args, **kwargs)
        # What follows may go by the order of memory: a mask is drawn in it. Statistics are written in the graph once.
        with torch.no_grad(), disable_proxy_modes_tracing():
            stock = func(*args, **kwargs)
        order = torch.channels_last if not stock.is_contiguous() and stock.dim() == 4 else torch.contiguous_format
        result = result if result.stride() == stock.stride() else result.contiguous(memory_format=order)
        if result.stride() == stock.stride():
            return result
        if func is F.batch_norm:
            raise Refused("a batch norm of images in an order of memory that is not planned")
        return func(*args, **kwargs)


@contextmanager
def _replaced(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a method calls `function` with itself and its arguments, in this thread alone."""
    kept: Any = vars(owner)[name]
    plain, me = getattr(kept, "__func__", kept), threading.get_ident()

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(plain, *args, **kwargs) if threading.get_ident() == me else plain(*args, **kwargs)

    setattr(owner, name, method if plain is kept else type(kept)(method))
    try:
        yield
    finally:
        setattr(owner, name, kept)


_PUTS = "the forward puts another tensor in the place of a buffer or parameter"


def _set_attribute(plain: Callable[..., None], module: nn.Module, name: str, value: Any) -> None:
    tables = [vars(module).get(table, ()) for table in ("_parameters", "_buffers")]
    if isinstance(value, Tensor) and any(name in table and table[name] is not value for table in tables):
        raise Refused(_PUTS)
    plain(module, name, value)


@contextmanager
def in_place_of(modules: Sequence[nn.Module], functions: Functions) -> Iterator[None]:
    """Functions compute with leaves where modules hold tensors; refused where a forward makes modules hold others.

    The modules themselves stay as they are: other threads may run them.
    """
    tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    # Autograd's Functions are none of those that a mode sees.
    apply = _replaced(torch.autograd.Function, "apply", functions.on_leaves)
    with apply, _replaced(nn.Module, "__setattr__", _set_attribute), functions:
        yield
    for table, kept in zip(tables, before, strict=True):
        if table.keys() != kept.keys() or any(table[name] is not t for name, t in kept.items()):
            table.clear()
            table.update(kept)
            raise Refused(_PUTS)


def leaf_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A new leaf that is a parameter, and requires a gradient, where the model is and does."""
    leaf = tensor.detach().requires_grad_(model.requires_grad)
    leaf._is_param = isinstance(model, nn.Parameter)
    return leaf
