"""Fusing the modules of models as people write them."""

from __future__ import annotations

import functools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gankern import _stock, backends, compiler
from gankern.backends import Explanation
from gankern.nn import block
from gankern.ops.critic_layers.chain import add_sequential

M = TypeVar("M", bound=nn.Module)

#: Modules that kernels may run, or that run faster in another order of memory.
FUSABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Run:
    """Modules that a plan runs, or would.

    Attributes
    ----------
    module : str
        Qualified name of the module whose calls are planned.
    names : tuple of str
        Names in it of the convolutions and batch norms that it calls.
    reason : str or None
        Why they stay stock, with the line of code where it is one's; None where they are fused.
    pointwise : str
        What runs between the kernels: "torch" or "inductor"; "torch: " and why where Inductor was asked for.
    plans : str
        How many plans of the module were made, used and evicted, and why others were not made; empty before a call.
    calls : tuple of Call
        What the plan that ran last calls: each kernel with the backend, the line of code and the module.
    """

    module: str
    names: tuple[str, ...]
    reason: str | None
    pointwise: str = "torch"
    plans: str = field(default="", compare=False)
    calls: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        from gankern.compiler.report import as_lines

        lines = [f"{self.module or 'the module'}: {self.reason or 'fused'}"]
        lines += textwrap.wrap(f"of it: {', '.join(self.names)}", 78, initial_indent="  ", subsequent_indent="  ")
        lines += [f"  between the kernels: {self.pointwise}"] if self.pointwise != "torch" else []
        lines += [f"  plans: {self.plans}"] if self.plans else []
        return "\n".join([*lines, *as_lines(self.calls)] if self.calls else lines)


class FusionReport(list[Run]):
    """What :func:`fusion_report` lists; printed, with the kernels that run each line of code."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing to fuse"


class Fused(nn.Module):
    """A module whose calls run by plans.

    Its ``forward`` is stock's, for what traces or scripts it.
    """

    _gankern_pointwise = "torch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not compiler.enabled() or _stock.is_asked():
            return super().__call__(*args, **kwargs)
        from gankern.compiler.fused import Unplanned, plans_of

        plans = plans_of(self)
        if plans.idle:
            plans.idle -= 1
            with _stock.forwards():
                return super().__call__(*args, **kwargs)
        try:
            return plans.run(self, args, kwargs)
        except Unplanned as unplanned:
            way = unplanned
        if not way.whole:
            output = super().__call__(*args, **kwargs)
        else:
            with _stock.forwards():
                output = super().__call__(*args, **kwargs)
        if way.known is not None:
            way.known.note(output)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the class that `fuse` has extended, and are fused again."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        args = tuple(stock_class(type(self)) if arg is type(self) else arg for arg in args)
        return (_rebuild, (function, args, self._gankern_pointwise), *rest)


class FusedSyncBatchNorm(Fused):
    """A SyncBatchNorm, which stock runs on GPUs only."""

    def __call__(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or torch.compiler.is_compiling() or block.has_hooks(self):
            output: Tensor = nn.Module.__call__(self, input)
            return output
        return block.run_fused(input, None, self, "none", 0.0)  # type: ignore[arg-type]


def fuse(module: M, *, pointwise: str = "torch") -> M:
    """Let a model run by plans, in place: its forward and backward passes as flat programs of gankern's kernels.

    From the third call of a kind on, a call replays the graph that autograd derives of the model's own ``forward``:
    convolutions in channels_last, batch norms and activations as one kernel, without a call from Python for each
    module. Modules, parameters, buffers, their names, hooks and ``state_dict`` keys stay as they are, and so do copies
    and pickles. Only the class of modules that hold convolutions or batch norms changes, to a subclass of the same
    name.

    What cannot be planned runs stock: :func:`fusion_report` tells, and why. At each call it is made sure that nothing
    that the plan depends on has changed: no hooks, no methods or functions that were replaced, no subclasses of
    tensors, no modes or transforms. Traced, scripted, exported or compiled, a fused model is the stock one. Where the
    whole cannot be planned its parts are. A gradient that is differentiated (``create_graph=True``) is stock's own, of
    a forward that runs again, after which calls of that kind run stock.

    Parameters
    ----------
    module : nn.Module
    pointwise : {"torch", "inductor"}, optional
        What runs between the kernels, of the penalty's plan, too, where the module is its critic: torch's own operators
        or, compiled by Inductor, several neighbours in one go. Inductor takes seconds to some tens of seconds at the
        first call of each kind and a C++ compiler (on a GPU, Triton), and its results are torch's to rounding only.
        Random numbers are drawn by torch's operators, and buffers written by them, as ever: masks stay stock's. Where
        compiling fails, or leaves something else, torch's operators run, and :func:`fusion_report` says why. A module
        that is fused already is fused anew where it was fused with another choice.

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.
    ValueError
        If pointwise is something else.

    Notes
    -----
    A SyncBatchNorm of a fused model runs on the CPU, too, where stock has none. ``DistributedDataParallel`` refuses to
    wrap one there: wrap the model with its BatchNorm, convert what is inside by
    ``nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)``, and fuse then.

    A model that is saved whole, by ``torch.save(model)`` or ``pickle``, needs gankern where it is loaded; one whose
    ``state_dict`` is saved, exported or undone by :func:`unfuse` does not.
    """
    compiler.check_pointwise(pointwise)
    for child in _modules(module):
        if _is_fusable(child) and cannot_extend(stock_class(type(child))) is None:
            child.__class__ = _fused_class(stock_class(type(child)), pointwise)
    return module


def unfuse(module: M) -> M:
    """Undo :func:`fuse`, in place.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    nn.Module
        The same module, with nothing of gankern in its classes.

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.
    """
    for child in _modules(module):
        if isinstance(child, Fused):
            child.__class__ = stock_class(type(child))  # type: ignore[assignment]
    return module


def _is_fusable(module: nn.Module) -> bool:
    """Whether a module calls others that are worth it."""
    if isinstance(module, (*_CONTAINERS, *FUSABLE)):
        return type(module) is nn.SyncBatchNorm
    # Convolutions may be of functions.
    return any(isinstance(child, FUSABLE) for child in module.modules()) or any(
        p.dim() > 3 for p in module.parameters()
    )


def _rebuild(function: Callable[..., Any], args: tuple[Any, ...], pointwise: str = "torch") -> Any:
    module = function(*args)
    module.__class__ = _fused_class(type(module), pointwise)
    return module


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `fuse` made this of; itself if it did not."""
    return kind.__dict__.get("_gankern_stock", kind)


def _fused_class(kind: Any, pointwise: str = "torch") -> Any:
    """The class of a fused module, under the same name."""
    return _made_class(kind, pointwise)


@functools.cache
def _made_class(kind: Any, pointwise: str) -> Any:
    names = {n: getattr(kind, n) for n in ("__module__", "__qualname__", "__doc__")} | {"_gankern_stock": kind}
    names["_gankern_pointwise"] = pointwise
    base = FusedSyncBatchNorm if kind is nn.SyncBatchNorm else Fused
    made = types.new_class(kind.__name__, (base, kind), {}, lambda namespace: namespace.update(names))
    if kind is nn.Sequential:
        add_sequential(made)
    return made


def cannot_extend(kind: type[nn.Module]) -> str | None:
    """Why a class can have no subclass that its author did not write."""
    for base in kind.__mro__:
        if "__init_subclass__" in base.__dict__ and base is not object and base.__module__ != "typing":
            return f"{base.__name__} watches its subclasses"
    try:
        _fused_class(kind)
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    return None


def _modules(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    return list(module.modules())


def fusion_report(module: nn.Module) -> FusionReport:
    """List the convolutions and batch norms of a model by the modules whose calls are planned, and why others are not.

    Reported as in its last call; a module that was not called, or not often enough for a plan, as fused. Printed, it
    tells of the plan that ran last which kernel runs which line of code, and why torch's runs the rest.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    FusionReport
        A list of `Run`.

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.
    """
    _modules(module)
    return FusionReport(_report(module, ""))


def _report(module: nn.Module, name: str) -> Iterator[Run]:
    leaves = [n for n, child in module.named_modules() if isinstance(child, FUSABLE)]
    if not leaves:
        return
    if isinstance(module, FUSABLE):
        yield Run(name, ("",), "it stands alone")
        return
    reason = _reason(module)
    if reason is None or not any(_is_fusable(child) for child in module.children()):
        yield Run(name, tuple(leaves), reason, _pointwise(module), *_plans(module))
        return
    own = [n for n, child in module.named_children() if isinstance(child, FUSABLE)]
    if own:
        yield Run(name, tuple(own), reason, "torch", *_plans(module))
    for child_name, child in module.named_children():
        if not isinstance(child, FUSABLE):
            yield from _report(child, f"{name}.{child_name}".lstrip("."))


def _pointwise(module: nn.Module) -> str:
    """What runs between the kernels of a module's plans."""
    if not isinstance(module, Fused) or module._gankern_pointwise == "torch":
        return "torch"
    plans = _known(module)
    return str(module._gankern_pointwise) if plans is None else str(plans.pointwise())


def _reason(module: nn.Module) -> str | None:
    """Why a module's calls are not planned; None if they are, or will be."""
    if isinstance(module, _CONTAINERS):
        return "it has no forward"
    if not isinstance(module, Fused):
        return cannot_extend(type(module)) or "not fused: call gankern.fuse"
    plans = _known(module)
    return None if plans is None else plans.reason


def _known(module: nn.Module) -> Any:
    """The plans of a module that was called, without bringing Dynamo in."""
    found = sys.modules.get(f"{compiler.__name__}.fused")
    return None if found is None else found.known_plans(module)


def _plans(module: nn.Module) -> tuple[str, tuple[Any, ...]]:
    plans = _known(module)
    return ("", ()) if plans is None else (str(plans), plans.calls)


def explain_fused(found: Explanation, module: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """What :func:`gankern.explain` tells of :func:`fuse`: its report."""
    report = fusion_report(module)
    chosen = "plans" if any(run.reason is None for run in report) else None
    return Explanation(found.op, chosen, notes=tuple(str(report).splitlines()))


backends.register_explainer("fuse", explain_fused)
