"""Every case that gankern measures itself by, defined once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gankern.bench import stock
from gankern.bench.check import Results
from gankern.bench.results import OURS

Run = Callable[[], Results]
Size = Mapping[str, int]

MODELS = ("dcgan", "wgan", "wgan-gp")
CLIP = 0.01
OURS_CHANNELS_LAST = f"{OURS} channels_last"
DOUBLE_BACKWARD = "torch.compile does not support double backward"
# Relative error in norm against float64; bfloat16 carries 8 bits, and a gradient sums many of its roundings.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Sides:
    """The same work several times over: what is checked is what is timed.

    Attributes
    ----------
    reference : callable
        The expected results; run once, never timed.
    stock : dict of str to callable
        Variants of stock PyTorch. One that fails or computes something else is left out, with the reason.
    ours : dict of str to callable
        The same through gankern, under "gankern" and, where stock PyTorch may choose its memory layout,
        "gankern channels_last".
    work : int
        How many `unit` one call gets through.
    unit : str
        "images" or "elements".
    tolerance : float
        Largest relative error in norm of each result.
    left_out : dict of str to str
        Stock variants that cannot do this work, and why.
    """

    reference: Run
    stock: dict[str, Run]
    ours: dict[str, Run]
    work: int
    unit: str
    tolerance: float
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    name : str
        ``<op>.<mode>``.
    measures : str
        One line for people.
    setup : callable
        ``setup(size, dtype, device)`` makes the inputs and the sides.
    size : mapping of str to int
        The default sizes; ``tiny`` replaces them where only correctness counts.
    not_in_main : mapping of str to str
        Stock variants that the main job has no time for, and why.
    """

    name: str
    measures: str
    setup: Callable[[Size, torch.dtype, str], Sides]
    size: Size
    tiny: Size
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    not_in_main: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The op or the kind of step."""
        return self.name.partition(".")[0]

    @property
    def is_op(self) -> bool:
        """Whether it measures one op, not a step of a model."""
        return self.group not in ("critic_step", "generator_step")


def gankern() -> ModuleType:
    """Import gankern at the moment of use: listing cases needs no kernels."""
    import gankern

    return gankern


def _random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(device, dtype)


def _forward(function: Callable[[], Tensor]) -> Run:
    @torch.no_grad()
    def run() -> Results:
        return {"output": [function()]}

    return run


def _forward_backward(
    function: Callable[[], Tensor], inputs: Mapping[str, Tensor], grad_output: Tensor, state: Sequence[Tensor] = ()
) -> Run:
    def run() -> Results:
        output = function()
        gradients = torch.autograd.grad(output, list(inputs.values()), grad_output)
        named = {f"gradient of {name}": [g] for name, g in zip(inputs, gradients, strict=True)}
        return {"output": [output], "state": state, **named}

    return run


def _double_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> Run:
    def run() -> Results:
        (gradient,) = torch.autograd.grad(function(x), x, grad_output, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        return {"gradient": [gradient], "second gradient": [second]}

    return run


def _autocast(device: str, enabled: bool = True) -> AbstractContextManager[None]:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def _channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _norm_case(
    size: Size,
    dtype: torch.dtype,
    device: str,
    *,
    conv: str | None,
    training: bool,
    backward: bool,
) -> Sides:
    """Sides of [convolution +] batch norm + ReLU; `conv` names the op, as torch does, or is None."""
    from gankern.ops.conv_transpose_bn_act import reference

    n, c, h = size["batch"], size["channels"], size["image_size"]
    tensors = {"input": _random(n, c, h, h, dtype=dtype, device=device)}
    outputs = c
    options: dict[str, Any] = {}
    if conv is not None:
        outputs = size["outputs"]
        shape = (c, outputs, 4, 4) if conv == "conv_transpose2d" else (outputs, c, 4, 4)
        tensors["weight"] = _random(*shape, dtype=dtype, device=device, scale=0.05)
        options = {"stride": 2, "padding": 1}
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    tensors |= {"bn_weight": 1 + _random(outputs, scale=0.1, **f32), "bn_bias": _random(outputs, scale=0.1, **f32)}
    statistics = [_random(outputs, scale=0.1, **f32), 1 + _random(outputs, scale=0.1, **f32).abs()]
    oracle = reference.batch_norm_act if conv is None else getattr(reference, f"{conv}_bn_act")
    op = gankern().ops.batch_norm_act if conv is None else getattr(gankern().ops, f"{conv}_bn_act")

    def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Mapping[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
            weights = () if conv is None else (t["weight"], None)
            args = (t["input"], *weights, mean, var, t["bn_weight"], t["bn_bias"])
            return function(*args, **options, training=training, activation="relu")

        return call

    def unfused(t: Mapping[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
        x = t["input"]
        if conv is not None:
            x = getattr(torch.nn.functional, conv)(x, t["weight"], **options)
        return stock.batch_norm_relu(x, mean, var, t["bn_weight"], t["bn_bias"], training)

    with torch.no_grad():
        output = unfused(tensors, *(s.clone() for s in statistics))
    grad_output = _random(*output.shape, dtype=dtype, device=device)

    def side(
        function: Callable[..., Tensor],
        to: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: bool = False,
    ) -> Run:
        def prepared(t: Tensor) -> Tensor:
            form = memory_format if t.dim() == 4 else torch.preserve_format
            return t.detach().to(to or t.dtype, memory_format=form, copy=True)

        own = {name: prepared(t).requires_grad_(backward) for name, t in tensors.items()}
        state = [prepared(s) for s in statistics]

        def call() -> Tensor:
            with _autocast(device, autocast):
                return function(own, *state)

        if not backward:
            return _forward(call)
        arriving = grad_output.to(dtype if autocast else to or dtype, memory_format=memory_format)
        return _forward_backward(call, own, arriving, state)

    variants = {
        "eager": side(unfused),
        "channels_last": side(unfused, memory_format=torch.channels_last),
        "compile": side(torch.compile(unfused, dynamic=False)),
    }
    if dtype is torch.bfloat16 and conv is not None:
        variants["autocast"] = side(unfused, to=torch.float32, autocast=True)
    return Sides(
        reference=side(fused(oracle), to=torch.float64),
        stock=variants,
        ours={OURS: side(fused(op)), OURS_CHANNELS_LAST: side(fused(op), memory_format=torch.channels_last)},
        work=n,
        unit="images",
        tolerance=TOLERANCE[dtype],
    )


def _pairs_case(size: Size, dtype: torch.dtype, device: str, *, op: str, order: int) -> Sides:
    """Sides of `l1_distance` or `minibatch_discrimination`, up to the derivative of the given order."""
    from gankern.ops.minibatch_discrimination import reference

    n, b, c = size["batch"], size["kernels"], size["dims"]
    # Distances near one: features neither vanish nor saturate.
    m = _random(n, b, c, dtype=dtype, device=device, scale=0.5 / c**0.5).requires_grad_(order > 0)
    shape = (n, n, b) if op == "l1_distance" else (n, b)
    grad_output = _random(*shape, dtype=dtype, device=device)

    def side(function: Callable[[Tensor], Tensor], m: Tensor = m) -> Run:
        if order == 2:
            return _double_backward(function, m, grad_output.to(m.dtype))
        call = partial(function, m)
        return _forward_backward(call, {"m": m}, grad_output.to(m.dtype)) if order else _forward(call)

    broadcast, cdist = getattr(stock, op), getattr(stock, f"{op}_cdist")
    variants = {"eager": side(broadcast)}
    left_out = {}
    if order < 2:
        variants |= {"cdist": side(cdist), "compile": side(torch.compile(broadcast, dynamic=False))}
    else:
        left_out = {"cdist": "torch.cdist has no second derivative", "compile": DOUBLE_BACKWARD}
    return Sides(
        reference=side(getattr(reference, op), m.detach().double().requires_grad_(order > 0)),
        stock=variants,
        ours={OURS: side(getattr(gankern().ops, op))},
        work=n * n * b,
        unit="elements",
        tolerance=TOLERANCE[dtype],
        left_out=left_out,
    )


def _penalty_case(size: Size, dtype: torch.dtype, device: str, *, critic: type[nn.Module]) -> Sides:
    """Sides of a gradient penalty and its backward into the critic's parameters."""
    from gankern.ops.gradient_penalty import reference

    n, channels, h = size["batch"], size["channels"], size["image_size"]
    net = critic(channels, size["width"], h).to(device)
    images: dict[str, Any] = {"dtype": torch.float32, "device": device}
    real, fake = _random(n, channels, h, h, **images), _random(n, channels, h, h, **images)
    alpha = torch.rand(n, 1, 1, 1).to(device)
    mixed = dtype is torch.bfloat16

    def side(penalty: Callable[..., Tensor], to: torch.dtype = torch.float32, channels_last: bool = False) -> Run:
        form = torch.channels_last if channels_last else torch.preserve_format
        own = copy.deepcopy(net).to(dtype=to)
        if channels_last:
            _channels_last(own)
        args = [real.to(to, memory_format=form), fake.to(to, memory_format=form), alpha.to(to)]
        params = list(own.parameters())

        def run() -> Results:
            for p in params:
                p.grad = None
            with _autocast(device, mixed and to is torch.float32):
                loss = penalty(own, *args)
            loss.backward()
            return {"penalty": [loss], "gradients": [p.grad for p in params]}

        return run

    def oracle(net: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        return reference.gradient_penalty(net, real, fake, weight=10.0, target=1.0, one_sided=False, alpha=alpha)

    def ours(net: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        return gankern().gradient_penalty(net, real, fake, weight=10.0, alpha=alpha)

    return Sides(
        reference=side(oracle, torch.float64),
        stock={
            "eager": side(stock.gradient_penalty),
            "channels_last": side(stock.gradient_penalty, channels_last=True),
            "func_grad": side(stock.gradient_penalty_func),
            "compile": side(torch.compile(stock.gradient_penalty_func, dynamic=False)),
        },
        ours={OURS: side(ours), OURS_CHANNELS_LAST: side(ours, channels_last=True)},
        work=n,
        unit="images",
        # The gradient of a gradient rounds twice.
        tolerance=2 * TOLERANCE[dtype],
    )


def _critic_parameters(size: Size, dtype: torch.dtype, device: str) -> list[Tensor]:
    w = size["width"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    convs = [(w, 3, 4, 4), (2 * w, w, 4, 4), (4 * w, 2 * w, 4, 4), (8 * w, 4 * w, 4, 4), (1, 8 * w, 4, 4)]
    norms = [(i * w,) for i in (2, 4, 8) for _ in ("weight", "bias")]
    return [_random(*shape, scale=0.02, **like) for shape in [*convs, *norms]]


def _weights_case(size: Size, dtype: torch.dtype, device: str, *, optimizer: bool) -> Sides:
    """Sides of weight clipping, alone or after an RMSProp step, over a DCGAN critic's parameters."""
    params = _critic_parameters(size, dtype, device)
    gradients = [torch.randn_like(p) for p in params]

    def side(clip: Callable[..., object] | None, to: torch.dtype = dtype, **options: Any) -> Run:
        """Clip copies of the parameters; with `clip` None, gankern's optimizer does it within its step."""
        own = [nn.Parameter(p.detach().to(to, copy=True)) for p in params]
        for p, g in zip(own, gradients, strict=True):
            p.grad = g.to(to)
        if not optimizer:
            step = None
        elif clip is None:
            step = gankern().optim.RMSprop(own, lr=5e-5, clip=CLIP).step
        else:
            step = torch.optim.RMSprop(own, lr=5e-5, **options).step

        def run() -> Results:
            if step is not None:
                step()
            if clip is not None:
                clip(own, CLIP)
            return {"parameters": own}

        return run

    return Sides(
        reference=side(stock.clip_loop, torch.float64, foreach=False),
        stock={
            "eager": side(stock.clip_loop, foreach=False),
            "foreach": side(stock.clip_foreach, foreach=True),
        },
        ours={OURS: side(None if optimizer else gankern().clip_weights_)},
        work=sum(p.numel() for p in params),
        unit="elements",
        tolerance=TOLERANCE[dtype],
    )


def _with_alpha(loss: Callable[..., Tensor], critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Draw outside what is compiled: Inductor's random numbers are its own."""
    return loss(critic, real, fake, torch.rand(len(real), 1, 1, 1, device=real.device))


def _step_case(size: Size, dtype: torch.dtype, device: str, *, model: str, network: str) -> Sides:
    """Sides of a whole step of one network of a reference GAN: losses, backward, optimizer."""
    from gankern.train import steps

    n, image_size = size["batch"], size["image_size"]
    real = torch.rand(n, 1, image_size, image_size).mul(2).sub(1).to(device)
    latent: Tensor | None = None
    start: dict[str, dict[str, Tensor]] = {}
    penalised = model == "wgan-gp" and network == "critic"

    def side(ops: str, variant: str = "eager") -> Run:
        nonlocal latent
        torch.manual_seed(0)
        gan = gankern().models.build(model, image_size=image_size, ops=ops, width=size["width"]).to(device)
        for name in ("generator", "critic"):
            module = getattr(gan, name)
            module.load_state_dict(start.setdefault(name, copy.deepcopy(module.state_dict())))
            if variant == "channels_last":
                _channels_last(module)
            elif variant == "compile" and not penalised:
                module.compile(dynamic=False)
        if penalised and variant in ("func_grad", "compile"):
            loss = stock.wgan_gp_loss
            gan.critic_loss = partial(
                _with_alpha, torch.compile(loss, dynamic=False) if variant == "compile" else loss, gan.critic
            )
        if latent is None:
            latent = gan.sample_latent(n).to(device)
        images = real.contiguous(memory_format=torch.channels_last) if variant == "channels_last" else real
        args = (images, latent) if network == "critic" else (latent,)
        step = getattr(steps, f"{network}_step")
        params = list(getattr(gan, network).parameters())

        def run() -> Results:
            # Both sides draw the same interpolation points.
            torch.manual_seed(1)
            with _autocast(device, dtype is torch.bfloat16):
                loss = step(gan, *args)
            return {"loss": [loss], "gradients": [p.grad for p in params], "parameters": params}

        return run

    variants = ["eager", "channels_last", "compile"] + ["func_grad"] * penalised
    return Sides(
        reference=side("stock"),
        stock={variant: side("stock", variant) for variant in variants},
        ours={OURS: side("gankern"), OURS_CHANNELS_LAST: side("gankern", "channels_last")},
        work=n,
        unit="images",
        tolerance=1e-3 if dtype is torch.float32 else 1e-1,
    )


def _conv_sizes(channels: int, outputs: int, image_size: int) -> dict[str, Any]:
    return {
        "size": {"batch": 64, "channels": channels, "outputs": outputs, "image_size": image_size},
        "tiny": {"batch": 3, "channels": 5, "outputs": 4, "image_size": 6},
    }


_NORM: dict[str, Any] = {
    "size": {"batch": 64, "channels": 64, "image_size": 32},
    "tiny": {"batch": 3, "channels": 5, "image_size": 7},
}
_PAIRS: dict[str, Any] = {
    "size": {"batch": 128, "kernels": 100, "dims": 8},
    "tiny": {"batch": 5, "kernels": 3, "dims": 2},
}
_PENALTY: dict[str, Any] = {
    "tiny": {"batch": 3, "channels": 2, "width": 4, "image_size": 8},
    "not_in_main": {"compile": "takes 15 to 40 s to compile; `gankern bench gradient_penalty` has it"},
}
_WEIGHTS: dict[str, Any] = {"size": {"width": 64}, "tiny": {"width": 3}}
_STEP: dict[str, Any] = {
    "size": {"batch": 64, "width": 32, "image_size": 32},
    "tiny": {"batch": 4, "width": 4, "image_size": 8},
}

_norm = partial(partial, _norm_case)
_pairs = partial(partial, _pairs_case)

CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case(
            "batch_norm_act.forward",
            "batch norm + ReLU, inference",
            _norm(conv=None, training=False, backward=False),
            **_NORM,
        ),
        Case(
            "batch_norm_act.training",
            "batch norm + ReLU, forward and backward",
            _norm(conv=None, training=True, backward=True),
            **_NORM,
        ),
        Case(
            "conv_transpose2d_bn_act.forward",
            "a generator block, inference",
            _norm(conv="conv_transpose2d", training=False, backward=False),
            **_conv_sizes(128, 64, 8),
        ),
        Case(
            "conv_transpose2d_bn_act.training",
            "a generator block, forward and backward",
            _norm(conv="conv_transpose2d", training=True, backward=True),
            **_conv_sizes(128, 64, 8),
        ),
        Case(
            "conv2d_bn_act.training",
            "a discriminator block, forward and backward",
            _norm(conv="conv2d", training=True, backward=True),
            **_conv_sizes(64, 128, 16),
        ),
        Case(
            "l1_distance.training",
            "pairwise L1 distances, forward and backward",
            _pairs(op="l1_distance", order=1),
            **_PAIRS,
        ),
        Case(
            "minibatch_discrimination.forward",
            "minibatch features, forward",
            _pairs(op="minibatch_discrimination", order=0),
            **_PAIRS,
        ),
        Case(
            "minibatch_discrimination.training",
            "minibatch features, forward and backward",
            _pairs(op="minibatch_discrimination", order=1),
            **_PAIRS,
        ),
        Case(
            "minibatch_discrimination.double_backward",
            "minibatch features, forward, backward and double backward",
            _pairs(op="minibatch_discrimination", order=2),
            **_PAIRS,
        ),
        Case(
            "gradient_penalty.conv",
            "penalty on a convolutional critic, with its double backward",
            partial(_penalty_case, critic=stock.ConvCritic),
            size={"batch": 64, "channels": 1, "width": 16, "image_size": 32},
            **_PENALTY,
        ),
        Case(
            "gradient_penalty.residual",
            "penalty on a residual critic with layer norm, with its double backward",
            partial(_penalty_case, critic=stock.ResidualCritic),
            size={"batch": 64, "channels": 1, "width": 16, "image_size": 32},
            **_PENALTY,
        ),
        Case(
            "clip_weights.step",
            "clipping a DCGAN critic's weights in place",
            partial(_weights_case, optimizer=False),
            **_WEIGHTS,
        ),
        Case(
            "rmsprop_clip.step",
            "RMSProp with clipping on a DCGAN critic",
            partial(_weights_case, optimizer=True),
            **_WEIGHTS,
            dtypes=(torch.float32,),
        ),
        *(
            Case(
                f"{network}_step.{model}",
                f"a whole {network} step of {model}",
                partial(_step_case, model=model, network=network),
                **_STEP,
            )
            for network in ("critic", "generator")
            for model in MODELS
        ),
    ]
}


def select(names: Sequence[str]) -> list[Case]:
    """Return the cases of these names or groups; all op cases where there are none.

    Raises
    ------
    KeyError
        With a name that is neither.
    """
    if not names:
        return [case for case in CASES.values() if case.is_op]
    chosen: dict[str, Case] = {}
    for name in names:
        found = {case.name: case for case in CASES.values() if name in (case.name, case.group)}
        if not found:
            raise KeyError(name)
        chosen |= found
    return list(chosen.values())
