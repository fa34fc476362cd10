"""What is left between the kernels, by Inductor: grouped, compiled, checked, and torch's where that is not right."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gankern
from gankern.bench import stock
from gankern.compiler import choice, pointwise
from gankern.compiler.cache import known_plans
from gankern.compiler.dynamo import backend
from gankern.compiler.fused import plans_of
from gankern.compiler.passes import effects
from gankern.compiler.pointwise import Part
from gankern.nn.fuse import _rebuild
from tests.compiler.test_fused_plan import NETWORKS, same, step


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with choice.everywhere():
        yield


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run as they are grouped: Inductor takes seconds for each."""
    monkeypatch.setattr(pointwise, "_compile", lambda module, inputs: module)


class Noisy(nn.Module):
    """Arithmetic between convolutions, with masks, statistics and a buffer of its own that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 2, 3, 1, 1)
        self.norm, self.drop, self.mask = nn.BatchNorm2d(4), nn.Dropout2d(0.3), nn.Dropout(0.2)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.first(x)) * 0.5 + x.mean()
        h = h + self.scale
        self.scale.mul_(0.9)
        h = self.drop(torch.sigmoid(self.norm(h)) - h)
        h = self.last((h + self.scale) * 2) * 0.5 + 1
        return torch.tanh(h) * torch.sigmoid(self.mask(h.flatten(1)).view_as(h)) + torch.rand_like(h)


def made(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Stock and ours."""
    return net, gankern.fuse(copy.deepcopy(net), pointwise="inductor")


def parts_of(net: nn.Module) -> list[Part]:
    return plans_of(net).plans[0].parts


def agree(stock_net: nn.Module, ours: nn.Module, x: Tensor) -> None:
    weight = torch.randn_like(copy.deepcopy(stock_net)(x))
    for _ in range(3):
        same(step(ours, x, weight), step(stock_net, x, weight))
    assert plans_of(ours).made == 1 and plans_of(ours).hits == 2, plans_of(ours).reason


class Small(nn.Module):
    """Arithmetic, statistics and masks: a part for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        return self.drop(F.softplus(h) * 0.5 - torch.sigmoid(h).mean())


def test_inductors_code_computes_stocks_values_with_its_masks_and_buffers() -> None:
    torch.manual_seed(0)
    net, ours = made(Small())
    agree(net, ours, torch.randn(3, 2, 6, 6, requires_grad=True))
    parts = parts_of(ours)
    assert 1 <= len(parts) <= 3
    assert all(part._compiled is not None for part in parts), [part.reason for part in parts]
    assert gankern.fusion_report(ours)[0].pointwise == "inductor"


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*NETWORKS, "noisy"])
def test_grouped_plans_compute_stocks_values(name: str, training: bool) -> None:
    make, shape = NETWORKS.get(name, (Noisy, (3, 2, 6, 6)))
    torch.manual_seed(0)
    net, ours = made(make().double().train(training))
    agree(net, ours, torch.randn(shape, dtype=torch.float64, requires_grad=True))


class Watched(Part):
    """A part that keeps its graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        super().__init__(module)


@pytest.mark.usefixtures("uncompiled")
def test_no_part_draws_or_writes_or_multiplies_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "Part", Watched)
    torch.manual_seed(0)
    net, ours = made(Noisy())
    agree(net, ours, torch.randn(3, 2, 6, 6, requires_grad=True))
    nodes = [node for part in parts_of(ours) for node in part.graph.nodes if node.op == "call_function"]
    assert len(nodes) > 15
    assert not [node for node in nodes if effects.draws(node) or effects.writes(node)]
    names = {node.target._schema.name.partition("::")[2] for node in nodes if hasattr(node.target, "_schema")}
    assert not names & {"convolution", "convolution_backward", "native_batch_norm", "bernoulli_", "rand_like"}
    assert {"softplus", "sigmoid", "softplus_backward", "tanh_backward"} <= names


def test_what_is_written_later_is_in_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.first(x)) + 1
            row = h[0]
            before = row.tanh()
            h.add_(2)
            return self.last(h) + row.mean() * before.mean()

    # A compiler may give memory to each result that has one with another in torch.
    monkeypatch.setattr(pointwise, "_compile", lambda module, _: lambda *given: [t.clone() for t in module(*given)])
    torch.manual_seed(0)
    net, ours = made(Written().double())
    agree(net, ours, torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.usefixtures("uncompiled")
def test_a_penalty_of_such_a_critic_is_grouped_too() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, 2, 1), nn.Linear(36, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return self.head((torch.sigmoid(h) * h.mean() + F.softplus(h)).flatten(1))

    torch.manual_seed(0)
    net, ours = made(Critic().double())
    real, fake = torch.randn(2, 3, 2, 6, 6, dtype=torch.float64)
    alpha = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    want = torch.autograd.grad(
        stock.gradient_penalty(net, real, fake, alpha), list(net.parameters()), allow_unused=True
    )
    for _ in range(2):
        penalty = gankern.gradient_penalty(ours, real, fake, alpha=alpha)
        got = torch.autograd.grad(penalty, list(ours.parameters()), allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(0 * real.sum() if a is None else a, 0 * real.sum() if b is None else b)
    (plan,) = known_plans(ours).plans
    assert "part" in plan._run.source


def _broken(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    raise RuntimeError("no compiler\nat all")


def _wrong(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    return lambda *inputs: [1.01 * t for t in module(*inputs)]


def _turned(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    return lambda *inputs: [t.mT.contiguous().mT if t.dim() > 1 else t for t in module(*inputs)]


def _aliased(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    def run(*inputs: Tensor) -> list[Tensor]:
        """Values where they were given."""
        found = list(module(*inputs))
        for i, t in enumerate(found):
            for given in inputs:
                if given.shape == t.shape and given.stride() == t.stride():
                    found[i] = given.copy_(t)
        return found

    return run


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (_broken, "compiling failed with RuntimeError: no compiler"),
        (_wrong, "Inductor's results are others than torch's"),
        (_turned, "Inductor's results lie in memory otherwise than torch's"),
    ],
)
def test_torchs_operators_run_where_inductor_fails(compiler: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_compile", compiler)
    torch.manual_seed(0)
    net, ours = made(Noisy().double())
    assert gankern.fusion_report(ours)[0].pointwise == "inductor"
    agree(net, ours, torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True))
    (run,) = gankern.fusion_report(ours)
    assert (run.reason, run.pointwise) == (None, f"torch: {reason}")


def part_of(function: Any, *inputs: Tensor) -> Part:
    graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*inputs).graph
    (part,) = pointwise.group(graph)
    return part


def test_a_part_takes_no_memory_that_torchs_leaves_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_compile", _aliased)
    x = torch.randn(3, 4)
    part = part_of(lambda x: torch.relu(x + 1) * 2, x)
    part(x.clone())
    assert part.reason == "Inductor's results share memory that torch's do not"


def test_other_strides_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pointwise, "_compile", lambda module, inputs: lambda *given: calls.append(1) or module(*given))
    x = torch.randn(3, 4)
    part = part_of(lambda x: torch.relu(x + 1) * 2, x)
    for given in (x, x, x.t().contiguous().t()):
        (found,) = part(given)
        torch.testing.assert_close(found, torch.relu(x + 1) * 2)
        assert found.stride() == given.stride()
    # To compare with torch's, then by itself.
    assert len(calls) == 2


@pytest.mark.usefixtures("uncompiled")
def test_what_inductor_leaves_in_the_environment_costs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    net, ours = made(Noisy())
    agree(net, ours, torch.randn(3, 2, 6, 6, requires_grad=True))
    monkeypatch.setitem(os.environ, "_TORCHINDUCTOR_OF_A_TEST", "1")
    ours(torch.randn(3, 2, 6, 6, requires_grad=True))
    assert plans_of(ours).made == 1
    monkeypatch.setitem(os.environ, "ANYTHING_ELSE", "1")
    ours(torch.randn(3, 2, 6, 6, requires_grad=True))
    assert plans_of(ours).made == 2


def test_the_choice_is_kept_by_copies_and_changed_by_fusing_again() -> None:
    net = gankern.fuse(Noisy(), pointwise="inductor")
    kept = [net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    assert [m._gankern_pointwise for m in kept] == ["inductor"] * 3
    assert all(type(m) is type(net) and type(m).__name__ == "Noisy" for m in kept)
    assert gankern.fuse(net)._gankern_pointwise == "torch"
    assert gankern.fuse(net, pointwise="inductor")._gankern_pointwise == "inductor"
    assert type(gankern.unfuse(net)) is Noisy
    # What was pickled by those who had no choice.
    assert _rebuild(Noisy, ())._gankern_pointwise == "torch"


@pytest.mark.parametrize("value", ["cuda", None, True])
def test_other_values_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match="pointwise must be 'torch' or 'inductor'; got "):
        gankern.fuse(Noisy(), pointwise=value)


@pytest.mark.usefixtures("uncompiled")
def test_the_dynamo_backend_takes_it_as_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    made_parts: list[Part] = []
    monkeypatch.setattr(pointwise, "Part", lambda module: made_parts.append(Part(module)) or made_parts[-1])
    torch.manual_seed(0)
    net = Noisy().double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    inner = copy.deepcopy(net)
    with torch.no_grad():
        torch.manual_seed(1)
        got = torch.compile(inner, backend=backend, options={"pointwise": "inductor"})(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, net(x), rtol=1e-9, atol=1e-11)
    assert made_parts
    for options, message in (({"pointwise": "x"}, "pointwise must be"), ({"other": "x"}, "options may have pointwise")):
        with pytest.raises(ValueError, match=message):
            backend(fx.GraphModule({}, fx.Graph()), [], options=options)
