"""Norms in derivations: each pass one operator, where stock composes up to thirty.

Ba et al. 2016 (layer norm), Wu and He 2018 (group norm), Ulyanov et al. 2016 (instance norm), Ioffe and Szegedy 2015
(batch norm).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import _library, backends
from gankern._layout import dense, like_layout, memory_format
from gankern.compiler import choice
from gankern.compiler.refusal import Refused
from gankern.ops.critic_layers.layer_norm import Rows


def _rows(input: Tensor, dims: int) -> Rows:
    shape = input.shape[-dims:]
    turned = dims == 3 and memory_format(input) == torch.channels_last
    return Rows(input.shape, math.prod(shape), turned)


def _flat(weight: Tensor | None, rows: Rows) -> Tensor | None:
    if weight is None:
        return None
    return (weight.permute(1, 2, 0) if rows.turned else weight).reshape(-1).contiguous()


def _shaped(grad: Tensor | None, weight: Tensor | None, rows: Rows) -> Tensor:
    if grad is None or weight is None:
        return torch.empty(0)
    if not rows.turned:
        return grad.view(weight.shape)
    c, h, w = weight.shape
    return grad.view(h, w, c).permute(2, 0, 1).contiguous()


def _in_rows(input: Tensor, dims: int) -> Tensor:
    """Images that lie so that a sample's values are together, the channels last where that is their order."""
    return dense(input) if dims == 3 else input.contiguous()


def _layer_norm(
    adapter: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    input = _in_rows(input, dims)
    rows = _rows(input, dims)
    output, mean, rstd = adapter.layer_norm_forward(rows.of(input), _flat(weight, rows), _flat(bias, rows), eps)
    return _like(rows.back(output), input), mean, rstd


def _layer_norm_backward(
    adapter: Any,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    input = _in_rows(input, dims)
    rows = _rows(input, dims)
    grad = like_layout(grad, input)
    dx, dw, db = adapter.layer_norm_backward(
        rows.of(grad), rows.of(input), _flat(weight, rows), mean, rstd, mask[1] or mask[2]
    )
    return _like(rows.back(dx), input), _shaped(dw, weight, rows), _shaped(db, weight, rows)


def _layer_norm_double_backward(
    adapter: Any,
    tangent: Tensor,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    input = _in_rows(input, dims)
    rows = _rows(input, dims)
    tangent, grad = like_layout(tangent, input), like_layout(grad, input)
    gg, dx, dw = adapter.layer_norm_double_backward(
        rows.of(tangent), rows.of(grad), rows.of(input), _flat(weight, rows), mean, rstd, mask[2]
    )
    return _like(rows.back(gg), input), _like(rows.back(dx), input), _shaped(dw, weight, rows)


def _values(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Images as (N, C, L), in their order of memory or in another's."""
    tensor = dense(tensor) if like is None else tensor.contiguous(memory_format=memory_format(like))
    return tensor.flatten(2) if tensor.dim() > 3 else tensor


def _group_norm(
    adapter: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    output, mean, rstd = adapter.group_norm_forward(_values(input), weight, bias, groups, eps)
    return _like(_ordered(output, input), input), mean, rstd


def _ordered(values: Tensor, input: Tensor) -> Tensor:
    """Values (N, C, L) in dense images' order of memory: torch's functions, where no kernel runs, have their own."""
    if values.stride() == _values(input).stride():
        return values
    return values.reshape(input.shape).contiguous(memory_format=memory_format(input))


def _like(values: Tensor, input: Tensor) -> Tensor:
    """Values in the memory order of dense images, as these: with the images' very strides, also of dims of one."""
    result = torch.empty(0, dtype=values.dtype, device=values.device)
    return result.set_(values.untyped_storage(), values.storage_offset(), input.shape, input.stride())


def _group_norm_backward(
    adapter: Any,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    dx, dw, db = adapter.group_norm_backward(
        _values(grad, input), _values(input), weight, mean, rstd, mask[1] or mask[2]
    )
    return _like(_ordered(dx, input), input), _or_nothing(dw), _or_nothing(db)


def _group_norm_double_backward(
    adapter: Any,
    tangent: Tensor,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    gg, dx, dw = adapter.group_norm_double_backward(
        _values(tangent, input), _values(grad, input), _values(input), weight, mean, rstd, mask[2]
    )
    return _like(_ordered(gg, input), input), _like(_ordered(dx, input), input), _or_nothing(dw)


def _laid(values: Tensor, input: Tensor) -> Tensor:
    """Values of dense images' shape with their very strides."""
    return values if values.stride() == input.stride() else _like(like_layout(values, input), input)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _batch_norm(
    adapter: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input = dense(input)
    output, *moments = adapter.batch_norm_forward(input, _contiguous(weight), _contiguous(bias), eps)
    return _laid(output, input), *moments


def _batch_norm_backward(
    adapter: Any, grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    grad = like_layout(grad, input)
    dx, dw, db = adapter.batch_norm_backward(grad, input, _contiguous(weight), mean, rstd, mask[1] or mask[2])
    return _laid(dx, input), _or_nothing(dw), _or_nothing(db)


def _batch_norm_double_backward(
    adapter: Any,
    tangent: Tensor,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    tangent, grad = like_layout(tangent, input), like_layout(grad, input)
    gg, dx, dw = adapter.batch_norm_double_backward(tangent, grad, input, _contiguous(weight), mean, rstd, mask[2])
    return _laid(gg, input), _laid(dx, input), _or_nothing(dw)


def _or_nothing(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else tensor


def _define(
    name: str,
    how: str,
    impls: tuple[Callable[..., Any], ...],
    rows_of: Callable[..., tuple[int, ...]],
    lay: Callable[..., Tensor],
    moments: int = 2,
) -> Any:
    """The three operators of a norm, whose implementations take an adapter first.

    `how` is the argument that says what is normalised together, if there is one, `rows_of` the shape of the moments,
    so many, `lay` how images must lie.
    """

    def forward_fake(input: Tensor, weight: Any, bias: Any, *options: Any) -> tuple[Tensor, ...]:
        shape = rows_of(input, *options[:-1])
        found = [input.new_empty(shape, dtype=torch.float64) for _ in range(moments)]
        return torch.empty_like(lay(input, *options[:-1])), *found

    def parameter(weight: Tensor | None, input: Tensor, wanted: bool) -> Tensor:
        return input.new_empty(0) if weight is None or not wanted else torch.empty_like(weight.contiguous())

    def backward_fake(grad: Tensor, input: Tensor, weight: Any, mean: Any, rstd: Any, *options: Any) -> Any:
        *size, mask = options
        grads = [parameter(weight, input, mask[1] or mask[2]) for _ in range(2)]
        return torch.empty_like(lay(input, *size)), *grads

    def double_fake(
        tangent: Tensor, grad: Tensor, input: Tensor, weight: Any, mean: Any, rstd: Any, *options: Any
    ) -> Any:
        *size, mask = options
        images = [torch.empty_like(lay(input, *size)) for _ in range(2)]
        return *images, parameter(weight, input, mask[2])

    how = f"int {how}, " if how else ""
    rest = f"Tensor input, Tensor? weight, Tensor mean, Tensor rstd, {how}bool[3] mask"
    found = ", Tensor" * moments
    schemas = (
        f"{name}(Tensor input, Tensor? weight, Tensor? bias, {how}float eps) -> (Tensor{found})",
        f"{name}_backward(Tensor grad, {rest}) -> (Tensor, Tensor, Tensor)",
        f"{name}_double_backward(Tensor tangent, Tensor grad, {rest}) -> (Tensor, Tensor, Tensor)",
    )
    fakes: tuple[Callable[..., Any], ...] = (forward_fake, backward_fake, double_fake)
    ops = tuple(map(_library.define, schemas, map(_selected, impls, range(3)), fakes))
    IMPLEMENTATIONS.update(zip(ops, impls, strict=True))
    return ops


#: What the operators run, a function of an adapter and their arguments.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def _selected(impl: Callable[..., Any], place: int) -> Callable[..., Any]:
    """An implementation on the adapter for the input, which is the argument at this place."""
    return lambda *args: impl(backends.select("critic_layers", args[place]), *args)


LAYER_NORM = _define(
    "layer_norm",
    "dims",
    (_layer_norm, _layer_norm_backward, _layer_norm_double_backward),
    lambda input, dims: (math.prod(input.shape[:-dims]),),
    _in_rows,
)
GROUP_NORM = _define(
    "group_norm",
    "groups",
    (_group_norm, _group_norm_backward, _group_norm_double_backward),
    lambda input, groups: (input.size(0), groups),
    lambda input, groups: dense(input),
)


BATCH_NORM = _define(
    "batch_norm",
    "",
    (_batch_norm, _batch_norm_backward, _batch_norm_double_backward),
    lambda input: (input.size(1),),
    dense,
    3,
)
NORMS = (LAYER_NORM, GROUP_NORM, BATCH_NORM)


def _track(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    for running, moment in ((running_mean, mean), (running_var, var)):
        # As torch's kernels have it: rounded once. Nor do these count the write, since graphs that were made before
        # have saved the statistics, and do not read them.
        running.data.copy_(torch.add(moment * momentum, running, alpha=1 - momentum))


TRACK = _library.define(
    "batch_norm_track(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum) -> ()",
    _track,
    lambda *_: None,
)


class _Norm(torch.autograd.Function):
    """`size` are the operators' own arguments, and `moments` is called with the moments other than `rstd`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ops: Any,
        size: tuple[int, ...],
        eps: float,
        moments: Callable[..., None] | None = None,
    ) -> Tensor:
        output: Tensor
        output, mean, rstd, *others = ops[0](input, weight, bias, *size, eps)
        if moments is not None:
            moments(mean, *others)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.ops, ctx.size, ctx.biased = ops, size, bias is not None
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if grad is None:
            return None, None, None, *rest
        input, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = _NormBackward.apply(grad, input, weight, mean, rstd, ctx.ops, ctx.size)
        return dx, None if weight is None else dw, db if ctx.biased else None, *rest


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        ops: Any,
        size: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, input, weight, mean, rstd)
        ctx.ops, ctx.size = ops, size
        ctx.set_materialize_grads(False)
        # Which of them anybody reads is seen in the graph.
        grads: tuple[Tensor, Tensor, Tensor] = ops[1](grad, input, weight, mean, rstd, *size, [True, True, True])
        return grads

    @staticmethod
    def backward(
        ctx: Any, tangent: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if of_weight is not None or of_bias is not None:
            raise Refused("its gradient depends on the gradient of a norm's weight")
        if tangent is None:
            return None, None, None, *rest
        if torch.is_grad_enabled():
            raise Refused("a third derivative of a norm")
        grad, input, weight, mean, rstd = ctx.saved_tensors
        mask = [True, True, weight is not None]
        gg, dx, dw = ctx.ops[2](tangent, grad, input, weight, mean, rstd, *ctx.size, mask)
        return gg, dx, None if weight is None else dw, *rest


def _takes(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    params = [t for t in (weight, bias) if t is not None]
    return bool(
        input.numel()
        and input.dtype in (torch.float32, torch.float64)
        and all(t.dtype == input.dtype for t in params)
        and (weight is not None or bias is None)
        and not torch.is_autocast_enabled(input.device.type)
    )


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """:func:`torch.nn.functional.layer_norm`; NotImplemented where stock runs."""
    dims = len(normalized_shape)
    if not dims or tuple(input.shape[-dims:]) != tuple(normalized_shape) or not _takes(input, weight, bias):
        return NotImplemented
    return _Norm.apply(input, weight, bias, LAYER_NORM, (dims,), eps)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """:func:`torch.nn.functional.group_norm`; NotImplemented where stock runs."""
    fits = input.dim() >= 3 and num_groups > 0 and input.size(1) % num_groups == 0
    if not fits or input.numel() == num_groups * input.size(0) or not _takes(input, weight, bias):
        return NotImplemented
    return _Norm.apply(input, weight, bias, GROUP_NORM, (num_groups,), eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """:func:`torch.nn.functional.instance_norm` without running statistics; NotImplemented where stock runs."""
    if running_mean is not None or running_var is not None or not use_input_stats:
        return NotImplemented
    return group_norm(input, input.size(1), weight, bias, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """:func:`torch.nn.functional.batch_norm` by the batch's own statistics; NotImplemented where stock runs."""
    statistics = [t for t in (running_mean, running_var) if t is not None]
    params = [t for t in (weight, bias) if t is not None]
    if (
        not training
        or (running_mean is None) != (running_var is None)
        or not isinstance(momentum, float | int)
        or not eps > 0
        or input.dim() < 2
        # In other orders torch's result need not lie as the operators' does.
        or not (input.is_contiguous() or memory_format(input) == torch.channels_last)
        or input.numel() <= input.size(1)
        or not _takes(input, weight, bias)
        or any(t.dtype != input.dtype or t.shape != (input.size(1),) for t in (*statistics, *params))
        or any(t.requires_grad for t in statistics)
        # Of weights that are computed, the penalty may depend on the gradient.
        or not all(t.is_leaf for t in params)
    ):
        return NotImplemented

    def track(mean: Tensor, var: Tensor) -> None:
        if running_mean is not None:
            TRACK(running_mean, running_var, mean, var, float(momentum))

    return _Norm.apply(input, weight, bias, BATCH_NORM, (), eps, track)


#: What a derivation puts in the place of torch's functions, of the first order too.
SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
}


def _where_it_pays(function: Callable[..., Any]) -> Callable[..., Any]:
    """A substitute for the first order, where torch has kernels of its own."""

    @functools.wraps(function)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input, *args, **kwargs) if choice.norm_pays(input) else NotImplemented

    return run


FIRST_ORDER = {func: _where_it_pays(substitute) for func, substitute in SUBSTITUTES.items()}
SECOND_ORDER = SUBSTITUTES | {F.batch_norm: batch_norm}
