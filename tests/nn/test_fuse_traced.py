from __future__ import annotations

import copy
import io
import pickle
import random
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gans
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import gankern
from gankern.nn.traced import TracedModule

f64 = torch.float64
Calls = Callable[[nn.Module], Any]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=f64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "attributes": (gans.AttributeGenerator, lambda: ((noise(3, 5),), {})),
    "discriminator": (gans.AttributeDiscriminator, lambda: ((noise(3, 3, 8, 8), True), {})),
    "lists": (gans.ListGenerator, lambda: ((noise(3, 5, 2, 2),), {})),
    "sngan": (gans.ResGenerator, lambda: ((noise(3, 5),), {})),
    "resnet": (lambda: nn.Sequential(gans.BasicBlock(4), gans.BasicBlock(4)), lambda: ((noise(3, 4, 5, 5),), {})),
    "pix2pix": (gans.pix2pix, lambda: ((noise(2, 3, 8, 8),), {})),
    "unet": (gans.SkipUnet, lambda: ((noise(2, 3, 8, 8),), {})),
    "conditional": (
        gans.ConditionalGenerator,
        lambda: ((noise(3, 4),), {"labels": torch.tensor([0, 2, 1]), "scale": 0.7}),
    ),
    "progressive": (gans.ProgressiveGenerator, lambda: ((noise(3, 5),), {})),
    "rows": (gans.Discriminator, lambda: ((noise(3, 3, 8, 8), noise(2, 3, 8, 8)), {})),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def assert_step(
    stock: nn.Module, ours: nn.Module, args: tuple[Any, ...], kwargs: Any, *, backward: bool = True
) -> None:
    """The same outputs, in type and layout as well, gradients and buffers."""
    want, got = stock(*args, **kwargs), ours(*args, **kwargs)
    assert type(want) is type(got)
    torch.testing.assert_close(got, want)
    for a, b in zip(tensors(want), tensors(got), strict=True):
        assert a.stride() == b.stride()
    if backward:
        for model, output in ((stock, want), (ours, got)):
            model.zero_grad()
            sum(t.square().sum() for t in tensors(output)).backward()
        for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, a), b in zip(stock.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    stock = model.double()
    return stock, gankern.fuse(copy.deepcopy(stock))


def ran(call: Callable[[], Any]) -> set[str]:
    """The ops of gankern that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {e.key for e in profile.key_averages() if e.key.startswith("gankern::")}


def reasons(model: nn.Module) -> dict[tuple[str, tuple[str, ...]], str | None]:
    return {(run.module, run.names): run.reason for run in gankern.fusion_report(model)}


@pytest.mark.parametrize("name", MODELS)
def test_trains_and_evaluates_as_stock(name: str) -> None:
    make, inputs = MODELS[name]
    stock, ours = pair(make())
    assert list(stock.state_dict()) == list(ours.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (stock, ours)]
    for _ in range(3):
        assert_step(stock, ours, *inputs())
        for optimizer in optimizers:
            optimizer.step()
    stock.eval(), ours.eval()
    assert_step(stock, ours, *inputs())
    with torch.no_grad():
        assert_step(stock, ours, *inputs(), backward=False)
    stock.train(), ours.train()
    assert_step(stock, ours, *inputs())
    args, kwargs = inputs()
    assert ran(lambda: ours(*args, **kwargs))


def generator() -> tuple[nn.Module, nn.Module, Tensor]:
    return *pair(gans.AttributeGenerator()), noise(3, 5)


def same(stock: nn.Module, ours: nn.Module, *args: Any, **kwargs: Any) -> None:
    assert_step(stock, ours, args, kwargs)


def test_fuse_keeps_every_object() -> None:
    model = gans.AttributeGenerator()
    kind, text = type(model), repr(model)
    before = dict(model.named_modules()), dict(model.named_parameters())
    assert gankern.fuse(model) is model
    model(torch.randn(2, 5))
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__, repr(model)) == (kind.__name__, kind.__module__, text)
    assert all(dict(model.named_modules())[n] is m for n, m in before[0].items())
    assert all(dict(model.named_parameters())[n] is p for n, p in before[1].items())
    inner = type(gankern.fuse(model))
    assert gankern.fuse(model).__class__ is inner  # fusing twice changes nothing
    assert type(gankern.unfuse(model)) is kind
    assert "_gankern_plans" not in model.__dict__


def test_weights_init_by_class_name() -> None:
    seen = []
    gankern.fuse(gans.AttributeGenerator()).apply(lambda m: seen.append(m.__class__.__name__))
    assert seen.count("ConvTranspose2d") == 4
    assert seen[-1] == "AttributeGenerator"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _saved(m)],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_stay_fused(name: str, copied: Any) -> None:
    make, inputs = MODELS[name]
    stock, ours = pair(make())
    assert_step(stock, ours, *inputs())  # there are plans now
    again = copied(ours)
    assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
    assert not any("_gankern_plans" in m.__dict__ for m in again.modules())
    assert_step(stock, again, *inputs())
    assert [type(m) for m in gankern.unfuse(again).modules()] == [type(m) for m in stock.modules()]
    assert not {id(p) for p in again.parameters()} & {id(p) for p in ours.parameters()}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class OwnDeepcopy(gans.ListGenerator):
    def __deepcopy__(self, memo: Any) -> OwnDeepcopy:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        for name, value in self.__dict__.items():
            result.__dict__[name] = copy.deepcopy(value, memo)
        return result


def test_own_deepcopy() -> None:
    stock, ours = pair(OwnDeepcopy())
    same(stock, ours, noise(2, 5, 2, 2))
    again = copy.deepcopy(ours)
    with torch.no_grad():
        again.to_rgb.bias.add_(1), stock.to_rgb.bias.add_(1)
    same(stock, again, noise(2, 5, 2, 2))


def test_state_before_and_after() -> None:
    stock, ours, z = generator()
    other = gans.AttributeGenerator().double()
    for model in (stock, ours):
        model.load_state_dict(other.state_dict())
    same(stock, ours, z)
    ours.load_state_dict(stock.state_dict(), assign=True)
    stock = copy.deepcopy(stock)
    same(stock, ours, z)


def test_to_dtype_after() -> None:
    stock, ours = pair(gans.AttributeGenerator())
    same(stock, ours, noise(3, 5))
    stock.float(), ours.float()
    z = torch.randn(3, 5)
    torch.testing.assert_close(ours(z), stock(z), rtol=1e-4, atol=1e-4)


def test_averaged_model() -> None:
    stock, ours, z = generator()
    same(stock, ours, z)
    averaged = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (stock, ours)]
    for _ in range(2):
        same(stock, ours, z)
        averaged[0].update_parameters(stock), averaged[1].update_parameters(ours)
    same(*averaged, z)
    assert isinstance(averaged[1].module, TracedModule)


@pytest.mark.parametrize("first", ["fuse", "compile"])
def test_compiles_into_one_graph(first: str) -> None:
    stock = gans.ListGenerator().double()
    ours = copy.deepcopy(stock)
    if first == "fuse":
        compiled = torch.compile(gankern.fuse(ours), fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        gankern.fuse(compiled)
    z = noise(3, 5, 2, 2)
    for _ in range(2):
        torch.testing.assert_close(compiled(z), stock(z))
    torch.testing.assert_close(ours(z), stock(z))


def test_symbolic_and_jit_traces() -> None:
    _, ours, z = generator()
    ours.eval()
    want = ours(z)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(z), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(ours, (z,))(z), want)


def in_a_row() -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 4, 4), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("make", [gans.AttributeGenerator, in_a_row])
def test_vmap_over_models(make: Any) -> None:
    models = [gankern.fuse(make().double().eval()) for _ in range(2)]
    z = noise(3, 5)
    want = torch.stack([m(z) for m in models])
    parameters, buffers = torch.func.stack_module_state(models)
    call = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (z,)))
    torch.testing.assert_close(call(parameters, buffers), want)


def test_autocast_and_no_grad() -> None:
    stock = gans.AttributeGenerator()
    ours = gankern.fuse(copy.deepcopy(stock))
    z = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(z), stock(z), rtol=0.1, atol=0.05)
    with torch.no_grad():
        out = ours(z)
    assert not out.requires_grad
    assert ours(z).requires_grad


def test_gradient_penalty() -> None:
    stock = gans.Discriminator().eval()
    ours = gankern.fuse(copy.deepcopy(stock))
    real, fake = torch.randn(2, 4, 3, 8, 8)
    alpha = torch.rand(4)
    for _ in range(2):
        grads = []
        for model in (stock, ours):
            model.zero_grad()
            gankern.gradient_penalty(
                lambda x, m=model: m(x)[0], real, fake, params=list(model.parameters()), alpha=alpha
            ).backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
        ours(real)


def test_first_use_by_two_threads() -> None:
    stock, ours = pair(gans.AttributeGenerator())
    stock.eval(), ours.eval()
    z = noise(2, 5)
    want = stock(z)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            ours.__dict__.pop("_gankern_plans", None)
            for got in pool.map(lambda m: m(z), [ours, stock] * 4):
                torch.testing.assert_close(got, want)


# Hooks.

HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone())),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach().clone())),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone())),
    "changes": lambda m, seen: m.register_forward_hook(lambda m, i, o: o * 1.5),
    "views": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(o.view(-1).detach().clone())),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["conv2", "norm2", "act", "conv3", ""])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_keep_their_meaning(kind: str, where: str, when: str) -> None:
    stock = gans.AttributeDiscriminator().double()
    stock.act.inplace = False  # stock refuses full backward hooks in front of it
    ours = copy.deepcopy(stock)
    x = noise(3, 3, 8, 8).requires_grad_()
    if when == "after":
        same(stock, gankern.fuse(ours), x)
    seen: tuple[list[Any], list[Any]] = [], []
    handles = [HOOKS[kind](m.get_submodule(where), s) for m, s in zip((stock, ours), seen, strict=True)]
    gankern.fuse(ours)
    same(stock, ours, x)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-8, atol=1e-10)
    if where in ("norm2", "conv2"):
        assert "a hook on" in (reasons(ours)["", ("conv2", "norm2", "act")] or "")
    assert reasons(ours)["", ("conv1", "act")] == ("a hook on LeakyReLU" if where == "act" else None)
    for handle in handles:
        handle.remove()
    assert set(reasons(ours).values()) == {None}
    same(stock, ours, x)


@pytest.mark.parametrize(
    "make", [gans.AttributeGenerator, lambda: nn.Sequential(nn.ConvTranspose2d(5, 4, 4), nn.ReLU())]
)
@pytest.mark.parametrize(
    "register",
    [
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(make: Any, register: Any) -> None:
    stock, ours = pair(make())
    z = noise(2, 5) if isinstance(stock, gans.AttributeGenerator) else noise(2, 5, 1, 1)
    z.requires_grad_()
    same(stock, ours, z)
    seen: list[str] = []
    handle = register(lambda m, *args: seen.append(type(m).__name__))
    try:
        stock(z).sum().backward()
        want, seen[:] = seen[:], []
        ours(z).sum().backward()
        assert [n.removeprefix("Fused") for n in seen] == want
        assert set(reasons(ours).values()) == {"a hook on all modules"}
    finally:
        handle.remove()
    same(stock, ours, z)


# Forwards whose course depends on something.


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def image(n: int = 2) -> Tensor:
    return noise(n, 3, 6, 6)


def test_course_by_training_mode() -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return x * 2 if self.training else self.last(x)

    stock, ours = pair(Model())
    for mode in (True, False, True, False):
        stock.train(mode), ours.train(mode)
        same(stock, ours, image())
    assert len(ours.__dict__["_gankern_plans"].entries) == 2


def test_course_by_attributes() -> None:
    stock, ours = pair(gans.ProgressiveGenerator())
    for depth, alpha in ((0, 1.0), (1, 0.25), (1, 0.5), (2, 0.5), (2, 1.0), (3, 1), (0, 1.0)):
        for model in (stock, ours):
            model.depth, model.alpha = depth, alpha
        same(stock, ours, noise(2, 5))
        stock(z := noise(2, 5))
        assert ran(lambda: ours(z))
    for step in range(40):  # too many values to trace for each
        for model in (stock, ours):
            model.depth, model.alpha = 1, step / 40
        same(stock, ours, noise(2, 5))
    plans = ours.__dict__["_gankern_plans"]
    assert len(plans.entries) <= 8
    assert plans._traces < 16
    for model in (stock, ours):
        model.alpha = 1.0
    for _ in range(40):
        same(stock, ours, noise(2, 5))


def test_course_by_a_child_s_attribute() -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * self.last.scale + self.bn.eps

    stock = Model()
    stock.last.scale = 2
    stock, ours = pair(stock)
    same(stock, ours, image())
    for model in (stock, ours):
        model.last.scale = True
    same(stock, ours, image())
    for model in (stock, ours):
        model.bn.eps = 0.5
    same(stock, ours, image())


def test_course_by_arguments() -> None:
    class Model(Base):
        def forward(
            self, x: Tensor, y: Tensor | None = None, *more: Tensor, mode: Any = "plain", alpha: float = 1.0
        ) -> Any:
            x = self.block(x)
            if y is not None:
                x = x + y
            for z in more:
                x = x * z
            if mode is True:
                x = x + 100
            if mode == "last":
                x = self.last(x)
            return (x, mode) if alpha >= 1 else (alpha * x, mode)

    stock, ours = pair(Model())
    y = noise(2, 4, 6, 6)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((y,), {}),
        ((None,), {}),
        ((), {"y": y}),
        ((y, y, y), {"mode": "last"}),
        ((), {"mode": 1}),
        ((), {"mode": True}),
        ((), {"mode": 1}),
        ((), {"alpha": 0.5}),
        ((), {"alpha": 0.25}),
    ]
    for args, kwargs in calls * 2:
        same_any(stock, ours, image(), *args, **kwargs)
    assert ran(lambda: ours(image(), mode="last"))


def same_any(stock: nn.Module, ours: nn.Module, *args: Any, **kwargs: Any) -> None:
    want, got = stock(*args, **kwargs), ours(*args, **kwargs)
    assert repr(type(want)) == repr(type(got))
    torch.testing.assert_close([v for v in got if isinstance(v, Tensor)], [v for v in want if isinstance(v, Tensor)])
    assert [v for v in got if not isinstance(v, Tensor)] == [v for v in want if not isinstance(v, Tensor)]
    for a, b in zip(stock.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_open_float_is_traced_once() -> None:
    class Model(Base):
        def forward(self, x: Tensor, alpha: float) -> Tensor:
            x = self.block(x)
            return alpha * x + (1 - alpha) * x.flip(0)

    stock, ours = pair(Model())
    for step in range(20):
        same(stock, ours, image(), step / 20)
    assert len(ours.__dict__["_gankern_plans"].entries) == 1


def test_structures_of_tensors() -> None:
    class Model(Base):
        def forward(self, pair: tuple[Tensor, dict[str, Any]], images: list[Tensor]) -> dict[str, Any]:
            x, rest = pair
            outputs = [self.block(x)]
            for image in images:
                outputs.append(self.block(image) * rest["scale"])
            return {"first": outputs[0], "all": outputs, "nested": (outputs[-1], [x])}

    stock, ours = pair(Model())
    for n in (1, 2, 1):
        same(stock, ours, (image(), {"scale": noise(1)}), [image() for _ in range(n)])
    assert ran(lambda: ours((image(), {"scale": 2}), [image()]))


def test_course_by_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = pair(ReadsGlobals())
    for scale, function in ((1, F.relu), (3, F.relu), (3, torch.tanh)):
        monkeypatch.setattr(sys.modules[__name__], "SCALE", scale)
        monkeypatch.setattr(sys.modules[__name__], "FUNCTION", function)
        monkeypatch.setattr(Config, "SHIFT", scale)
        same(stock, ours, image())
    assert ran(lambda: ours(image()))


SCALE: Any = 1
FUNCTION: Any = F.relu


class Config:
    SHIFT = 0


class ReadsGlobals(Base):
    def forward(self, x: Tensor) -> Tensor:
        return FUNCTION(self.bn(self.conv(x))) * SCALE + Config.SHIFT


def test_children_change() -> None:
    stock, ours = pair(gans.ListGenerator())
    z = noise(2, 5, 2, 2)
    same(stock, ours, z)
    more = nn.ConvTranspose2d(4, 4, 4, 2, 1).double()
    for model in (stock, ours):
        model.convs.append(copy.deepcopy(more))
        model.bns.append(nn.BatchNorm2d(4).double())
    same(stock, ours, z)
    for model in (stock, ours):
        model.bns[1] = nn.Identity()
        model.convs[0] = copy.deepcopy(ours.convs[0])
        model.to_rgb = nn.Sequential(copy.deepcopy(more), nn.Tanh())
    same(stock, ours, z)
    assert ("", ("convs.1",)) in reasons(ours)
    del stock.convs[-1], stock.bns[-1], ours.convs[-1], ours.bns[-1]
    same(stock, ours, z)


def test_parameter_turns_none() -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.register_parameter("shift", None)
            self.register_buffer("noise", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            if self.gain is not None:
                x = x * self.gain
            if self.shift is not None:
                x = x + self.shift
            return x + self.noise if hasattr(self, "noisy") else x

    stock, ours = pair(Model())
    same(stock, ours, image())
    for model in (stock, ours):
        model.shift = nn.Parameter(torch.ones((), dtype=f64))
    same(stock, ours, image())
    for model in (stock, ours):
        model.gain = None
    same(stock, ours, image())
    for model in (stock, ours):
        model.noisy = True
    same(stock, ours, image())
    for model in (stock, ours):
        model.noise = torch.full((), 5.0, dtype=f64)
    same(stock, ours, image())


def test_method_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    stock, ours = pair(Model())
    same(stock, ours, image())
    monkeypatch.setattr(Model, "block", lambda self, x: F.leaky_relu_(self.bn(self.conv(x))))
    same(stock, ours, image())
    monkeypatch.setattr(Model, "forward", lambda self, x: self.block(x) + 1)
    same(stock, ours, image())
    for model in (stock, ours):
        model.block = lambda x, m=model: m.last(m.conv(x))
    same(stock, ours, image())
    for model in (stock, ours):
        model.forward = lambda x: x * 3
    torch.testing.assert_close(ours(z := image()), stock(z))
    assert set(reasons(ours).values()) == {"forward was replaced"}


# Forwards that no trace can stand for run as they are.


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class GivesNone(nn.Module):
    gives = None

    def forward(self, x: Tensor) -> Any:
        return self.gives


class Appends(nn.Module):
    def forward(self, x: Tensor, into: list[Tensor]) -> Tensor:
        into.append(x * 2)
        return x


def helper(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(1)
    return x * len(seen)


COUNTS: list[int] = []


def by_shape(self: Any, x: Tensor) -> Tensor:
    return x if x.shape[0] > 2 else x * 2


def by_value(self: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x * 2


def random_choice(self: Any, x: Tensor) -> Tensor:
    return x.flip(3) if random.random() < 0.5 else x


def numpy_choice(self: Any, x: Tensor) -> Tensor:
    return x.flip(3) if np.random.rand() < 0.5 else x  # noqa: NPY002


def torch_choice(self: Any, x: Tensor) -> Tensor:
    return x.flip(3) if torch.rand(1) < 0.5 else x


def constant(self: Any, x: Tensor) -> Tensor:
    return x + torch.randn(1, dtype=f64)


def remembers(self: Any, x: Tensor) -> Tensor:
    self.features = x
    return x


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return x * self.calls


def appends(self: Any, x: Tensor) -> Tensor:
    self.history.append(len(self.history))
    return x * len(self.history)


def appends_globally(self: Any, x: Tensor) -> Tensor:
    COUNTS.append(1)
    return x


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean()
    return x / scale


def asks_grad(self: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.is_grad_enabled() else x


def own_backward(self: Any, x: Tensor) -> Tensor:
    return Straight.apply(x)


def checkpointed(self: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(self.last, x, use_reentrant=False)


def asks_type(self: Any, x: Tensor) -> Tensor:
    return x * 2 if type(x) is Tensor else x


def asks_kind(self: Any, x: Tensor) -> Tensor:
    return x * 2 if isinstance(x.shape[0], int) else x


def asks_is_tensor(self: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.is_tensor(x) else x


def asks_attribute(self: Any, x: Tensor) -> Tensor:
    return x * 2 if hasattr(x, "sample") else x


def asks_grad_fn(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.grad_fn is None else x


def prints(self: Any, x: Tensor) -> Tensor:
    print("here")
    return x


def formats(self: Any, x: Tensor) -> Tensor:
    return x * len(f"{x.shape}")


def catches(self: Any, x: Tensor) -> Tensor:
    try:
        return x * float(x.detach().sum())
    except TypeError:
        return x


def time_of_day(self: Any, x: Tensor) -> Tensor:
    return x * (time.time() % 1)


def default_list(self: Any, x: Tensor) -> Tensor:
    return helper(x)


def walks_parameters(self: Any, x: Tensor) -> Tensor:
    return x.to(next(self.parameters()).dtype)


def may_be_none(self: Any, x: Tensor) -> Tensor:
    y = self.gives_none(x)
    return x if y is None else x * y


def fills_a_list(self: Any, x: Tensor) -> Tensor:
    features: list[Tensor] = []
    self.appends(x, features)
    return sum(features)  # type: ignore[return-value]


def tensor_attribute(self: Any, x: Tensor) -> Tensor:
    return x * self.grid.shape[0]


def reads_dict(self: Any, x: Tensor) -> Tensor:
    return x * self.options["scale"]


def sets_item(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def seeds(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x + torch.randn_like(x)


def makes_module(self: Any, x: Tensor) -> Tensor:
    return nn.Hardtanh(-1, 1)(x)


def enclosing() -> Any:
    count = [0]

    def closure(self: Any, x: Tensor) -> Tensor:
        count[0] += 1
        return x * count[0]

    return closure


STOCK = {
    by_shape: "control flow",
    by_value: "control flow",
    random_choice: "random",
    numpy_choice: "np.random",
    torch_choice: "calls rand",
    constant: "calls randn",
    remembers: "sets an attribute",
    counts: "sets an attribute",
    appends: "list",
    appends_globally: "COUNTS, a list",
    no_grad: "with block",
    asks_grad: "is_grad_enabled",
    own_backward: "Straight.apply",
    checkpointed: "calls torch.",
    asks_type: "uses type",
    asks_kind: "type of a computed value",
    asks_is_tensor: "is_tensor",
    asks_attribute: "sample",
    asks_grad_fn: "grad_fn",
    prints: "uses print",
    formats: "text of a tensor",
    catches: "try",
    time_of_day: "time",
    default_list: "default",
    walks_parameters: "parameters",
    may_be_none: "None",
    fills_a_list: "list",
    tensor_attribute: "grid, a Tensor",
    reads_dict: "options, a dict",
    sets_item: "item assignment",
    seeds: "calls torch.",
    makes_module: "calls torch.nn.modules.activation",
    enclosing(): "count of the function around it",
}


@pytest.mark.parametrize(("tail", "reason"), STOCK.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_untraceable_runs_stock(tail: Any, reason: str, capsys: Any) -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.history: list[int] = []
            self.options = {"scale": 2}
            self.grid = torch.ones(3)
            self.gives_none, self.appends = GivesNone(), Appends()

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.block(x))

    Model.tail = tail  # type: ignore[attr-defined]
    stock, ours = pair(Model())
    same_cases = [image(2), image(3), image(2)]
    for x in same_cases:
        results = []
        for model in (stock, ours):
            torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
            COUNTS.clear()
            held = [dict(model.__dict__), list(model.history)]
            if tail in (default_list, time_of_day) or tail.__name__ == "closure":
                continue
            out = model(x)
            out.square().sum().backward()
            state = (
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state()[2],  # noqa: NPY002
                len(COUNTS),
                len(model.history),
            )
            results.append((out, [p.grad for p in model.parameters() if p.grad is not None], state))
            model.zero_grad()
            del held
        if results:
            torch.testing.assert_close(results[1][:2], results[0][:2])
            assert repr(results[1][2]) == repr(results[0][2])
    (run,) = gankern.fusion_report(ours)
    assert run.names == ("conv", "bn", "last")
    assert run.reason is not None
    assert run.reason.startswith("forward cannot be traced: ")
    assert reason in run.reason
    assert "features" not in ours.__dict__ or tail is remembers
    if tail is prints:
        assert capsys.readouterr().out.count("here") == 6


def test_list_of_values_is_compared() -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.names = ["conv", "bn"]

        def forward(self, x: Tensor) -> Tensor:
            for name in self.names:
                x = getattr(self, name)(x)
            return F.relu(x)

    stock, ours = pair(Model())
    for names in (["conv", "bn", "last"], ["conv"], ["conv", "bn"]):
        for model in (stock, ours):
            model.names[:] = names
        same(stock, ours, image())
    assert ran(lambda: ours(image()))


# What is used twice, or in between, or in place.


def test_output_used_twice() -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.conv(x)
            g = self.bn(h)
            return F.relu(g), h, torch.tanh(g)

    stock, ours = pair(Model())
    same(stock, ours, image())
    found = reasons(ours)
    assert found["", ("conv", "bn")] == "the output of conv is used 2 times"
    assert found["", ("bn", "relu")] == "the output of bn is used 2 times"


def test_calls_in_between() -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            x.mul_(2)
            return F.relu(self.bn(h)) + x.mean()

    stock, ours = pair(Model())
    want, got = stock.eval()(torch.ones(2, 3, 6, 6, dtype=f64)), ours.eval()(torch.ones(2, 3, 6, 6, dtype=f64))
    torch.testing.assert_close(got, want)
    assert reasons(ours)["", ("conv", "bn")] == "mul_ is called between conv and bn"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_changed_in_place(layout: torch.memory_format, norm: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # A bias in front of a batch norm has no gradient but noise.
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=not norm)
            self.n = nn.BatchNorm2d(3) if norm else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = out = self.n(self.b(F.leaky_relu(self.a(x))))
            out += x
            y.mul_(2)
            return out

    stock = Model()
    ours = gankern.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=layout)
    results = []
    for model in (stock, ours):
        out = model(x)
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_shared_modules() -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            x = F.relu(self.bn(self.again(x)))
            return torch.tanh(self.bn(self.conv2(x)))

    stock, ours = pair(Model())
    for _ in range(2):
        same(stock, ours, image())
    assert int(ours.bn.num_batches_tracked) == 6
    assert len(gankern.fusion_report(ours)) == 3


@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.spectral_norm, "old"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_spectral_norm(norm: Any) -> None:
    norm = torch.nn.utils.spectral_norm if norm == "old" else norm
    stock = gans.Discriminator().double()
    stock.b = norm(stock.b)
    ours = gankern.fuse(copy.deepcopy(stock))
    for _ in range(2):
        same(stock, ours, noise(2, 3, 8, 8))
    assert reasons(ours)["", ("a", "leaky_relu")] is None
    assert reasons(ours)["", ("b", "leaky_relu")] is not None


def test_unsupported_options() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
            self.b = nn.ConvTranspose2d(4, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.n(self.a(x)))
            return torch.tanh(self.b(x, output_size=[12, 12]))

    stock, ours = pair(Model())
    same(stock, ours, image())
    found = reasons(ours)
    assert "reflect" in (found["", ("a", "n", "relu")] or "")
    assert found["", ("b",)] == "ConvTranspose2d is called with more than its input"


def test_report_before_and_after() -> None:
    model = gans.AttributeGenerator()
    assert set(reasons(model).values()) == {"not fused: call gankern.fuse"}
    gankern.fuse(model)
    want = {
        ("", ("deconv1", "deconv1_bn", "relu")): None,
        ("", ("deconv2", "deconv2_bn", "leaky_relu")): None,
        ("", ("deconv3", "deconv3_bn", "relu")): None,
        ("", ("deconv4", "tanh")): None,
    }
    assert reasons(model) == want
    model(torch.randn(2, 5))
    assert reasons(model) == want
    assert ("blocks.0", ("b1", "relu")) in reasons(gankern.fuse(gans.ResGenerator()))


def test_subclass_of_sequential() -> None:
    stock, ours = pair(gans.ConvBlock(3, 4))
    assert isinstance(ours, gans.ConvBlock)
    for _ in range(2):
        same(stock, ours, image())
    assert ran(lambda: ours(image()))
    assert reasons(ours) == {("", ("0", "1", "2")): None}
    assert type(gankern.unfuse(copy.deepcopy(ours))) is gans.ConvBlock


def test_classes_that_cannot_be_extended() -> None:
    registry: list[str] = []

    class Watching(Base):
        def __init_subclass__(cls) -> None:
            registry.append(cls.__name__)

    class Model(Watching):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model = gankern.fuse(Model())
    assert registry == ["Model"]
    assert type(model) is Model
    assert set(reasons(model).values()) == {"Watching watches its subclasses"}


@pytest.mark.by_size
def test_small_ones_run_stock() -> None:
    ours = gankern.fuse(gans.AttributeGenerator(width=8))
    assert not ran(lambda: ours(torch.randn(2, 5)))
    with gankern.backend("cpu"):
        assert ran(lambda: ours(torch.randn(2, 5)))
    big = gankern.fuse(gans.ListGenerator((64, 64, 64)))
    assert ran(lambda: big(torch.randn(16, 64, 16, 16)))


def test_layout_of_what_others_see() -> None:
    seen = []

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.stride())
            return x.view(x.size(0), -1)

    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.other = Other()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.block(x)) + self.block(x).view(x.size(0), -1)

    stock, ours = pair(Model())
    same(stock, ours, image())
    assert seen[0] == seen[1]


def test_default_device() -> None:
    ours = gankern.fuse(gans.AttributeGenerator())
    with torch.device("cpu"):
        assert ran(lambda: ours(torch.randn(2, 5)))
    assert ran(lambda: ours(torch.randn(2, 5)))


def test_profiler_of_the_caller_stays() -> None:
    ours = gankern.fuse(gans.AttributeGenerator())
    events: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        events.append(event)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        ours(torch.randn(2, 5))
        now = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert now is profile
    assert "__getattribute__" not in nn.Module.__dict__
