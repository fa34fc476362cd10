"""What is tried on a program: gankern's run of it against stock's, as people write it."""

from __future__ import annotations

import copy
import inspect
import linecache
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import gankern
from gankern.compiler import enabled, planning
from gankern.compiler.choice import everywhere

#: Checks by how often each is drawn: penalties, what fuse made of the network, what only looks at it.
CHECKS = {
    **{"gp": 10, "one_sided": 5, "zero_centered": 4, "dragan": 4, "r1": 10, "r2": 4, "create_graph": 7},
    **{"fuse": 14, "fuse no_grad": 5, "fuse twice differentiated": 7, "fuse + gp": 4, "fuse + r1": 4, "unfuse": 1},
    **{"fuse copied": 1.5, "fuse traced": 1, "explain": 4, "fusion_report": 2, "meta": 0.7, "shared graph": 3},
}


@dataclass(frozen=True)
class Options:
    """How a program is run.

    Attributes
    ----------
    check : str
        One of `CHECKS`.
    seed, n, shape, extras
        Of the inputs.
    given : str
        How a penalty is given the critic: "module", "callable" (with its parameters) or "some params" of it.
    whole : str
        Whether the critic's scores of real and fake samples are in the loss too, "after" or "before" the penalty.
    wants : tuple of str
        Inputs that require a gradient.
    again : bool
        A second step after an update of the parameters in place.
    """

    check: str = "r1"
    seed: int = 0
    n: int = 2
    shape: tuple[int, ...] = (3, 4, 4)
    backend: str = "cpu"
    dtype: str = "float64"
    training: bool = True
    layout: str = "contiguous"
    module_layout: str = "contiguous"
    extras: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    given: str = "module"
    whole: str = ""
    threads: int = 1
    again: bool = False

    def plainer(self) -> Iterator[Options]:
        for f in fields(self):
            if f.name not in ("check", "seed", "shape") and getattr(self, f.name) != f.default:
                yield Options(**{**self.__dict__, f.name: f.default})

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{name}={value!r}" for name, value in given)


@dataclass
class Outcome:
    """What a run gave: tensors by name, None where there is none, or the error; what strict mode reported."""

    values: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    reports: list[str] = field(default_factory=list)


def _act(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return {"relu": torch.relu, "tanh": torch.tanh, "none": lambda t: t}[activation](x)


def _conv2d_act(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, activation: str = "leaky_relu", slope: float = 0.2, **options: Any
) -> Tensor:
    return _act(F.conv2d(x, w, b, **options), activation, slope)


def _batch_norm_act(
    x: Tensor, mean: Any, var: Any, w: Any = None, b: Any = None, *, training: bool, activation: str = "relu"
) -> Tensor:
    return _act(_norm_of_ops(x, mean, var, w, b, training), activation, 0.2)


def _norm_of_ops(x: Tensor, mean: Any, var: Any, w: Any, b: Any, training: bool) -> Tensor:
    if _ByFormula.in_ops and training:
        return _affine(_normalized(x, (0, 2, 3), 1e-5), w, b, (-1, 1, 1))
    return F.batch_norm(x, mean, var, w, b, training)


def _block(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def block(x: Tensor, w: Tensor, b: Any, mean: Any, var: Any, gamma: Any, beta: Any, **options: Any) -> Tensor:
        norm = {name: options.pop(name) for name in ("training", "activation") if name in options}
        return _batch_norm_act(conv(x, w, b, **options), mean, var, gamma, beta, **norm)

    return block


def _in_one_layout(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op with its images in channels_last, as its kernels leave them: what draws a mask of them goes by strides."""

    def in_one_layout(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs).contiguous(memory_format=torch.channels_last)

    return in_one_layout


def _ops(**ops: Callable[..., Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**{name: _in_one_layout(op) for name, op in ops.items()})


_STOCK_OPS = _ops(
    conv2d_act=_conv2d_act,
    batch_norm_act=_batch_norm_act,
    conv2d_bn_act=_block(F.conv2d),
    conv_transpose2d_bn_act=_block(F.conv_transpose2d),
)
_OUR_OPS = _ops(**{name: getattr(gankern.ops, name) for name in vars(_STOCK_OPS)})


def _stock_penalty(
    kind: str, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *inputs: Any, **ignored: Any
) -> Tensor:
    n = real.size(0)
    if kind in ("gp", "one_sided", "zero_centered"):
        alpha = torch.rand(n, dtype=real.dtype).view(-1, *[1] * (real.dim() - 1))
        points = alpha * real + (1 - alpha) * fake
    elif kind == "dragan":
        points = real + 0.5 * real.detach().std(correction=0) * torch.rand(real.shape, dtype=real.dtype)
    else:
        points = {"r1": real, "r2": fake}[kind]
    if not points.requires_grad:
        points = points.detach().requires_grad_()
    scores = critic(points, *inputs)
    (grad,) = torch.autograd.grad(scores, points, torch.ones_like(scores), create_graph=True)
    if kind in ("gp", "one_sided", "dragan"):
        excess = grad.flatten(1).norm(2, dim=1) - 0.3
        return 7.0 * (F.relu(excess) if kind == "one_sided" else excess).square().mean()
    squares = grad.flatten(1).square().sum(1).mean()
    return 7.0 * squares if kind == "zero_centered" else 7.0 / 2 * squares


def _our_penalty(
    kind: str, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *inputs: Any, **options: Any
) -> Tensor:
    if kind in ("gp", "one_sided"):
        one_sided = kind == "one_sided"
        return gankern.gradient_penalty(
            critic, real, fake, *inputs, weight=7.0, target=0.3, one_sided=one_sided, **options
        )
    if kind == "zero_centered":
        return gankern.penalties.zero_centered(critic, real, fake, *inputs, weight=7.0, **options)
    if kind == "dragan":
        return gankern.penalties.dragan(critic, real, *inputs, weight=7.0, target=0.3, **options)
    return getattr(gankern.penalties, kind)(critic, real if kind == "r1" else fake, *inputs, weight=7.0, **options)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1) + 1)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "transposed":
        order = tuple(range(tensor.dim() - 1, -1, -1))
        return tensor.permute(order).contiguous().permute(order)
    return tensor


class Run:
    """One side: the network, its inputs, and what came of it.

    Parameters
    ----------
    ours : bool
        By gankern, or stock.
    nudge : float
        Moves all parameters and inputs by as much of themselves at random, to find out how far results depend on
        rounding.
    """

    def __init__(self, source: str, options: Options, ours: bool, nudge: float = 0, trial: int = 0) -> None:
        self.options, self.ours = options, ours
        # A network of several heads is no critic by itself.
        self.given = "callable" if options.given == "module" and "), h\n" in source else options.given
        name = "<program>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space: dict[str, Any] = {"__name__": "program", "ops": _OUR_OPS if ours else _STOCK_OPS}
        exec(compile(source, name, "exec"), space)
        torch.manual_seed(options.seed)
        net: nn.Module = space["build"]()
        torch.manual_seed(options.seed + 1)
        with torch.no_grad():
            for t in [*net.parameters(), *net.buffers()]:
                if t.is_floating_point() and t.dim() == 1:
                    t.data.add_(0.3 * torch.rand_like(t))
        real, fake = torch.randn(2, options.n, *options.shape)
        z, y = torch.randn(options.n, 3), torch.randint(4, (options.n,))
        if nudge:
            generator = torch.Generator().manual_seed(trial)
            for t in [real, fake, z, *(p.data for p in net.parameters())]:
                t.mul_(1 + nudge * torch.randn(t.shape, generator=generator))
        if options.module_layout == "channels_last" and all(p.dim() < 5 for p in net.parameters()):
            net.to(memory_format=torch.channels_last)
        net.train(options.training) if not options.training else None
        self.net = net
        real, fake = _laid_out(real, options.layout), _laid_out(fake, options.layout)
        self.inputs = {"real": real, "fake": fake, "z": z}
        for key, t in self.inputs.items():
            t.requires_grad_(key in options.wants)
        given = {"y": y, "z": z}
        self.extras = [given[e] for e in options.extras]
        self.values: dict[str, Any] = {}
        torch.manual_seed(options.seed + 2)

    def note(self, name: str, value: Any) -> None:
        flat = torch.utils._pytree.tree_leaves(value)
        for i, v in enumerate(flat):
            self.values[f"{name}{i or ''}"] = v.detach().clone() if isinstance(v, Tensor) else v

    def note_state(self, when: str = "") -> None:
        for name, p in self.net.named_parameters():
            self.note(f"{when}gradient of {name}", [p.grad])
            self.note(f"{when}parameter {name}", p)
        for name, b in self.net.named_buffers():
            self.note(f"{when}buffer {name}", b)
        for name, t in self.inputs.items():
            self.note(f"{when}gradient of {name}", [t.grad])
            self.note(f"{when}input {name}", t)
        self.note(f"{when}random state", torch.get_rng_state())

    def scores(self, x: Tensor) -> Any:
        return self.net(x, *self.extras)

    def first(self, x: Tensor, *extras: Tensor) -> Tensor:
        """Scores of a network with several heads, or the last of a map."""
        scores = self.net(x, *extras)
        return scores[0] if isinstance(scores, tuple) else scores

    def params(self) -> list[nn.Parameter]:
        params = list(self.net.parameters())
        return params[::2] if self.given == "some params" and len(params) > 1 else params

    def penalty(self, kind: str, **options: Any) -> Tensor:
        if self.given != "module":
            options["params"] = self.params() or [torch.zeros(())]
        critic = self.net if self.given == "module" else self.first
        function = _our_penalty if self.ours else _stock_penalty
        return function(kind, critic, self.inputs["real"], self.inputs["fake"], *self.extras, **options)

    def backward(self, loss: Tensor, name: str = "loss") -> None:
        self.note(name, loss)
        if not loss.requires_grad:
            return
        if self.given == "some params":
            # Of the other parameters nothing was asked.
            wanted = [t for t in (*self.params(), *self.inputs.values()) if t.requires_grad]
            if wanted:
                loss.backward(inputs=wanted)
            return
        loss.backward()

    def update(self) -> None:
        with torch.no_grad():
            for p in self.net.parameters():
                if p.grad is not None:
                    p.sub_(p.grad.clamp(-1, 1), alpha=0.05)
                    p.grad = None

    def critic_loss(self) -> Tensor:
        loss = self.first(self.inputs["fake"], *self.extras).mean()
        return loss - self.first(self.inputs["real"], *self.extras).mean()

    def step(self, kind: str) -> None:
        whole = self.options.whole
        loss = self.critic_loss() if whole == "before" else None
        penalty = self.penalty(kind)
        self.note("penalty", penalty)
        loss = penalty if loss is None else loss + penalty
        if whole == "after":
            loss = loss + self.critic_loss()
        self.backward(loss)
        self.note_state()

    def steps(self, kind: str) -> None:
        self.step(kind)
        if self.options.again:
            first, self.values = self.values, {}
            self.update()
            self.step(kind)
            self.values = first | {f"second {name}": value for name, value in self.values.items()}

    def fuse(self) -> None:
        if self.ours:
            gankern.fuse(self.net)

    def loss(self, outputs: Any) -> Tensor:
        leaves = torch.utils._pytree.tree_leaves(outputs)
        return sum(((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in leaves), torch.zeros(()))

    def call(self, modes: str = "") -> None:
        """Outputs of the network, and gradients by an ordinary loss."""
        for turn in range(2 if self.options.again else 1):
            with torch.no_grad() if modes == "no_grad" else nullcontext():
                outputs = self.scores(self.inputs["real"])
            when = "second " if turn else ""
            self.note(f"{when}output", outputs)
            if modes != "no_grad":
                loss = self.loss(outputs)
                if loss.requires_grad:
                    loss.backward()
            self.note_state(when)
            self.update()

    def twice_differentiated(self) -> None:
        """A penalty by hand on what fuse made of the network."""
        x = self.inputs["fake"].detach().requires_grad_()
        outputs = self.scores(x)
        loss = self.loss(outputs).tanh() if self.options.whole else self.loss(outputs)
        wanted = [x, *(p for p in self.net.parameters() if p.requires_grad)]
        wanted = wanted[: None if self.options.again else 1]
        grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        self.note("first", list(grads))
        second = sum((g.square().sum() for g in grads if g is not None), torch.zeros(()))
        if second.requires_grad:
            (second + loss).backward()
        self.note_state()

    def create_graph(self) -> None:
        kind = ("gp", "r1", "one_sided", "zero_centered", "dragan", "r2")[self.options.seed % 6]
        loss = self.penalty(kind, create_graph=True)
        self.note("penalty", loss)
        wanted = [t for t in (*self.params(), *self.inputs.values()) if t.requires_grad]
        if not wanted:
            return
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        else:
            grads = (None,) * len(wanted)
        self.note("first", [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)])
        second = sum((g.square().sum() for g in grads if g is not None and g.requires_grad), torch.zeros(()))
        if second.requires_grad:
            second.backward()
        self.note_state()

    def shared_graph(self) -> None:
        """Scores of real and fake samples and the penalty, of weights that are computed once."""
        from torch.nn.utils import parametrize

        kind = ("gp", "r1", "r2", "dragan")[self.options.seed % 4]
        with parametrize.cached():
            loss = self.critic_loss() if self.options.seed % 3 else 0
            loss = loss + self.penalty(kind)
            if self.options.seed % 2:
                loss = loss + self.critic_loss()
        self.backward(loss)
        self.note_state()

    def looked_at(self) -> None:
        """explain and fusion_report raise nothing where the network does not, and change nothing."""
        twin = copy.deepcopy(self.net) if self.options.seed % 2 else None
        before = {name: t.clone() for name, t in self.net.state_dict().items()}
        state = torch.get_rng_state()
        if self.ours:
            if self.options.check == "explain":
                critic = self.net if self.given == "module" else self.first
                params = {} if self.given == "module" else {"params": self.params() or [torch.zeros(())]}
                real, fake = self.inputs["real"], self.inputs["fake"]
                str(gankern.explain(gankern.gradient_penalty, critic, real, fake, *self.extras, **params))
            else:
                for run in gankern.fusion_report(self.net):
                    str(run)
                gankern.fuse(self.net)
                gankern.fusion_report(self.net)
                gankern.unfuse(self.net)
        for name, t in self.net.state_dict().items():
            self.note(f"unchanged {name}", torch.equal(t, before[name]) or bool(t.isnan().any()))
        self.note("unchanged random state", torch.equal(torch.get_rng_state(), state))
        del twin
        self.steps("r1") if self.options.check == "explain" else self.call()

    def on_meta(self) -> None:
        self.net.to("meta")
        self.extras = [t.to("meta") for t in self.extras]
        real = self.inputs["real"].detach().to("meta")
        if self.options.seed % 2:
            self.inputs = {"real": real, "fake": real.clone(), "z": real}
            self.note("penalty", self.penalty("r1").shape)
        else:
            self.fuse()
            self.note("output", [t.shape for t in torch.utils._pytree.tree_leaves(self.scores(real))])

    def go(self) -> None:
        check = self.options.check
        if check in ("gp", "one_sided", "zero_centered", "dragan", "r1", "r2"):
            self.steps(check)
        elif check == "create_graph":
            self.create_graph()
        elif check == "shared graph":
            self.shared_graph()
        elif check in ("explain", "fusion_report"):
            self.looked_at()
        elif check == "meta":
            self.on_meta()
        else:
            self.fuse()
            if check == "fuse copied":
                self.net = copy.deepcopy(self.net)
                self.call()
            elif check == "fuse traced":
                x = self.inputs["real"].detach()
                made = torch.jit.trace(self.net, (x, *[e.detach() for e in self.extras]), check_trace=False)
                self.note("output", made(x, *[e.detach() for e in self.extras]))
            elif check == "fuse twice differentiated":
                self.twice_differentiated()
            elif check.startswith("fuse + "):
                self.steps(check.removeprefix("fuse + "))
            else:
                if check == "unfuse" and self.ours:
                    self.scores(self.inputs["real"].detach())
                    gankern.unfuse(self.net)
                elif check == "unfuse":
                    self.scores(self.inputs["real"].detach())
                self.call("no_grad" if check == "fuse no_grad" else "")


@contextmanager
def _settings(options: Options) -> Iterator[None]:
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    torch.set_default_dtype(getattr(torch, options.dtype))
    if threads != options.threads:
        torch.set_num_threads(options.threads)
    try:
        with warnings.catch_warnings(), gankern.backend(options.backend), everywhere():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * (var + eps).rsqrt()


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def tell_side(ours: bool) -> None:
    """Called before each side runs: for those who want to know of which one a process died."""


class _ByFormula(TorchFunctionMode):
    """Norms by their formulas: torch's third derivatives take the mean and the deviation for constants."""

    in_ops = False

    def __init__(self, *, layer_norm: bool, batch_norm: bool) -> None:
        super().__init__()
        self._layer_norm, self._batch_norm = layer_norm, batch_norm

    def __enter__(self) -> Any:
        _ByFormula.in_ops = True
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _ByFormula.in_ops = False
        super().__exit__(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm and self._layer_norm:
            given = inspect.signature(F.layer_norm).bind(*args, **kwargs).arguments
            x, shape = given["input"], tuple(given["normalized_shape"])
            y = _normalized(x, tuple(range(-len(shape), 0)), given.get("eps", 1e-5))
            return _affine(y, given.get("weight"), given.get("bias"), shape)
        if func is F.instance_norm or (func is F.batch_norm and self._batch_norm):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            x, channel = given["input"], func is F.batch_norm
            if given.get("training", False) if channel else given.get("use_input_stats", True):
                with torch.no_grad():
                    func(*args, **kwargs)  # for the running statistics
                y = _normalized(x, (0,) * channel + tuple(range(2, x.dim())), given.get("eps", 1e-5))
                return _affine(y, given.get("weight"), given.get("bias"), (-1, *[1] * (x.dim() - 2)))
        return func(*args, **kwargs)


class _Reports(logging.Handler):
    """Plans that strict mode found to differ from stock."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@contextmanager
def _reported() -> Iterator[list[str]]:
    """Plans, where they are made at all, are compared with stock in strict mode."""
    log, reports = logging.getLogger("gankern.compiler"), _Reports()
    log.addHandler(reports)
    try:
        with planning("strict" if enabled() else False):
            yield reports.told
    finally:
        log.removeHandler(reports)


def outcome(source: str, options: Options, ours: bool, nudge: float = 0, trial: int = 0, extra: Any = None) -> Outcome:
    """Run one side, in a context of its own where there is one."""
    tell_side(ours)
    with _settings(options), extra or nullcontext(), _reported() as reports:
        run = None
        try:
            run = Run(source, options, ours, nudge, trial)
            run.go()
        except Exception as error:
            return Outcome(run.values if run is not None else {}, error, reports)
        return Outcome(run.values, reports=reports)


def _number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _scale(values: dict[str, Any]) -> float:
    sizes = [v.abs().nan_to_num(0, 0, 0).max().item() for v in values.values() if _number(v) and v.numel()]
    return max(sizes, default=0.0)


def _distance(got: Tensor, want: Tensor) -> float:
    """Greatest difference; infinite where one is NaN or infinite and the other is not."""
    if not want.numel():
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    apart = torch.where(same, torch.zeros_like(got), (got - want).abs())
    return apart.nan_to_num(float("inf"), float("inf")).max().item()


def differences(got: dict[str, Any], want: dict[str, Any], dtype: str, zeros: bool) -> dict[str, str]:
    """Names of what is not the same, with the difference in words; `zeros` may stand for no gradient."""
    found = {}
    tolerance, floor = (1e-8, 1e-11) if dtype == "float64" else (2e-3, 2e-5)
    scale = _scale(want)
    for name in [*want, *(n for n in got if n not in want)]:
        if (name in got) != (name in want):
            found[name] = "missing" if name in want else "not there in stock"
            continue
        ours, stock = got[name], want[name]
        if zeros and stock is None and isinstance(ours, Tensor):
            stock = torch.zeros_like(ours)
        if zeros and ours is None and isinstance(stock, Tensor):
            ours = torch.zeros_like(stock)
        if not (isinstance(ours, Tensor) and isinstance(stock, Tensor)):
            if type(ours) is not type(stock) or ours != stock:
                found[name] = f"{_short(ours)} for {_short(stock)}"
        elif ours.shape != stock.shape or ours.dtype != stock.dtype:
            found[name] = f"{ours.dtype} {tuple(ours.shape)} for {stock.dtype} {tuple(stock.shape)}"
        elif not _number(stock):
            if not torch.equal(ours, stock):
                found[name] = "differs"
        elif stock.numel():
            distance = _distance(ours, stock)
            size = stock.abs().nan_to_num(0, 0, 0).max().item()
            if distance > tolerance * size + floor * scale + floor * 1e-2:
                found[name] = f"differs by {distance:.2e} of {size:.2e}"
    return found


def _short(value: Any) -> str:
    return (
        f"a tensor up to {value.abs().max().item():.2e}" if isinstance(value, Tensor) and value.numel() else str(value)
    )


def _kink(source: str, options: Options, got: dict[str, Any], want: dict[str, Any], found: dict[str, str]) -> bool:
    """Whether stock's own results move as far when everything moves by a few units in the last place."""
    nudge = 1e-13 if options.dtype == "float64" else 3e-6
    moved = {name: 0.0 for name in found}
    for trial in range(4):
        other = outcome(source, options, False, nudge, trial)
        if other.error is not None:
            return True
        for name in found:
            a, b = want.get(name), other.values.get(name)
            if _number(a) and _number(b) and a.shape == b.shape:
                moved[name] = max(moved[name], _distance(b, a))
    return all(
        _number(got.get(name)) and _number(want.get(name)) and moved[name] > 0.05 * _distance(got[name], want[name])
        for name in found
    )


@dataclass(frozen=True)
class Failure:
    """What went wrong: a kind to tell failures apart by, and the facts."""

    kind: str
    facts: str


#: Documented errors of gankern's where stock raises another type.
_OURS = (
    "critic must depend on its input",
    "critic must return a Tensor",
    "input must be large enough for the convolution",
    "weight must have shape",
    "weight must have input's dtype",
)


#: Errors of stock's that need not be gankern's: of layouts, of derivatives that nobody needs, a fault of torch's.
_MAY_GO_ON = (
    "view size is not compatible with",
    "differentiate twice a function that was marked",
    "output_padding is not supported for non-transposed convolutions",
)
#: Errors of stock's where gankern may go on, since it saves or calls other things; then it must be right.
_INSTEAD: dict[str, Callable[[], Any]] = {
    "modified by an inplace operation": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "derivative for aten::_scaled_dot_product": lambda: sdpa_kernel(SDPBackend.MATH),
}


def check(source: str, options: Options) -> tuple[str, Failure | None]:
    """What came of a program, in a word, and the failure."""
    stock = outcome(source, options, False)
    ours = outcome(source, options, True)
    if isinstance(ours.error, gankern.BackendUnavailable):
        # Some kernels are there for float32 only; what cannot run by name at all runs as users have it.
        float32, auto = replace(options, dtype="float32"), replace(options, backend="auto")
        return check(source, float32 if options.dtype == "float64" else auto)
    if ours.reports:
        return "failed", Failure("a plan differs from stock", "\n".join(ours.reports))
    if stock.error is not None and ours.error is not None:
        if type(stock.error) is type(ours.error) or any(text in str(ours.error) for text in _OURS):
            return "both raise", None
        facts = f"gankern raises {_told(ours.error)}\nstock raises   {_told(stock.error)}"
        return "failed", Failure(f"other error {type(ours.error).__name__} for {type(stock.error).__name__}", facts)
    word = "same"
    instead = next((make for text, make in _INSTEAD.items() if stock.error and text in str(stock.error)), None)
    if instead is not None:
        stock, word = outcome(source, options, False, extra=instead()), "right where stock raises"
    elif stock.error is not None and any(text in str(stock.error) for text in _MAY_GO_ON):
        return "right where stock raises", None
    if stock.error is not None:
        facts = f"stock raises {_told(stock.error)}, gankern does not"
        return "failed", Failure(f"no error for {type(stock.error).__name__}", facts)
    if ours.error is not None:
        facts = f"gankern raises {_told(ours.error)}, stock does not"
        return "failed", Failure(f"raises {type(ours.error).__name__}", facts)
    penalty = not options.check.startswith("fus") or options.check.startswith("fuse + ")
    found = differences(ours.values, stock.values, options.dtype, zeros=penalty)
    if not found:
        return word, None
    # Layers are torch's where stock runs, the norms of ops never.
    for layer_norm, batch_norm in ((True, False), (True, True), (False, False)):
        exact = outcome(source, options, False, extra=_ByFormula(layer_norm=layer_norm, batch_norm=batch_norm))
        if exact.error is None and not differences(ours.values, exact.values, options.dtype, zeros=penalty):
            return "right where torch is wrong", None
    if _kink(source, options, ours.values, stock.values, found):
        return "at a kink", None
    lines = [f"{name}: {text}" for name, text in list(found.items())[:6]]
    return "failed", Failure("differs", "\n".join(lines))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def compare(source: str, **options: Any) -> None:
    """Run a program as the fuzzer does, and tell."""
    word, failure = check(source, Options(**options))
    print(word if failure is None else f"{failure.kind}\n{failure.facts}")
