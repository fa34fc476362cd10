"""Whole training steps, planned."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from gankern import compiler
from gankern.backends import Explanation

P = ParamSpec("P")
T = TypeVar("T")
_lock = threading.Lock()


def step(function: Callable[P, T]) -> Step[P, T]:
    """Plan a training step whole: losses, penalty, backward passes and updates as one flat program.

    A decorator of a function or method with ordinary code in it. From the third call on, what it computes between the
    calls of optimizers is replayed without autograd, without a call from Python for each module, with gankern's kernels
    for convolutions, norms and activations. Optimizers are as ever: learning rates, state and ``state_dict`` are
    theirs; torch's Adam, AdamW, RMSprop and SGD with momentum update all parameters by one call. Parameters, gradients,
    buffers, optimizer states, random numbers and what the function returns are those of the function run as it is.

    At each call it is made sure that nothing has changed that the program depends on: shapes, layers, modes, flags,
    numbers and whatever else the function and its modules read. Another program is made where something has; and
    where one cannot be made, the function runs as it is: :func:`gankern.explain` tells why. That is so where it goes by
    the values of tensors, prints, changes what outlives it other than tensors, reads gradients, or has hooks on what
    it uses. On a CPU it is also so where that is as fast: without a penalty, a kernel or an update by one call. On a
    GPU what lies between updates is a CUDA graph each, of torch's operators.

    Parameters
    ----------
    function : callable
        For example a critic's or a generator's step. It may call ``zero_grad`` of modules and optimizers, ``step`` of
        torch's and gankern's optimizers, ``backward``, ``torch.autograd.grad``, gankern's penalties and
        :func:`gankern.clip_weights_`.

    Returns
    -------
    Step
        To be called as the function is.

    Notes
    -----
    The first run of each program is compared with the function's own, from the same state, and the program is dropped
    where they differ by more than rounding. To make a program takes a second or two. ``GANKERN_PLAN=0`` switches
    programs off. In ``torch.compile`` and under ``gankern.capture`` the function is what it was.

    Examples
    --------
    >>> @gankern.step
    ... def critic_step(real):
    ...     with torch.no_grad():
    ...         fake = generator(torch.randn(len(real), 64))
    ...     loss = critic(fake).mean() - critic(real).mean() + gankern.gradient_penalty(critic, real, fake)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss.detach()
    >>> for real in loader:
    ...     loss = critic_step(real)
    >>> print(gankern.explain(critic_step))
    """
    return Step(function)


class Step(Generic[P, T]):
    """A function whose calls run by plans: made by :func:`step`."""

    def __init__(self, function: Callable[P, T]) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable; got {type(function).__name__}")
        functools.update_wrapper(self, function)
        self._function = function
        self._plans: Any = None
        #: Calls that run as they are without a look at them.
        self.idle = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        if self.idle > 0:
            self.idle -= 1
            return self._function(*args, **kwargs)
        if not compiler.enabled() or compiler.penalty_in_step.get() is not None:
            return self._function(*args, **kwargs)
        if self._plans is None:
            from gankern.compiler.steps import Plans

            # Of two threads one makes them.
            with _lock:
                self._plans = self._plans or Plans(step=self)
        result: T = self._plans.run(self._function, args, kwargs)
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __deepcopy__(self, memo: Any) -> Step[P, T]:
        """As of functions, there are no copies."""
        return self

    __copy__ = lambda self: self  # noqa: E731

    def __reduce__(self) -> str:
        """As functions, steps are found by their names."""
        name: str = vars(self)["__qualname__"]
        return name

    def explain(self) -> Explanation:
        """Tell what runs the calls, and why others did not: the same as ``gankern.explain(step)``."""
        name = f"step {getattr(self._function, '__qualname__', type(self._function).__qualname__)}"
        if not compiler.enabled():
            return Explanation(name, "python", {"plan": "switched off"})
        if self._plans is None:
            return Explanation(name, "python", {"plan": "no call yet"})
        found: Explanation = self._plans.explain(name)
        return found
