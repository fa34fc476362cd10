"""Planned steps leave what the plain function leaves, call for call, whatever is changed between."""

from __future__ import annotations

import contextvars
import copy
import gc
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.compiler import choice, planning, segments

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with planning(True), choice.everywhere():
        yield


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()


def conv(*layers: nn.Module) -> nn.Sequential:
    head = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), *layers, nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), head, nn.Flatten(), nn.Linear(16, 1)).double()


def adam(params: Any, lr: float) -> torch.optim.Optimizer:
    """What rounding leaves of a gradient that is zero stays far below epsilon."""
    return torch.optim.Adam(params, lr=lr, eps=1e-3)


class Gan:
    """A user's training code."""

    def __init__(self, critic: Callable[[], nn.Module] = mlp, optimizer: Callable[..., Any] = adam) -> None:
        torch.manual_seed(0)
        self.critic = critic()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
        self.critic_optimizer = optimizer(self.critic.parameters(), lr=1e-2)
        self.generator_optimizer = optimizer(self.generator.parameters(), lr=1e-2)
        self.weight = 10.0
        self.clip: float | None = None
        self.count = 0
        self.set_to_none = True

    def latent(self, real: Tensor) -> Tensor:
        return torch.randn(real.size(0), 2, dtype=real.dtype, device=real.device)

    def wgan_gp(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.generator(self.latent(real))
        loss = self.critic(fake).mean() - self.critic(real).mean()
        loss = loss + gankern.gradient_penalty(self.critic, real, fake, weight=self.weight)
        self.critic_optimizer.zero_grad(set_to_none=self.set_to_none)
        loss.backward()
        self.critic_optimizer.step()
        if self.clip is not None:
            gankern.clip_weights_(self.critic, self.clip)
        return loss.detach()

    def own_penalty(self, real: Tensor) -> dict[str, Tensor]:
        """As people write it."""
        self.critic.zero_grad()
        fake = self.generator(self.latent(real)).detach()
        alpha = torch.rand(real.size(0), 1, dtype=real.dtype, device=real.device)
        x = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        scores = self.critic(x)
        (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True, retain_graph=True)
        penalty = ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean() * self.weight
        real_score, fake_score = self.critic(real).mean(), self.critic(fake).mean()
        loss = fake_score - real_score + penalty
        loss.backward()
        self.critic_optimizer.step()
        return {"loss": loss, "distance": real_score.detach() - fake_score.detach()}

    def generate(self, real: Tensor) -> Tensor:
        loss = -self.critic(self.generator(self.latent(real))).mean()
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        return loss

    def dcgan(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks in one step; two backward passes of the critic's."""
        ones = torch.ones(real.size(0), 1, dtype=real.dtype, device=real.device)
        self.critic.zero_grad()
        of_real = F.binary_cross_entropy_with_logits(self.critic(real), ones)
        of_real.backward()
        fake = self.generator(self.latent(real))
        of_fake = F.binary_cross_entropy_with_logits(self.critic(fake.detach()), 1 - ones)
        of_fake.backward()
        self.critic_optimizer.step()
        self.generator.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.critic(fake), ones)
        loss.backward()
        self.generator_optimizer.step()
        return (of_real + of_fake).detach(), loss.detach()

    def clipped(self, real: Tensor) -> Tensor:
        self.critic_optimizer.zero_grad()
        loss = self.critic(self.generator(self.latent(real)).detach()).mean() - self.critic(real).mean()
        loss.backward()
        self.critic_optimizer.step()
        for p in self.critic.parameters():
            p.data.clamp_(-0.1, 0.1)
        return loss.detach()

    def state(self) -> list[Any]:
        found: list[Any] = []
        for module in (self.critic, self.generator):
            found += [module.state_dict(), [p.grad for p in module.parameters()]]
            found += [[p.requires_grad for p in module.parameters()]]
        return [*found, self.critic_optimizer.state_dict(), self.generator_optimizer.state_dict()]


def same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.requires_grad, got.stride()) == (want.requires_grad, want.stride())
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, equal_nan=True)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    else:
        assert got == want


def real(n: int = 6) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def agree(
    method: str,
    *changes: Callable[[Gan], Any],
    make: Callable[[], Gan] = Gan,
    inputs: Callable[[], Tensor] = real,
    calls: int = 3,
) -> gankern.Step[..., Any]:
    """Run a step as it is and planned, on twins, with changes to both before calls; the step."""
    plain, planned = make(), make()
    step: Any = gankern.step(getattr(Gan, method))
    for number, change in enumerate((None, *changes)):
        if change is not None:
            change(plain), change(planned)
        for call in range(calls):
            torch.manual_seed(10 * number + call)
            x = inputs()
            before = torch.get_rng_state()
            with planning(False):
                want = getattr(plain, method)(x)
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            got = step(planned, x)
            assert torch.equal(torch.get_rng_state(), after)
            same(got, want)
            same(planned.state(), plain.state())
    return step


def runs_by_plan(step: gankern.Step[..., Any]) -> None:
    found = step.explain()
    assert found.chosen == "plan", str(found)


def rmsprop(params: Any, lr: float) -> Any:
    return gankern.optim.RMSprop(params, lr=lr, clip=0.05)


def sgd(params: Any, lr: float) -> Any:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def of_torch(name: str, **options: Any) -> Any:
    return pytest.param(lambda params, lr: getattr(torch.optim, name)(params, lr=lr, **options), id=f"{name} {options}")


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(rmsprop, id="rmsprop"),
        *(of_torch("Adam", eps=1e-3, **o) for o in ({}, {"amsgrad": True}, {"weight_decay": 0.1, "maximize": True})),
        *(of_torch("AdamW", eps=1e-3, **o) for o in ({}, {"foreach": True}, {"fused": True}, {"amsgrad": True})),
        *(of_torch("RMSprop", eps=1e-3, **o) for o in ({}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1})),
        *(of_torch("SGD", **o) for o in ({}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})),
        *(of_torch("SGD", **o) for o in ({"momentum": 0.9, "dampening": 0.5, "maximize": True},)),
        *(of_torch(name, eps=1e-3) for name in ("Adagrad", "NAdam", "Adamax")),
    ],
)
@pytest.mark.parametrize("method", ["wgan_gp", "generate"])
def test_optimizers(method: str, optimizer: Any) -> None:
    runs_by_plan(agree(method, make=lambda: Gan(optimizer=optimizer)))


@pytest.mark.parametrize(
    "critic",
    [
        lambda: mlp(nn.Dropout(0.5)),
        lambda: mlp(nn.BatchNorm1d(8)),
        lambda: mlp(nn.LayerNorm(8)),
        lambda: conv(),
        lambda: conv(nn.BatchNorm2d(4)),
        lambda: conv(nn.InstanceNorm2d(4, affine=True), nn.Dropout2d(0.3)),
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 1)
        ).double(),
    ],
    ids=["dropout", "batch", "layer", "conv", "conv batch", "conv instance", "spectral"],
)
@pytest.mark.parametrize("method", ["wgan_gp", "own_penalty", "generate", "dcgan", "clipped"])
def test_critics(method: str, critic: Callable[[], nn.Module]) -> None:
    runs_by_plan(agree(method, make=lambda: Gan(critic, sgd)))


def set_lr(gan: Gan) -> None:
    for group in gan.critic_optimizer.param_groups:
        group["lr"] = 3e-3


def other_weights(gan: Gan) -> None:
    gan.critic.load_state_dict({k: v + 0.1 for k, v in gan.critic.state_dict().items()})


def assigned_weights(gan: Gan) -> None:
    gan.critic.load_state_dict({k: v + 0.1 for k, v in gan.critic.state_dict().items()}, assign=True)
    gan.critic_optimizer = torch.optim.Adam(gan.critic.parameters(), lr=1e-2)


def other_state(gan: Gan) -> None:
    state = gan.critic_optimizer.state_dict()
    state["state"] = {k: {n: 2 * t for n, t in own.items()} for k, own in state["state"].items()}
    gan.critic_optimizer.load_state_dict(state)


def frozen(gan: Gan) -> None:
    gan.critic[0].weight.requires_grad_(False)


def grads_of_zero(gan: Gan) -> None:
    gan.set_to_none = False


def no_grads(gan: Gan) -> None:
    for p in gan.critic.parameters():
        p.grad = None


def own_grads(gan: Gan) -> None:
    """Left by somebody else, one in another order of memory."""
    for p in gan.critic.parameters():
        p.grad = torch.ones_like(p)
    gan.critic[0].weight.grad = torch.ones(4, 8, dtype=torch.float64).t()


def other_layer(gan: Gan) -> None:
    gan.critic[1] = nn.Tanh()


def other_critic(gan: Gan) -> None:
    torch.manual_seed(1)
    gan.critic = mlp(nn.ReLU())
    gan.critic_optimizer = torch.optim.Adam(gan.critic.parameters())


def data_swapped(gan: Gan) -> None:
    gan.critic[0].weight.data = gan.critic[0].weight.data.t().contiguous().t() * 2


def forward_hook(gan: Gan) -> None:
    gan.critic[0].register_forward_hook(lambda module, args, output: 2 * output)


def tensor_hook(gan: Gan) -> None:
    gan.critic[0].weight.register_hook(lambda grad: 2 * grad)


def accumulate_hook(gan: Gan) -> None:
    def triple(p: Tensor) -> None:
        p.grad *= 3  # type: ignore[operator]

    gan.critic[0].weight.register_post_accumulate_grad_hook(triple)


def optimizer_hook(gan: Gan) -> None:
    def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
        gan.weight *= 0.5

    gan.critic_optimizer.register_step_post_hook(scale)


def patched_step(gan: Gan) -> None:
    own = gan.critic_optimizer.step

    def step() -> None:
        gan.weight += 1
        own()

    gan.critic_optimizer.step = step


def scheduled(gan: Gan) -> None:
    torch.optim.lr_scheduler.StepLR(gan.critic_optimizer, 1)


CHANGES = [
    *(set_lr, other_weights, assigned_weights, other_state, frozen, grads_of_zero, no_grads, own_grads, other_layer),
    *(other_critic, data_swapped, forward_hook, tensor_hook, accumulate_hook, optimizer_hook, patched_step, scheduled),
    *(lambda gan: gan.critic.eval(), lambda gan: gan.generator.eval(), lambda gan: setattr(gan, "weight", 3.0)),
    *(lambda gan: setattr(gan, "clip", 0.02), lambda gan: gan.critic_optimizer.param_groups[0].update(maximize=True)),
    lambda gan: setattr(gan, "critic_optimizer", sgd(gan.critic.parameters(), 1e-2)),
    lambda gan: gan.critic_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: Callable[[Gan], Any]) -> None:
    step = agree("wgan_gp", change, make=lambda: Gan(lambda: mlp(nn.Dropout(0.5))), calls=2)
    assert step._plans.made >= 1


def test_shapes() -> None:
    plain, planned, step = Gan(), Gan(), gankern.step(Gan.wgan_gp)
    for call, n in enumerate((6, 3, 2, 6, 3, 2)):
        torch.manual_seed(call)
        x = real(n)
        state = torch.get_rng_state()
        with planning(False):
            want = plain.wgan_gp(x)
        torch.set_rng_state(state)
        same(step(planned, x), want)
        same(planned.state(), plain.state())
    assert (step._plans.made, step._plans.hits) == (3, 3)


def test_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that runs what was captured again, on what lies where it lay then."""
    captured: list[Any] = []

    def record(work: Callable[[], list[Tensor]], stream: Any) -> Any:
        with torch.random.fork_rng():
            outputs = work()
        captured.append(outputs)

        def replay() -> None:
            for kept, now in zip(outputs, work(), strict=True):
                kept.copy_(now)

        return SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(segments, "record", record)
    monkeypatch.setattr(segments, "can_capture", lambda device: True)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("Stream", lambda device: stream), ("current_stream", lambda device: stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())

    def make() -> Gan:
        gan = Gan(optimizer=sgd)
        # Where work runs once more to be recorded, statistics would be written once more.
        gan.generator.eval()
        return gan

    step = agree("dcgan", set_lr, grads_of_zero, data_swapped, own_grads, make=make, calls=6)
    graphs = [s.graph for p in step._plans.plans for s in p._segments if s.graph is not None]
    assert any(g.is_captured for g in graphs)
    assert len(captured) > len(step._plans.plans)


def prints(gan: Gan, real: Tensor) -> Tensor:
    print("a step")
    return gan.wgan_gp(real)


def goes_by_values(gan: Gan, real: Tensor) -> Tensor:
    loss = gan.wgan_gp(real)
    return loss if loss > 0 else -loss


def counts(gan: Gan, real: Tensor) -> Tensor:
    gan.count += 1
    return gan.wgan_gp(real)


def reads_gradients(gan: Gan, real: Tensor) -> Tensor:
    gan.wgan_gp(real)
    return gan.critic[0].weight.grad.square().sum()


def clips_gradients(gan: Gan, real: Tensor) -> Tensor:
    gan.critic_optimizer.zero_grad()
    loss = gan.critic(real).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(gan.critic.parameters(), 0.1)
    gan.critic_optimizer.step()
    return loss.detach()


def reads_state(gan: Gan, real: Tensor) -> Tensor:
    return gan.wgan_gp(real) * len(gan.critic_optimizer.state)


def returns_a_graph(gan: Gan, real: Tensor) -> Tensor:
    return gan.critic(real).mean()


def returns_a_view(gan: Gan, real: Tensor) -> Tensor:
    gan.wgan_gp(real)
    return real[0]


def seeds(gan: Gan, real: Tensor) -> Tensor:
    torch.manual_seed(3)
    return gan.wgan_gp(real)


def backward_function(gan: Gan, real: Tensor) -> Tensor:
    gan.critic_optimizer.zero_grad()
    loss = gan.critic(real).mean()
    torch.autograd.backward(loss)
    gan.critic_optimizer.step()
    return loss.detach()


def not_finite(gan: Gan, real: Tensor) -> Tensor:
    return gan.wgan_gp(real / 0)


class Own(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def own_optimizer(gan: Gan, real: Tensor) -> Tensor:
    if type(gan.critic_optimizer) is not Own:
        raise TypeError
    return gan.wgan_gp(real)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (prints, r"test_step\.py:\d+"),
        (goes_by_values, r"test_step\.py:\d+"),
        (counts, "changes count of something"),
        (reads_gradients, "cannot be guarded|reads .grad"),
        (clips_gradients, "reads .grad"),
        (reads_state, "the state of an optimizer|cannot be guarded"),
        (returns_a_graph, "detach it"),
        (returns_a_view, "a view"),
        (seeds, r"test_step\.py:\d+"),
        (backward_function, r"test_step\.py:\d+"),
        (not_finite, "not finite"),
        (own_optimizer, "neither torch nor gankern"),
    ],
)
def test_refused(function: Callable[[Gan, Tensor], Tensor], reason: str) -> None:
    """The function runs as it is, once a call, and the reason says where."""
    plain, planned = (Gan(optimizer=Own if function is own_optimizer else sgd) for _ in range(2))
    step = gankern.step(function)
    for call in range(3):
        torch.manual_seed(call)
        x = real()
        state = torch.get_rng_state()
        with planning(False):
            want = function(plain, x)
        torch.set_rng_state(state)
        same(step(planned, x), want)
        same(planned.state(), plain.state())
        assert planned.count == plain.count
    found = gankern.explain(step)
    assert found.chosen == "python"
    assert re.search(reason, found.refused["plan"]), found


def test_values_that_are_not_finite_later() -> None:
    """A plan has folded zeros that are none then: the function itself runs, from the state before."""
    plain, planned, step = (*(Gan(lambda: mlp(nn.BatchNorm1d(8)), sgd) for _ in range(2)), gankern.step(Gan.wgan_gp))
    for call, factor in enumerate((1.0, 1.0, float("inf"), 1.0)):
        torch.manual_seed(call)
        x = real() * factor
        state = torch.get_rng_state()
        with planning(False):
            want = plain.wgan_gp(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        same(step(planned, x), want)
        assert torch.equal(torch.get_rng_state(), after)
        same(planned.state(), plain.state())
    assert step._plans.hits == 1


def test_errors_are_the_functions_own() -> None:
    gan, step = Gan(), gankern.step(Gan.wgan_gp)
    step(gan, real()), step(gan, real())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(gan, real()[:, :3])
    gan.critic_optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        step(gan, real())


def test_errors_that_values_make_leave_what_the_function_leaves() -> None:
    """The plan has nothing done yet when an operator of its first program raises; the function has."""

    def make() -> tuple[Any, nn.Module]:
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Embedding(3, 8)]).double()
        optimizer = adam(net.parameters(), 1e-2)

        def step(x: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            h = net[2](net[1](net[0](x)))
            loss = (h * net[3](labels)).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, net

    (plain, want), (function, got) = make(), make()
    step = gankern.step(function)
    for call, wrong in enumerate((0, 0, 7, 0)):
        labels = torch.arange(6) % 3 + wrong
        drawn = []
        for run in (plain, step):
            torch.manual_seed(call)
            with pytest.raises(IndexError) if wrong else nullcontext():
                run(real(), labels)
            drawn.append(torch.get_rng_state())
        assert torch.equal(*drawn)
        same([*got.state_dict().values()], [*want.state_dict().values()])
        assert [p.grad is None for p in got.parameters()] == [p.grad is None for p in want.parameters()]
    assert step._plans.hits >= 1


def test_a_number_that_changes_from_call_to_call() -> None:
    """Each value has a program of its own: they end before they cost more than they ever save."""

    @gankern.step
    def step(gan: Gan, real: Tensor, sigma: float) -> Tensor:
        return gan.wgan_gp(real + sigma * torch.randn_like(real))

    gan = Gan()
    for call in range(8):
        step(gan, real(), 1 / (1 + call))
    assert 1 <= step._plans.made <= 4


def test_networks_and_layers_that_are_gone_are_let_go() -> None:
    step = gankern.step(Gan.wgan_gp)
    gan, other = Gan(), Gan()
    for _ in range(3):
        step(gan, real()), step(other, real())
    assert step._plans.hits >= 2
    layer = other.critic[0]
    gone = [weakref.ref(p) for p in (*gan.critic.parameters(), *gan.generator.parameters(), *layer.parameters())]
    other.critic[0] = nn.Linear(4, 8).double()
    other.critic_optimizer = adam(other.critic.parameters(), lr=1e-2)
    del gan, layer
    step(other, real())
    gc.collect()
    assert not [r for r in gone if r() is not None]


def test_numbers_and_results() -> None:
    @gankern.step
    def step(gan: Gan, real: Tensor) -> Any:
        loss = gan.wgan_gp(real)
        return {"loss": loss.item(), "size": len(real), "all": [real, (loss, None, f"{real.dtype}")]}

    gan = Gan(optimizer=sgd)
    for _ in range(3):
        x = real()
        found = step(gan, x)
        assert type(found["loss"]) is float and found["size"] == 6 and found["all"][0] is x
        assert found["loss"] == found["all"][1][0].item() and found["all"][1][1:] == (None, "torch.float64")
    runs_by_plan(step)


def test_a_loss_that_has_been_differentiated() -> None:
    gan, step = Gan(optimizer=sgd), gankern.step(Gan.generate)
    for _ in range(3):
        loss = step(gan, real())
        assert loss.requires_grad and not loss.is_leaf
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    runs_by_plan(step)


def test_closures_and_what_they_hold() -> None:
    """A number, a tensor and an optimizer of a closure's are what they are at each call."""

    def make() -> Any:
        gan, weight, shift = Gan(optimizer=sgd), 1.0, torch.ones(4, dtype=torch.float64)
        optimizer = gan.critic_optimizer

        def step(real: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = gan.critic(real + shift).mean() * weight
            loss.backward()
            optimizer.step()
            return loss.detach()

        def change(number: int) -> None:
            nonlocal weight, optimizer, shift
            if number == 2:
                weight = 3.0
            elif number == 4:
                shift = shift * 2
            elif number == 6:
                optimizer = torch.optim.Adam(gan.critic.parameters())
            elif number == 8:
                shift.add_(1)

        return gan, step, change

    plain, function, change = make()
    planned, other, also = make()
    step = gankern.step(other)
    for number in range(10):
        change(number), also(number)
        x = real()
        same(step(x), function(x))
        same(planned.state(), plain.state())
    runs_by_plan(step)


def test_gradients_switched_in_the_step() -> None:
    def generate(gan: Gan, real: Tensor) -> Tensor:
        gan.critic.requires_grad_(False)
        loss = gan.generate(real).detach()
        gan.critic.requires_grad_(True)
        return loss

    plain, planned, step = Gan(optimizer=sgd), Gan(optimizer=sgd), gankern.step(generate)
    for call in range(4):
        torch.manual_seed(call)
        x = real()
        state = torch.get_rng_state()
        want = generate(plain, x)
        torch.set_rng_state(state)
        same(step(planned, x), want)
        same(planned.state(), plain.state())
    assert all(p.grad is None for p in planned.critic.parameters())
    runs_by_plan(step)


def test_a_step_is_as_a_function() -> None:
    class Trainer(Gan):
        @gankern.step
        def critic_step(self, real: Tensor) -> Tensor:
            """Its own words."""
            return self.wgan_gp(real)

    trainer, other = Trainer(optimizer=sgd), Trainer(optimizer=sgd)
    for _ in range(3):
        torch.manual_seed(1)
        got = trainer.critic_step(real())
        torch.manual_seed(1)
        same(got, other.wgan_gp(real()))
    copied = copy.deepcopy(trainer)
    torch.manual_seed(2)
    want = other.wgan_gp(real())
    for gan in (copied, trainer):
        torch.manual_seed(2)
        same(gan.critic_step(real()), want)
        same(gan.state(), other.state())
    assert Trainer.critic_step.__doc__ == "Its own words." and Trainer.critic_step.__name__ == "critic_step"
    assert pickle.loads(pickle.dumps(module_step)) is module_step and copy.deepcopy(module_step) is module_step
    with pytest.raises(TypeError, match="callable"):
        gankern.step(3)  # type: ignore[arg-type]


@gankern.step
def module_step(x: Tensor) -> Tensor:
    return x + 1


def test_threads() -> None:
    """Each with networks of its own, by one step."""
    step = gankern.step(Gan.generate)
    gans = [Gan(optimizer=sgd) for _ in range(3)]
    for gan in gans:
        gan.generator.eval()
    data = [torch.randn(6, 2, dtype=torch.float64) for _ in range(8)]
    for gan in gans:
        gan.latent = lambda real: real  # type: ignore[method-assign]

    def run(gan: Gan) -> list[Tensor]:
        return [step(gan, x).detach() for x in data]

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(contextvars.copy_context().run, run, gan) for gan in gans]
        found = [future.result() for future in futures]
    for other in found[1:]:
        same(other, found[0])
    assert step._plans.made >= 1


def test_threads_that_ask_at_once() -> None:
    """One of them makes the plan, the others' calls run as they are meanwhile; each call is one step."""
    gan, together = Gan(optimizer=sgd), threading.Barrier(4)
    x = torch.randn(6, 4, dtype=torch.float64)

    @gankern.step
    def scores(real: Tensor) -> Tensor:
        return gan.critic(real).mean().detach()

    def run() -> Tensor:
        together.wait()
        return scores(x)

    want = gan.critic(x).mean().detach()
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(contextvars.copy_context().run, run) for _ in range(4)]]
    same(found, [want] * 4)
    assert scores._plans.made == 1


def test_when_plans_are_off_or_somebody_looks_on() -> None:
    gan, step = Gan(optimizer=sgd), gankern.step(Gan.generate)
    step(gan, real()), step(gan, real())
    hits = step._plans.hits
    with planning(False):
        step(gan, real())
        assert gankern.explain(step).refused == {"plan": "switched off"}
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        step(gan, real())
    assert step._plans.hits == hits and "anomaly" in str(gankern.explain(step))
    step(gan, real())
    assert step._plans.hits == hits + 1


def test_what_pays_and_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planned for a call or two, nor where nothing gets faster; then no call is looked at for a while."""
    choice._everywhere.set(False)
    cases = (("wgan_gp", sgd, True), ("generate", adam, True), ("generate", torch.optim.RMSprop, False))
    for method, optimizer, pays in (*cases, ("generate", sgd, False)):
        gan, step = Gan(optimizer=optimizer), gankern.step(getattr(Gan, method))
        for _ in range(2):
            step(gan, real())
        assert step._plans.made == 0
        step(gan, real())
        assert step._plans.made == pays
    assert "as fast" in str(step.explain()) and step.idle > 0
    monkeypatch.setattr(step._plans, "run", None)
    step(gan, real())
