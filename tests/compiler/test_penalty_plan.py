"""Plans of penalties: derived graphs give stock's values, and guards see every change."""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gankern import penalties
from gankern.compiler.cache import MOST_PLANS, Plans, plans_of
from gankern.compiler.refusal import Refused

GP = (10.0, 1.0, False, False)
R1 = (5.0, 0.0, False, True)


def stock(critic: Callable[..., Tensor], x: Tensor, args: tuple[Any, ...], params: list[Tensor], options: Any) -> Any:
    weight, target, one_sided, squared = options
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(x, *args).sum(), x, create_graph=True)
    if squared:
        loss = weight * grad.flatten(1).square().sum(1).mean()
    else:
        excess = grad.flatten(1).norm(2, dim=1) - target
        loss = weight * (excess.clamp_min(0) if one_sided else excess).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, params, allow_unused=True)]


def planned(plans: Plans, critic: Any, x: Tensor, args: Any, params: list[Tensor], options: Any) -> Any:
    call = {"critic": critic, "x": x.detach().requires_grad_(), "args": args, "kwargs": {}}
    loss, found = plans.run(call, True, False, options)
    grads = {id(t): g for t, g in found}
    return [loss, *(grads.get(id(p)) for p in params)]


def same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def agrees(critic: nn.Module, x: Tensor, *args: Any, options: Any = GP, plans: Plans | None = None) -> Plans:
    """Values, gradients, buffers and the random state after a planned run are those after a stock run."""
    plans = Plans() if plans is None else plans
    other = copy.deepcopy(critic)
    torch.manual_seed(3)
    want = stock(other, x, args, [p for p in other.parameters() if p.requires_grad], options)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    got = planned(plans, critic, x, args, [p for p in critic.parameters() if p.requires_grad], options)
    assert torch.equal(torch.get_rng_state(), after)
    same(got, want)
    for b, c in zip(critic.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-11)
    return plans


def images(n: int = 3, c: int = 2, size: int = 8) -> Tensor:
    return torch.randn(n, c, size, size, dtype=torch.float64)


def conv_critic(*norms: nn.Module) -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3, 2, 1), *norms, nn.LeakyReLU(0.2, True), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 1)).double()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1, groups=2)
        self.head = nn.Linear(2, 1)
        self.gain = 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.leaky_relu(self.a(x), 0.2))
        return self.head(F.relu(x + self.gain * h).sum((2, 3)))


class Modulated(nn.Module):
    """A bias that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.c = nn.Conv2d(2, 8, 3, 1, 1), nn.Linear(2, 8), nn.Conv2d(8, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.conv2d(x, self.a.weight, self.m(x.mean((0, 2, 3))), 1, 1)).square()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x) * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * F.relu(x)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Square.apply(self.a(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).mean(1)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x), 0.2)
        h *= 2**0.5
        return self.b(h * h.detach().sigmoid())


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed, self.head = nn.Linear(4, 8), nn.Embedding(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.softplus(self.body(x))
        return self.head(h).flatten() + (self.embed(y) * h).sum(1)


@pytest.mark.parametrize("options", [GP, R1, (3.0, 0.5, True, False)], ids=["gp", "r1", "one-sided"])
@pytest.mark.parametrize(
    "make",
    [
        conv_critic,
        lambda: conv_critic(nn.BatchNorm2d(4)),
        lambda: conv_critic(nn.BatchNorm2d(4, momentum=None)).eval(),
        lambda: conv_critic(nn.InstanceNorm2d(4, affine=True)),
        lambda: conv_critic(nn.LayerNorm([4, 4, 4])),
        lambda: conv_critic(nn.Dropout(0.4)),
        lambda: conv_critic(nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last),
        Residual,
        Modulated,
    ],
    ids=["plain", "bn", "bn-eval", "in", "ln", "dropout", "channels-last", "residual", "modulated"],
)
def test_images(make: Callable[[], nn.Module], options: Any) -> None:
    agrees(make().double(), images(), options=options)


@pytest.mark.parametrize("make", [Custom, Detached])
def test_vectors(make: Callable[[], nn.Module]) -> None:
    agrees(make().double(), torch.randn(5, 4, dtype=torch.float64))


def test_attention_needs_no_choice_of_the_user() -> None:
    critic = Attention().double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        want = stock(critic, x, (), list(critic.parameters()), GP)
    same(planned(Plans(), critic, x, (), list(critic.parameters()), GP), want)


def test_labels() -> None:
    critic = Labelled().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x, torch.tensor([0, 1, 2, 1, 0]))
    # The plan is for any labels.
    agrees(critic, x, torch.tensor([2, 2, 2, 0, 1]), plans=plans)
    assert plans.made == 1 and plans.hits == 1


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_parametrized(wrap: Callable[[nn.Module], nn.Module]) -> None:
    critic = nn.Sequential(wrap(nn.Linear(4, 8)), nn.LeakyReLU(0.2), wrap(nn.Linear(8, 1))).double()
    plans = agrees(critic, torch.randn(5, 4, dtype=torch.float64))
    agrees(critic, torch.randn(5, 4, dtype=torch.float64), plans=plans)
    assert plans.made == 1


def test_capturing_writes_nothing() -> None:
    critic = conv_critic(nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = images().requires_grad_()
    before, state = copy.deepcopy(critic.state_dict()), torch.get_rng_state()
    versions = [t._version for t in (*critic.parameters(), *critic.buffers())]
    from gankern.compiler.penalty import PenaltyPlan

    PenaltyPlan({"critic": critic, "x": x, "args": (), "kwargs": {}}, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [t._version for t in (*critic.parameters(), *critic.buffers())] == versions
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name])


class Alpha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)
        self.alpha, self.options, self.act = 0.3, {"slope": 0.2}, nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.alpha * self.act(F.leaky_relu(self.a(x), self.options["slope"])))


_GLOBAL = 1.0


class ReadsGlobal(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return _GLOBAL * super().forward(x)


def _assign(critic: Alpha) -> None:
    critic.load_state_dict({k: v + 1 for k, v in critic.state_dict().items()}, assign=True)


def _set_global(critic: Alpha) -> None:
    global _GLOBAL
    _GLOBAL += 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda c: setattr(c, "alpha", c.alpha + 0.1),
    "dict": lambda c: c.options.update(slope=0.4),
    "layer": lambda c: setattr(c, "act", nn.Sigmoid()),
    "parameter": lambda c: setattr(c.a, "weight", nn.Parameter(torch.randn_like(c.a.weight))),
    "data": lambda c: setattr(c.a.weight, "data", torch.randn_like(c.a.weight)),
    "frozen": lambda c: c.a.requires_grad_(False),
    "bias": lambda c: setattr(c.a, "bias", None),
    "load_state_dict": lambda c: c.load_state_dict({k: v + 1 for k, v in c.state_dict().items()}),
    "assign": _assign,
    "global": _set_global,
    "patched instance": lambda c: setattr(c.act, "forward", torch.sigmoid),
    "forward hook": lambda c: c.act.register_forward_hook(lambda m, i, o: o.square()),
    "parameter hook": lambda c: c.a.weight.register_hook(lambda g: 3 * g),
    "float32": lambda c: c.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    critic = ReadsGlobal().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    CHANGES[change](critic)
    hooks = [h for p in critic.parameters() for h in (p._backward_hooks or {}).values()]
    try:
        agrees(critic, x, plans=plans)
        assert not hooks
    except Refused:
        assert change in ("patched instance", "forward hook", "parameter hook")


def test_a_patched_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, input: torch.tanh(input))
    agrees(critic, x, plans=plans)
    monkeypatch.undo()
    monkeypatch.setattr(F, "leaky_relu", lambda input, *args: torch.sigmoid(input))
    agrees(critic, x, plans=plans)


def test_a_patched_method_of_tensors_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    critic, x = Detached().double(), torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    monkeypatch.setattr(Tensor, "sigmoid", lambda self: self.tanh())
    agrees(critic, x, plans=plans)


def test_new_code_in_a_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As IPython's autoreload puts it there."""
    critic, x = Detached().double(), torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    monkeypatch.setattr(Detached.forward, "__code__", (lambda self, x: self.b(self.a(x).tanh())).__code__)
    agrees(critic, x, plans=plans)


def test_a_class_may_hold_what_the_forward_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alpha, "history", torch.zeros(3), raising=False)
    critic = Alpha().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    monkeypatch.setattr(Alpha, "history", torch.ones(3))
    agrees(critic, x, plans=plans)
    assert plans.made == 1 and plans.hits == 1


def test_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadsEnvironment(Alpha):
        def forward(self, x: Tensor) -> Tensor:
            return float(os.environ.get("GANKERN_TEST_SCALE", "1")) * super().forward(x)

    critic, x = ReadsEnvironment().double(), torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    monkeypatch.setenv("GANKERN_TEST_SCALE", "3")
    agrees(critic, x, plans=plans)


class Scale:
    def of(self, h: Tensor) -> Tensor:
        return 2 * h


class Outside(Alpha):
    """Reads what is no module of its own: an object, a layer in a list, the environment."""

    count = torch.zeros(3)

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.acts = Scale(), [nn.SiLU()]

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale.of(self.acts[0](super().forward(x)).sinh())
        return h * float(os.environ.get("GANKERN_TEST_SCALE", "1"))


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "method of an object": lambda patch: patch.setattr(Scale, "of", lambda self, h: h.square()),
    "class of a layer in a list": lambda patch: patch.setattr(nn.SiLU, "forward", lambda self, h: h.square()),
    "method of Tensor": lambda patch: patch.setattr(Tensor, "sinh", lambda h: h.sin(), raising=False),
    "environment": lambda patch: patch.setenv("GANKERN_TEST_SCALE", "3"),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_change_outside_of_the_critic_is_seen(patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = Outside().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    PATCHES[patch](monkeypatch)
    agrees(critic, x, plans=plans)
    assert plans.made == 2
    monkeypatch.undo()
    agrees(critic, x, plans=plans)
    assert plans.made == 2


def test_arrays_of_a_class_may_change() -> None:
    critic = Outside().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    for value in (torch.ones(3), torch.ones(2), np.ones(3), np.ones(4)):
        Outside.count = value  # type: ignore[assignment]
        agrees(critic, x, plans=plans)
    assert plans.made == 1


def test_a_global_hook_is_seen() -> None:
    critic = conv_critic()
    plans = agrees(critic, images())
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        with pytest.raises(Refused, match="hook"):
            agrees(critic, images(), plans=plans)
    finally:
        hook.remove()
    agrees(critic, images(), plans=plans)


def test_many_kinds_of_calls_are_planned_at_once() -> None:
    critic = conv_critic(nn.BatchNorm2d(4))
    plans = Plans()

    def kinds() -> None:
        for n in (8, 7, 2):
            agrees(critic, images(n), plans=plans)
        agrees(critic, images(4).to(memory_format=torch.channels_last), plans=plans)
        agrees(critic, images(4, size=16)[:, :, ::2, ::2], plans=plans)
        agrees(critic.eval(), images(4), plans=plans)
        critic[0].requires_grad_(False)
        agrees(critic, images(4), plans=plans)
        critic[0].requires_grad_(True)
        critic.train()

    kinds()
    made = plans.made
    kinds()
    assert plans.made == made == 7 and plans.hits == 7


def test_plans_that_no_second_call_can_use_are_made_no_more() -> None:
    critic, plans = Alpha().double(), Plans()
    x, params = torch.randn(3, 4, dtype=torch.float64), list(critic.parameters())
    for _ in range(MOST_PLANS):
        critic.alpha += 0.01
        planned(plans, critic, x, (), params, GP)
    critic.alpha += 0.01
    with pytest.raises(Refused, match="changes too often"):
        planned(plans, critic, x, (), params, GP)
    assert plans.made == MOST_PLANS


class Branches(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Counts(Alpha):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Replaces(Alpha):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


class SetsData(Replaces):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return Alpha.forward(self, x - self.mean)


class DrawsInPython(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return random.random() * super().forward(x)


class ListInTuple(Alpha):
    def __init__(self) -> None:
        super().__init__()
        self.scales = (1.0, [2.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.scales[1][0] * super().forward(x)


class Checkpointed(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class DrawsNumpy(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.from_numpy(np.random.randn(4)))  # noqa: NPY002


class Aliases(Alpha):
    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("first", self.mean[:1])

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(x.detach().mean(0))
        return super().forward(x - self.first)


@functools.lru_cache
def _remembered() -> float:
    return _GLOBAL


class Remembers(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * _remembered()


class Hooks(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.register_hook(lambda g: 2 * g)
        return self.b(self.act(h))


class Differentiates(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        (g,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return super().forward(x) + g.sum(1, keepdim=True)


REFUSED = [Branches, Counts, Replaces, SetsData, DrawsInPython, ListInTuple, Checkpointed, Hooks, Differentiates]
REFUSED += [DrawsNumpy, Aliases, Remembers]


@pytest.mark.parametrize("make", REFUSED)
def test_what_no_replay_can_follow_is_refused(make: Callable[[], nn.Module]) -> None:
    critic = make().to(torch.float64)
    drawn = str(np.random.get_state())  # noqa: NPY002
    before = copy.deepcopy(critic.state_dict())
    with pytest.raises(Refused, match=r"^(?!.*Warning)"):
        planned(Plans(), critic, torch.randn(3, 4, dtype=torch.float64), (), list(critic.parameters()), GP)
    for name, value in critic.state_dict().items():
        assert type(value) is Tensor and torch.equal(value, before[name])
    assert vars(critic).get("calls", 0) == 0
    assert str(np.random.get_state()) == drawn  # noqa: NPY002


def test_dropout_of_all_draws_nothing() -> None:
    critic = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    critic[1].p = 1.0
    agrees(critic, x, plans=plans)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resized_signals_are_those_of_the_kernels(mode: str) -> None:
    critic = nn.Sequential(nn.Upsample(scale_factor=1.1, mode=mode), nn.Tanh(), nn.Conv1d(2, 1, 3)).float()
    x = torch.randn(2, 2, 5)
    want = stock(critic, x, (), list(critic.parameters()), GP)
    for g, w in zip(planned(Plans(), critic, x, (), list(critic.parameters()), GP), want, strict=True):
        torch.testing.assert_close(g, w)


def test_an_assertion_on_values_is_kept() -> None:
    class Bounded(Alpha):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("most", torch.tensor(1e9))

        def forward(self, x: Tensor) -> Tensor:
            torch._assert_async((x.abs() < self.most).all())
            return super().forward(x)

    critic = Bounded().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plans = agrees(critic, x)
    critic.most.zero_()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="nonzero"):
        planned(plans, critic, x, (), list(critic.parameters()), GP)


def test_a_lazy_critic_draws_as_stock() -> None:
    critic = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    params = list(critic.parameters())
    with pytest.raises(Refused, match="shapes"):
        planned(Plans(), critic, x, (), params, GP)
    critic(x)
    agrees(critic, x)


def test_points_that_a_refused_replay_changed_are_as_before() -> None:
    class Clamps(Alpha):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.clamp_(-0.5, 0.5)
            return super().forward(x)

    critic, plans = Clamps().double(), Plans()
    x = torch.randn(3, 4, dtype=torch.float64)
    agrees(critic, x.clone(), plans=plans)
    critic.a.bias.data.fill_(torch.inf)
    critic.act = nn.Identity()
    before = x.clone()
    with pytest.raises(Refused, match="finite"):
        planned(plans, critic, x, (), list(critic.parameters()), GP)
    assert torch.equal(x, before)


def test_a_function_is_planned_for_any_network_that_it_closes_over() -> None:
    plans = Plans()

    def scores_of(critic: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: critic(x)[:, 0]

    for _ in range(2):
        critic = conv_critic()
        params, x = list(critic.parameters()), images()
        want = stock(scores_of(critic), x, (), params, GP)
        same(planned(plans, scores_of(critic), x, (), params, GP), want)


def test_dead_networks_are_let_go() -> None:
    critic = conv_critic()
    agrees(critic, images(), plans=plans_of(critic))
    gone = weakref.ref(critic)
    del critic
    gc.collect()
    assert gone() is None


def test_without_dynamo_nothing_runs_twice() -> None:
    critic = conv_critic(nn.BatchNorm2d(4))
    with torch.compiler.set_stance("force_eager"), pytest.raises(Refused, match="switched off"):
        planned(Plans(), critic, images(), (), list(critic.parameters()), GP)
    assert critic[1].num_batches_tracked == 0


def test_a_reset_of_dynamo_is_survived() -> None:
    critic = conv_critic(nn.BatchNorm2d(4))
    plans = agrees(critic, images())
    torch._dynamo.reset()
    gc.collect()
    agrees(critic, images(), plans=plans)
    agrees(critic.eval(), images(), plans=plans)


def test_a_planned_penalty_is_a_tensor_like_others() -> None:
    critic = Residual().double()
    x = images()
    want = stock(critic, x, (), list(critic.parameters()), R1)
    loss = penalties.r1(critic, x, weight=10.0)
    loss *= 2
    (loss + 1).backward(retain_graph=True)
    loss.backward()
    same(
        [loss.detach() / 2, *(p.grad / 4 for p in critic.parameters() if p.grad is not None)],
        [w for w in want if w is not None],
    )
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(penalties.r1(critic, x), next(critic.parameters()), create_graph=True)
    again = penalties.r1(critic, x, weight=10.0, create_graph=True)
    torch.autograd.grad(again, next(critic.parameters()), create_graph=True)
    assert plans_of(critic).made == 1 and plans_of(critic).hits == 1


def test_params_do_not_limit_who_gets_a_gradient() -> None:
    critic, x = Residual().double(), images()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    critic.register_buffer("scale", scale * 1)
    critic.__class__ = type("Scaled", (Residual,), {"forward": lambda self, x: self.scale * Residual.forward(self, x)})
    params = [critic.a.weight, critic.head.weight, critic.scale]
    want = stock(critic, x, (), params, R1)
    same(planned(Plans(), lambda x: critic(x), x, (), params, R1), want)
    loss = penalties.r1(lambda x: critic(x), x, weight=10.0, params=params[:1])
    same([loss.detach(), *torch.autograd.grad(loss, params)], want)
