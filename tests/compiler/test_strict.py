"""Strict mode: a plan's first call beside stock's, and what a wrong plan comes to; the log of plans."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import gankern
from gankern import compiler, penalties
from gankern.compiler import forward, fused, penalty, planning, strict
from gankern.compiler.cache import MOST_PLANS, Plans, known_plans
from gankern.compiler.passes import effects
from tests.compiler.test_fused_plan import NETWORKS, same, step
from tests.compiler.test_penalty_plan import GP, R1, Alpha, Attention, Residual, agrees, conv_critic, images, planned

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def strictly() -> Iterator[None]:
    with planning("strict"):
        yield


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "gankern.compiler" and r.levelno >= logging.ERROR]


def noisy() -> nn.Sequential:
    return conv_critic(nn.BatchNorm2d(4), nn.Dropout(0.3))


Pass = Callable[[fx.Graph], None]


def _wrong(change: Pass, monkeypatch: pytest.MonkeyPatch, where: Any = penalty, name: str = "optimise") -> None:
    """Plant a pass that changes more than it may."""

    def optimise(traced: fx.GraphModule, *args: Any) -> Any:
        result = right(traced, *args)
        change(traced.graph)
        return result

    right = getattr(where, name)
    monkeypatch.setattr(where, name, optimise)


def scale_a_gradient(graph: fx.Graph) -> None:
    output = graph.output_node()
    last = output.args[0][2]  # type: ignore[index]
    with graph.inserting_before(output):
        scaled = graph.call_function(aten.mul.Tensor, (last, 1 + 1e-6))
    output.replace_input_with(last, scaled)  # type: ignore[arg-type]


def drop_a_gradient(graph: fx.Graph) -> None:
    output = graph.output_node()
    loss, scores, *grads = output.args[0]  # type: ignore[misc]
    output.args = ([loss, scores, None, *grads[1:]],)


def forget_the_statistics(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is aten.add_.Tensor or (effects.writes(node) and node.target is not aten.copy_.default):
            written = effects.written_by(node)[0]
            with graph.inserting_before(node):
                node.replace_input_with(written, graph.call_function(aten.clone.default, (written,)))


def draw_once_more(graph: fx.Graph) -> None:
    mask = next(node for node in graph.nodes if effects.draws(node))
    with graph.inserting_before(mask):
        graph.call_function(aten.rand.default, ([1],))


def write_a_parameter(graph: fx.Graph) -> None:
    parameter = [node for node in graph.nodes if node.op == "placeholder"][1]
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.mul_.Tensor, (parameter, 1.5))


WRONG: dict[str, tuple[Pass, str]] = {
    "scaled gradient": (scale_a_gradient, r"the gradient of 0\.weight by \d"),
    "no gradient": (drop_a_gradient, r"the gradient of 0\.weight by inf"),
    "statistics": (forget_the_statistics, r"1\.running_mean afterwards by"),
    "random numbers": (draw_once_more, "random numbers"),
    "written parameter": (write_a_parameter, r"0\.weight afterwards by"),
}


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_pass_is_told_and_stock_runs(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change, text = WRONG[wrong]
    _wrong(change, monkeypatch)
    critic, x = noisy(), images()
    other = copy.deepcopy(critic)
    torch.manual_seed(3)
    penalties.r1(critic, x).backward()
    after = torch.get_rng_state()
    (error,) = errors(caplog)
    assert re.search(f"the plan of Sequential differs from stock: .*{text}.*; stock runs", error), error
    plans = known_plans(critic)
    assert not plans.plans and "differed from stock" in str(plans)
    # No other is made for such calls: stock runs them, as it ran the first.
    monkeypatch.undo()
    with pytest.raises(compiler.Refused, match="differed from stock"):
        planned(plans, critic, x, (), list(critic.parameters()), R1)
    torch.manual_seed(3)
    with planning(False):
        penalties.r1(other, x).backward()
    assert torch.equal(after, torch.get_rng_state())
    for (name, p), q in zip(critic.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(critic.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("options", [GP, R1, (3.0, 0.5, True, False)], ids=["gp", "r1", "one-sided"])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (noisy, images()),
        (lambda: Residual().double(), images()),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1)).double(), torch.randn(5, 4).double()),
        (lambda: Attention().double(), torch.randn(2, 3, 4).double()),
    ],
    ids=["noisy", "residual", "spectral", "attention"],
)
def test_a_right_plan_stays(
    make: Callable[[], nn.Module], x: Tensor, options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    critic = make()
    plans = Plans()
    if isinstance(critic, Attention):
        planned(plans, critic, x, (), list(critic.parameters()), options)
    else:
        agrees(critic, x, options=options, plans=plans)
        agrees(critic, x, options=options, plans=plans)
    assert not errors(caplog) and [plan.compared for plan in plans.plans] == ["as stock"]


def test_only_first_calls_run_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    stock = strict.stock_penalty
    monkeypatch.setattr(strict, "stock_penalty", lambda *args: ran.append(1) or stock(*args))
    critic, plans = Residual().double(), Plans()
    with planning(True):
        agrees(critic, images(), plans=plans)
    assert not ran
    for _ in range(3):
        agrees(critic, images(), plans=plans)
    assert len(ran) == 1
    agrees(critic, images(4), plans=plans)
    assert len(ran) == 2


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_made_before_is_not_spoiled(training: bool, caplog: pytest.LogCaptureFixture) -> None:
    critic, x = noisy().train(training), images()
    critic.register_buffer("unused", torch.zeros(1).expand(3))
    before = critic(x).mean()
    loss = before + penalties.r1(critic, x)
    loss.backward()
    assert known_plans(critic).made == 1 and not errors(caplog)


def test_stock_may_fail_where_a_plan_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(critic: nn.Module, x: Tensor, *args: Any) -> Tensor:
        critic(x)
        raise RuntimeError("view size is not compatible")

    plans = Plans()
    monkeypatch.setattr(strict, "stock_penalty", fails)
    agrees(noisy(), images(), plans=plans)
    assert plans.plans[0].compared.startswith("stock raises") and not errors(caplog)


class Kink(nn.Module):
    """So steep that rounding decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1e15, -1e15]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).sin() + x.sum(1, keepdim=True).square()


def move_by_a_unit(graph: fx.Graph) -> None:
    points, first = (next(n for n in graph.nodes if (n.op == "placeholder") is given) for given in (True, False))
    readers = list(points.users)
    with graph.inserting_before(first):
        moved = graph.call_function(aten.mul.Tensor, (points, 1 + 2**-52))
    for reader in readers:
        reader.replace_input_with(points, moved)


@pytest.mark.parametrize("make", [Kink, lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))])
def test_what_rounding_explains_is_not_told(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _wrong(move_by_a_unit, monkeypatch)
    plans, critic = Plans(), make().double()
    planned(plans, critic, torch.randn(3, 2, dtype=torch.float64), (), list(critic.parameters()), GP)
    assert [plan.compared for plan in plans.plans] == ["as stock"] and not errors(caplog)


def scale_the_output(graph: fx.Graph) -> None:
    output = graph.output_node()
    given = output.args[0][0]  # type: ignore[index]
    given = given.args[0] if given.target is aten.detach.default else given
    with graph.inserting_after(given):
        scaled = graph.call_function(aten.mul.Tensor, (given, 1 + 1e-6))
    scaled.meta["val"] = given.meta["val"]
    given.replace_all_uses_with(scaled, lambda user: user is not scaled)


def scale_a_first_gradient(graph: fx.Graph) -> None:
    output = graph.output_node()
    last = output.args[0][-1]  # type: ignore[index]
    with graph.inserting_before(output):
        scaled = graph.call_function(aten.mul.Tensor, (last, 1 + 1e-6))
    output.args = ([*output.args[0][:-1], scaled],)  # type: ignore[index]


def drop_a_first_gradient(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = ([*output.args[0][:-1], None],)  # type: ignore[index]


def forget_a_statistic(graph: fx.Graph) -> None:
    # Of the batches that were counted.
    count = next(node for node in graph.nodes if node.target is aten.add_.Tensor)
    with graph.inserting_before(count):
        count.replace_input_with(count.args[0], graph.call_function(aten.clone.default, (count.args[0],)))


WRONG_FORWARDS: dict[str, tuple[Pass, str]] = {
    "output": (scale_the_output, r"of Sequential differs from stock: the output by \d"),
    "gradient": (scale_a_first_gradient, r"in its backward pass: the gradient of 9\.bias by \d"),
    "no gradient": (drop_a_first_gradient, r"in its backward pass: the gradient of 9\.bias by inf"),
    "statistics": (forget_a_statistic, r"3\.num_batches_tracked afterwards by"),
    "random numbers": (draw_once_more, "random numbers"),
    "written parameter": (write_a_parameter, r"in its backward pass: 0\.weight afterwards by"),
}


@pytest.mark.parametrize("wrong", WRONG_FORWARDS)
def test_a_wrong_pass_of_a_forward_is_told_and_stock_runs(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change, text = WRONG_FORWARDS[wrong]
    _wrong(change, monkeypatch, forward, "optimise_first_order")
    make, shape = NETWORKS["critic"]
    net = make().double()
    ours, x = gankern.fuse(copy.deepcopy(net)), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        same(step(ours, x, torch.ones(3, 1)), step(net, x, torch.ones(3, 1)))
    (error,) = errors(caplog)
    assert re.search(text, error), error
    plans = fused.known_plans(ours)
    assert plans is not None and plans.made == 1 and not plans.plans and "differed from stock" in str(plans)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_right_plan_of_a_forward_stays(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two forwards before one backward pass, too; afterwards stock runs no more."""
    make, shape = NETWORKS[name]
    net = make().double().train(training)
    ours, x = gankern.fuse(copy.deepcopy(net)), torch.randn(shape, dtype=torch.float64)
    weight = torch.randn_like(copy.deepcopy(net)(x))

    def both(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        before = net(x)
        (net(x) * weight + before).sum().backward()
        found = [before.detach(), *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]
        return [t.clone() for t in found] + [torch.get_rng_state()]

    for got, want in zip(both(ours), both(net), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    plans = fused.known_plans(ours)
    assert plans is not None and [plan.compared for plan in plans.plans] == ["as stock"] and not errors(caplog)
    monkeypatch.setattr(strict, "State", None)
    same(step(ours, x, weight), step(net, x, weight))
    with torch.no_grad(), pytest.raises(TypeError):
        ours(x)


def test_a_wrong_plan_of_a_graph_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _wrong(scale_the_output, monkeypatch, forward, "optimise_first_order")
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()).double()
    compiled, x = torch.compile(net, backend="gankern"), images()
    for _ in range(2):
        got, want = (torch.autograd.grad(f(x).square().sum(), net.parameters()) for f in (compiled, net))
        same(dict(enumerate(got)), dict(enumerate(want)))  # type: ignore[arg-type]
    assert len(errors(caplog)) == 1


def test_differences_are_of_the_norm() -> None:
    want = {"a": torch.ones(100), "b": torch.full((2,), 1e-9), "n": torch.tensor([1, 2]), "none": None}
    got = copy.deepcopy(want)
    assert not strict.differences(got, want, 1e-4)
    got["a"][3] += 2e-3
    got["b"] *= 2
    assert set(strict.differences(got, want, 1e-4)) == {"a"}
    got["n"][0] = 0
    got["none"] = torch.zeros(1)
    assert set(strict.differences(got, want, 1e-4)) == {"a", "n", "none"}
    nan = {"a": torch.tensor([1.0, torch.nan, torch.inf])}
    assert not strict.differences(nan, copy.deepcopy(nan), 1e-4)
    assert strict.differences({"a": torch.ones(3)}, nan, 1e-4) == {"a": torch.inf}


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, enabled in (("0", False), ("1", True), ("strict", "strict")):
        monkeypatch.setenv("GANKERN_PLAN", value)
        assert compiler._from_environment() == enabled
    monkeypatch.setenv("GANKERN_PLAN", "2")
    with pytest.raises(ValueError, match="0, 1 or strict; got '2'"):
        compiler._from_environment()
    assert compiler.enabled() and compiler.is_strict()
    with planning(True):
        assert compiler.enabled() and not compiler.is_strict()
    with pytest.raises(ValueError, match="'strict'; got 'on'"), planning("on"):  # type: ignore[arg-type]
        pass


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gankern.compiler")
    critic, plans = Alpha().double(), Plans()
    x, params = torch.randn(3, 4, dtype=torch.float64), list(critic.parameters())
    plans.hits = 10_000
    with planning(True):
        for _ in range(MOST_PLANS + 1):
            critic.alpha += 0.01
            planned(plans, critic, x, (), params, GP)
    critic.register_forward_hook(lambda *_: None)
    with pytest.raises(compiler.Refused):
        planned(plans, critic, x, (), params, GP)
    told = [r.getMessage() for r in caplog.records if r.name == "gankern.compiler"]
    assert sum(t.startswith("planned a penalty of Alpha in ") for t in told) == MOST_PLANS + 1
    assert f"evicted the plan of Alpha that was used least recently: it keeps {MOST_PLANS}" in told
    assert "no plan for a penalty of Alpha: a hook on one of its modules or parameters" in told


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_gradients_of_a_norm_that_is_rounding_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """The mean of what a norm without weights gives depends on nothing."""
    layers = nn.AvgPool1d(2), nn.ConvTranspose1d(3, 2, 3, 1, 1), nn.GroupNorm(2, 2, affine=False)
    critic, plans = nn.Sequential(*layers, nn.Flatten(), Mean()), Plans()
    for n in range(1, 6):
        loss, *_ = planned(plans, critic, torch.randn(n, 3, 5), (), list(critic.parameters()), GP)
        assert abs(loss.item() - 10) < 1e-3
    assert (plans.made, errors(caplog)) == (5, [])
