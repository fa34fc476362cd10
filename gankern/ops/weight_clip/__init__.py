"""In-place weight clipping, alone and behind an RMSProp update (the kernel of :class:`gankern.optim.RMSprop`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gankern.ops import _check
from gankern.ops.weight_clip import autograd

__all__ = ["clip_weights_"]

Clippable = nn.Module | Tensor | Iterable[Tensor] | Iterable[Mapping[str, Any]]
T = TypeVar("T", bound=Clippable)


def clip_weights_(module_or_params: T, c: float, *, exclude: type[nn.Module] | tuple[type[nn.Module], ...] = ()) -> T:
    """Clamp parameters to ``[-c, c]`` in place, all in one kernel call.

    Parameters
    ----------
    module_or_params : Module, Tensor, iterable of Tensor, or iterable of dict
        All parameters of a module; a tensor; tensors such as ``module.parameters()``; or an optimizer's
        ``param_groups``. float32, float64 or bfloat16 on the CPU run as a kernel, other floating-point dtypes and
        devices by the reference; any layout.
    c : float
        Bound, finite and not negative.
    exclude : type or tuple of types, optional
        Modules of these types, e.g. ``(nn.LayerNorm, nn.BatchNorm2d)``, keep their parameters, submodules' included.
        Only for a module; for a finer choice pass the tensors themselves.

    Returns
    -------
    Module, Tensor or iterable
        ``module_or_params``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.
    RuntimeError
        Where elements of a tensor share memory (an expanded one), as from ``Tensor.clamp_``.

    Notes
    -----
    Autograd does not record the call. Version counters go up, so that a backward pass which still needs the old
    values raises torch's usual error. A NaN stays a NaN.

    References
    ----------
    Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017, algorithm 1, line 7.
    """
    c = _check.number("c", c, low=0)
    types = exclude if isinstance(exclude, tuple) else (exclude,)
    if not all(isinstance(t, type) and issubclass(t, nn.Module) for t in types):
        raise TypeError(f"exclude must be a type of module or a tuple of them; got {exclude!r}")
    if isinstance(module_or_params, nn.Module):
        source: Any = _parameters(module_or_params, types)
    elif types:
        raise ValueError(f"exclude needs a module as module_or_params; got {type(module_or_params).__name__}")
    else:
        source = module_or_params
    autograd.clip(_tensors(source), c)
    return module_or_params


def _parameters(module: nn.Module, exclude: tuple[type[nn.Module], ...]) -> Iterator[Tensor]:
    if not exclude:
        yield from module.parameters()
    elif not isinstance(module, exclude):
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _parameters(child, exclude)


def _tensors(source: Any) -> list[Tensor]:
    if isinstance(source, (Mapping, str)) or not isinstance(source, Iterable):
        raise TypeError(
            "module_or_params must be a Module, a Tensor, tensors or an optimizer's param_groups; "
            f"got {type(source).__name__}"
        )
    tensors: list[Tensor] = []
    for item in [source] if isinstance(source, Tensor) else source:
        # The full check only where it fails: checks are most of the time that small tensors take.
        if isinstance(item, Tensor) and item.is_floating_point() and item.layout is torch.strided:
            tensors.append(item)
        elif isinstance(item, Mapping) and "params" in item:
            tensors += _tensors(item["params"])
        else:
            _check.floating("module_or_params", item)
    return tensors
