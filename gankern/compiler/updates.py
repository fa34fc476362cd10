"""What a planned step does between its programs: gradients come to the parameters, optimizers and modules are called.

Optimizers are torch's and gankern's own, with the state, the learning rate and the ``state_dict`` that they have. Where
one of torch's would go from parameter to parameter, the same update of all of them is one call:

    for p: exp_avg.lerp_(grad, ...); exp_avg_sq.mul_(...); ...; p.addcdiv_(...)    ->    torch._fused_adam_(params, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from gankern.compiler.refusal import Refused
from gankern.ops.weight_clip.autograd import rmsprop_clip_


def check_opaque(thing: Any) -> None:
    if isinstance(thing, Optimizer):
        if not type(thing).__module__.startswith(("torch.optim.", "gankern.optim")):
            raise Refused(f"{type(thing).__name__} is an optimizer that neither torch nor gankern has")
        if any(group.get("differentiable") for group in thing.param_groups):
            raise Refused("an optimizer that is differentiable")
    if not runs_as_itself(thing):
        raise Refused(f"a hook on {type(thing).__name__}, or a method of it that was replaced")


def runs_as_itself(thing: Any) -> bool:
    """Whether nobody else's code runs in an opaque call."""
    own = vars(thing)
    if isinstance(thing, nn.Module):
        as_torch = "zero_grad" not in own and type(thing).zero_grad is nn.Module.zero_grad
        return as_torch and not isinstance(thing, DistributedDataParallel)
    hooks = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
    globals_ = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    step = own.get("step")
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return not (any(hooks) or any(globals_) or replaced or "zero_grad" in own)


def is_slow(thing: Any) -> bool:
    """Whether one call is so much faster than its own for each parameter that a plan's guards cost less (AMD EPYC)."""
    return type(thing) in (torch.optim.Adam, torch.optim.AdamW) and all(map(_is_plain, thing.param_groups))


def call_opaque(thing: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """A call of an optimizer's or module's ``step`` or ``zero_grad``."""
    if name != "step" or args or kwargs or not _update(thing):
        getattr(thing, name)(*args, **kwargs)


def _update(optimizer: Any) -> bool:
    """Make an optimizer's step by one call for each group of parameters; False where it is to make it itself."""
    update = _UPDATES.get(type(optimizer))
    if update is None:
        return False
    found = []
    for group in optimizer.param_groups:
        if not _is_plain(group):
            return False
        pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
        if pairs:
            call = update(optimizer.state, group, pairs)
            if call is None:
                return False
            found.append(call)
    for op, args, kwargs, steps in found:
        if steps:
            torch._foreach_add_(steps, 1)
        op(*args, **kwargs)
        # Torch's fused operators count no versions.
        torch.autograd.graph.increment_version(args[0])
    if "step" in vars(optimizer):
        # A scheduler's wrapper notes the call.
        optimizer._opt_called = True
    return True


_Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether numbers say what to do, and nothing of it is asked for."""
    flags = any(group.get(flag) for flag in ("foreach", "fused", "capturable", "differentiable"))
    return not flags and not any(isinstance(value, Tensor) for value in (group["lr"], *group.get("betas", ())))


def _states(states: Any, pairs: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[list[Tensor]] | None:
    """Parameters, gradients and states by name, all of one type and order in memory; None where they are not."""
    kind = pairs[0][0].dtype
    if kind not in (torch.float32, torch.float64):
        return None
    rows = []
    for p, grad in pairs:
        own = states.get(p)
        if not own or grad.layout is not torch.strided or not p.is_cpu or not (p.is_contiguous() or is_dense(p)):
            return None
        # Kernels go through memory from its beginning.
        row, strides = [p, grad, *map(own.get, names)], p.stride()
        if any(t is None or t.dtype is not kind or t.stride() != strides for t in row):
            return None
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]


def _steps(states: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor] | None:
    found = [states[p].get("step") for p, _ in pairs]
    plain = all(type(t) is Tensor and t.dtype is torch.float32 and t.device.type == "cpu" for t in found)
    return found if plain else None


def _adam(states: Any, group: dict[str, Any], pairs: Sequence[tuple[Tensor, Tensor]]) -> _Call | None:
    names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
    columns = _states(states, pairs, names)
    steps = None if columns is None else _steps(states, pairs)
    if columns is None or steps is None:
        return None
    beta1, beta2 = group["betas"]
    how = {"lr": group["lr"], "beta1": beta1, "beta2": beta2}
    how |= {name: group[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
    op: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    return op, (*columns[:4], columns[4] if group["amsgrad"] else [], steps), how, steps


def _sgd(states: Any, group: dict[str, Any], pairs: Sequence[tuple[Tensor, Tensor]]) -> _Call | None:
    # Without momentum torch's own has one operator for each parameter.
    columns = _states(states, pairs, ["momentum_buffer"]) if group["momentum"] != 0 else None
    if columns is None:
        return None
    how = {name: group[name] for name in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
    op: Any = torch._fused_sgd_
    return op, tuple(columns), {**how, "is_first_step": False}, []


def _rmsprop(states: Any, group: dict[str, Any], pairs: Sequence[tuple[Tensor, Tensor]]) -> _Call | None:
    names = ["square_avg"] + (["grad_avg"] if group["centered"] else [])
    names += ["momentum_buffer"] if group["momentum"] > 0 else []
    columns = _states(states, pairs, names)
    steps = None if columns is None else _steps(states, pairs)
    if columns is None or steps is None:
        return None
    others = dict(zip(names, columns[2:], strict=True))
    lists = (*columns[:2], *(others.get(name, []) for name in ("square_avg", "grad_avg", "momentum_buffer")))
    how = tuple(float(group[name]) for name in ("lr", "alpha", "eps", "weight_decay", "momentum"))
    return rmsprop_clip_, (*lists, *how, group["maximize"], None, None, None), {}, steps


_UPDATES = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
    torch.optim.RMSprop: _rmsprop,
}


def accumulate(found: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
    """What autograd does at leaves, with a gradient for each that may be kept if it is fresh."""
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    copies: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor, grad, fresh in found:
        old = tensor.grad
        if old is None:
            if not _lies_as(tensor, grad):
                tensor.grad = _like(tensor, grad)
            elif fresh:
                tensor.grad = grad
            else:
                copies[0].append(tensor)
                copies[1].append(grad)
        elif old.layout is torch.strided:
            sums[0].append(old)
            sums[1].append(grad)
        else:
            tensor.grad = grad + old
    for tensor, copy in zip(copies[0], torch._foreach_mul(copies[1], 1) if copies[0] else (), strict=True):
        tensor.grad = copy
    if sums[0]:
        torch._foreach_add_(*sums)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _lies_as(tensor: Tensor, grad: Tensor) -> bool:
    if grad.stride() == tensor.stride():
        return tensor.is_contiguous() or is_dense(tensor)
    if not is_dense(tensor):
        return grad.is_contiguous()
    return all(a == b for a, b, n in zip(tensor.stride(), grad.stride(), tensor.shape, strict=True) if n != 1)


def _like(tensor: Tensor, grad: Tensor) -> Tensor:
    if is_dense(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    return grad.clone(memory_format=torch.contiguous_format)
