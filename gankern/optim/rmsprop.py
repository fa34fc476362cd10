"""RMSProp whose kernel also clips the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import _functional
from torch.optim.optimizer import ParamsT

from gankern._autograd import is_plain
from gankern.ops import _check
from gankern.ops.weight_clip import autograd, reference

# Of a group, those of torch's function.
_OPTIONS = {"lr", "alpha", "eps", "weight_decay", "momentum", "centered", "foreach", "maximize", "differentiable"}
_OPTIONS |= {"capturable"}


class RMSprop(torch.optim.RMSprop):
    """RMSProp with weight clipping: update and clamp of all parameters in one pass over memory.

    ``torch.optim.RMSprop``'s signature, arithmetic and ``state_dict`` (which loads either way), plus ``clip``. One
    kernel call for each parameter group on the CPU (float32, float64, bfloat16), ``torch._foreach`` elsewhere.

    Parameters
    ----------
    params : iterable
        Parameters, or dicts that define parameter groups; every option can be set by group.
    lr : float or Tensor, optional
        Learning rate; a tensor must have one element.
    alpha : float, optional
        Smoothing constant of the average of squared gradients.
    eps : float, optional
        Added to the root of that average.
    weight_decay : float, optional
        L2 penalty.
    momentum : float, optional
    centered : bool, optional
        Whether to divide by an estimate of the gradient's standard deviation.
    capturable : bool, optional
        Keep the count of steps on the device, so that the step can be captured in a CUDA graph; the parameters must
        then be on one.
    foreach : bool or None, optional
        Accepted for compatibility; the parameters always go to the kernel as one list.
    maximize : bool, optional
        Whether to ascend.
    differentiable : bool, optional
        Let autograd record the step, which then runs as torch's.
    clip : float, Tensor or None, optional
        Parameters are clamped to ``[-clip, clip]`` after the update; with None they are not. As with `lr`, a tensor of
        one element on the device is read there: a captured graph follows what is written into it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    ``v = alpha * v + (1 - alpha) * g**2``, then ``p = clamp(p - lr * g / (sqrt(v) + eps), -clip, clip)``. Parameters
    without a gradient are left alone: they are not clipped either. A checkpoint of ``torch.optim.RMSprop`` has no
    ``clip``: loading it keeps the group's own. Results have the same bits on every run, for any number of threads.

    References
    ----------
    Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017, algorithm 1, lines 6 and 7.
    Hinton, "Neural Networks for Machine Learning", 2012, lecture 6e.

    Examples
    --------
    >>> optimizer = gankern.optim.RMSprop(critic.parameters(), lr=5e-5, clip=0.01)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        clip: float | Tensor | None = None,
    ) -> None:
        _check_options(
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
                "capturable": capturable,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "clip": clip,
            }
        )
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )
        self.defaults["clip"] = clip
        for group in self.param_groups:
            group.setdefault("clip", clip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            _check_options({k: v for k, v in param_group.items() if k not in ("params", "param_names")})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = [group.get("clip") for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            group.setdefault("clip", own[i] if i < len(own) else None)

    def step(self, closure: Any = None) -> Any:
        """Update and clip the parameters.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        Any
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        square_avgs: list[Tensor] = []
        grad_avgs: list[Tensor] = []
        momentum_buffers: list[Tensor] = []
        steps: list[Tensor] = []
        is_complex = self._init_group(group, params, grads, square_avgs, momentum_buffers, grad_avgs, steps)
        if not params:
            return
        if is_complex or group["differentiable"] or not is_plain(*params, *grads):
            states = (params, grads, square_avgs, grad_avgs, momentum_buffers, steps)
            _step_by_torch(*states, group, is_complex)
            return
        if group["capturable"]:
            if any(p.device.type == "cpu" for p in params):
                raise ValueError("capturable must be False for parameters on the CPU; got True")
            torch._foreach_add_(steps, 1)
        else:
            # A tensor: a number would be wrapped into one for every step.
            torch._foreach_add_(steps, torch.ones((), device="cpu"), alpha=1.0)
        lr, lr_tensor = _number_or_tensor(group["lr"])
        clip, clip_tensor = _number_or_tensor(group["clip"])
        autograd.rmsprop_clip_(
            params,
            grads,
            square_avgs,
            grad_avgs,
            momentum_buffers,
            lr,
            float(group["alpha"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            float(group["momentum"]),
            group["maximize"],
            clip,
            lr_tensor,
            clip_tensor,
        )


def _step_by_torch(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
    is_complex: bool,
) -> None:
    """What the kernels know nothing of: a recorded step, complex parameters, tensors of other people's types."""
    clip = group["clip"]
    if is_complex and clip is not None:
        raise TypeError("params must be real where clip is given; got a complex parameter")
    options = {name: value for name, value in group.items() if name in _OPTIONS}
    lists = (params, grads, square_avgs, grad_avgs, momentum_buffers, steps)
    _functional.rmsprop(*lists, has_complex=is_complex, **options)
    if clip is not None:
        reference.clamp_(params, clip)


def _number_or_tensor(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A learning rate or bound as the operator takes it: one on the device of the parameters is not read here."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return 0.0, value
    return None if value is None else float(value), None


def _check_options(options: dict[str, Any]) -> None:
    lr = options.get("lr", 0)
    if not isinstance(lr, Tensor):
        _check.number("lr", lr, low=0)
    elif lr.numel() != 1:
        raise ValueError(f"lr must have one element; got shape {tuple(lr.shape)}")
    for name in ("alpha", "eps", "weight_decay", "momentum"):
        _check.number(name, options.get(name, 0), low=0)
    for name in ("centered", "capturable", "maximize", "differentiable"):
        _check.boolean(name, options.get(name, False))
    if options.get("foreach") is not None:
        _check.boolean("foreach", options["foreach"])
    clip = options.get("clip")
    if isinstance(clip, Tensor) and clip.numel() != 1:
        raise ValueError(f"clip must have one element; got shape {tuple(clip.shape)}")
    if clip is not None and (not isinstance(clip, Tensor) or clip.device.type == "cpu"):
        _check.number("clip", float(clip) if isinstance(clip, Tensor) else clip, low=0)
