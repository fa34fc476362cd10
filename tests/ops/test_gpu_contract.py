"""What every op promises on a GPU, whatever runs it: opcheck, torch.compile, streams and graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import plain as plain_critic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import gankern
from gankern import _compiling, _cuda, dispatch, ops
from gankern.compiler import choice, fused, planning
from gankern.nn import guard
from gankern.ops.conv_transpose_bn_act import autograd as norm_autograd
from gankern.ops.gradient_penalty import autograd as penalty_autograd
from gankern.ops.gradient_penalty import small

Op = Callable[..., Tensor]


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.batch_norm_act(x, None, None, weight, bias, training=True)


def up(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.conv_transpose2d_bn_act(x, kernel, None, None, None, weight, bias, training=True, stride=2, padding=1)


def down(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.conv2d_bn_act(
        x, kernel, None, None, None, weight, bias, training=True, stride=2, padding=1, activation="leaky_relu"
    )


def plain(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return ops.conv2d_act(x, kernel, bias, stride=2, padding=1)


# Each with the shapes of its inputs.
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "batch_norm_act": (norm, [(3, 4, 5, 5), (4,), (4,)]),
    "conv_transpose2d_bn_act": (up, [(3, 4, 5, 5), (4, 6, 4, 4), (6,), (6,)]),
    "conv2d_bn_act": (down, [(3, 4, 6, 6), (6, 4, 4, 4), (6,), (6,)]),
    "conv2d_act": (plain, [(3, 4, 6, 6), (6, 4, 4, 4), (6,)]),
    "l1_distance": (ops.l1_distance, [(5, 3, 7)]),
    "minibatch_discrimination": (ops.minibatch_discrimination, [(5, 3, 7)]),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # A compiled graph leaves convolutions to torch, which knows no tf32 on the CPU.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=OPS)
def case(request: pytest.FixtureRequest, gpu: torch.device) -> tuple[Op, list[Tensor]]:
    op, shapes = OPS[request.param]
    return op, [torch.randn(shape, device=gpu, requires_grad=True) for shape in shapes]


def step(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    """Forward and backward."""
    output = op(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


class Calls(TorchDispatchMode):
    """Keeps the calls of gankern's operators, as they were before the operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gankern" and func not in [f for f, _ in self.found]:
            self.found.append((func, tree_map_only(Tensor, torch.clone, args)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def opcheck() -> Callable[..., Any]:
    """torch's own, which of some versions needs a package of its own."""
    pytest.importorskip("torch.testing._internal.optests", exc_type=ImportError)
    return torch.library.opcheck


def test_operators_pass_opcheck(opcheck: Callable[..., Any], case: tuple[Op, list[Tensor]]) -> None:
    with Calls() as calls:
        step(*case)
    assert len(calls.found) >= 2
    for operator, args in calls.found:
        opcheck(operator, args)


def test_in_place_operators_pass_opcheck(opcheck: Callable[..., Any], gpu: torch.device) -> None:
    parameter = torch.randn(70, device=gpu, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer = gankern.optim.RMSprop([parameter], lr=1e-2, clip=0.1)
    with Calls() as calls:
        optimizer.step()
        gankern.clip_weights_([parameter], 0.05)
    assert len(calls.found) == 2
    for operator, args in calls.found:
        opcheck(operator, args)


def test_compiles_to_one_graph(case: tuple[Op, list[Tensor]]) -> None:
    op, inputs = case
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, want in zip(step(compiled, inputs), step(op, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_on_the_current_stream(case: tuple[Op, list[Tensor]]) -> None:
    op, inputs = case
    want = step(op, inputs)
    late = [torch.empty_like(t).fill_(float("nan")).requires_grad_() for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # A kernel on another stream would not wait for the inputs.
        torch.cuda._sleep(10_000_000)
        with torch.no_grad():
            [t.copy_(x) for t, x in zip(late, inputs, strict=True)]
        got = step(op, late)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_in_a_graph(case: tuple[Op, list[Tensor]]) -> None:
    op, inputs = case
    if not inputs[0].is_cuda:
        pytest.skip("a graph is of the GPU's work")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step(op, inputs)
    for _ in range(2):
        with torch.no_grad():
            [t.normal_() for t in inputs]
        graph.replay()
        torch.testing.assert_close(found, step(op, inputs))


def test_the_penalty_compiles_to_one_graph(gpu: torch.device) -> None:
    critic = plain_critic().to(gpu)
    real, fake = torch.randn(2, 4, 3, 8, 8, device=gpu)
    alpha = torch.rand(4, 1, 1, 1, device=gpu)

    def loss() -> Tensor:
        return critic(fake).mean() - critic(real).mean() + gankern.gradient_penalty(critic, real, fake, alpha=alpha)

    def gradients(run: Callable[[], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(run(), list(critic.parameters())))

    compiled = torch.compile(loss, fullgraph=_compiling.TAKES_MODULES, backend="aot_eager")
    with warnings.catch_warnings():
        if not _compiling.TAKES_MODULES:
            # Dynamo's own, of a tensor that crosses a break of the graph.
            warnings.simplefilter("ignore")
        found = gradients(compiled)
    for got, want in zip(found, gradients(loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.by_size
@pytest.mark.parametrize("name", ["batch_norm_act", "conv_transpose2d_bn_act", "conv2d_bn_act"])
def test_small_calls_are_torchs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And above the size a kernel is launched."""
    op, shapes = OPS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    launched: list[Any] = []
    monkeypatch.setattr(_cuda, "launcher", lambda *call: launched.append(call))
    monkeypatch.setattr(dispatch, "goes_by_size", lambda device, captured=False: True)
    with gankern.backend("reference"), monkeypatch.context() as patched:
        patched.setattr(dispatch, "FEW_BYTES", 0)
        patched.setattr(norm_autograd, "_is_odd", lambda *args: True)
        want = step(op, inputs)
    found = step(op, inputs)
    assert launched == []
    # The convolutions in front are the CPU's.
    bar = 0 if name == "batch_norm_act" else 1e-3
    torch.testing.assert_close(found, want, rtol=0, atol=bar)
    assert gankern.explain(op_of(name), *inputs[:2]).refused["cuda"] == dispatch.SMALL
    monkeypatch.setattr(dispatch, "FEW_BYTES", 0)
    step(op, inputs)
    assert len(launched) == 4
    assert gankern.explain(op_of(name), *inputs[:2]).chosen == "cuda"


@pytest.mark.by_size
def test_small_blocks_are_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = gankern.nn.ConvBnAct2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    called: list[int] = []
    monkeypatch.setattr(block.bn, "forward", lambda y: called.append(1) or nn.BatchNorm2d.forward(block.bn, y))
    monkeypatch.setattr(guard, "refusal", lambda module: None)
    block(x)
    monkeypatch.setattr(dispatch, "goes_by_size", lambda device, captured=False: True)
    assert sum(called) == 0
    block(x)
    assert sum(called) == 1


def op_of(name: str) -> Op:
    return getattr(ops, name)


@pytest.mark.by_size
def test_a_small_penalty_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a plan made of it, as long as nothing but the capture of a graph could make one."""
    critic = plain_critic()
    images = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    ran: list[str] = []
    for name in ("penalty", "planned_penalty", "stock_penalty"):
        monkeypatch.setattr(penalty_autograd, name, lambda *args, name=name: ran.append(name) or torch.ones(()))
    monkeypatch.setattr(small, "is_small", lambda *args: False)
    monkeypatch.setattr(gankern.ops.gradient_penalty, "plan_pays", lambda points: False)
    for sizes, want in (
        ((False, False), "penalty"),
        ((True, True), "stock_penalty"),
    ):
        monkeypatch.setattr(dispatch, "goes_by_size", lambda device, captured=False, sizes=sizes: sizes[captured])
        with planning(True):
            gankern.gradient_penalty(critic, *images)
            assert ran.pop() == want
            gankern.gradient_penalty(critic, *images, params=list(critic.parameters()))
            assert ran.pop() == ("planned_penalty" if want == "penalty" else want)
        told = gankern.explain(gankern.gradient_penalty, critic, *images)
        assert (told.reason, told.plan) == (
            (None, None) if want == "penalty" else (dispatch.SMALL, f"none: {dispatch.SMALL}")
        )
    monkeypatch.setattr(dispatch, "goes_by_size", lambda device, captured=False: captured)
    with planning(True):
        gankern.gradient_penalty(critic, *images, params=list(critic.parameters()))
    assert ran == ["stock_penalty"]


def test_plans_of_eager_calls_and_of_captured_ones_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, plans = gankern.fuse(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))), torch.randn(2, 2, 5, 5), []
    with choice.everywhere(), planning(True):
        for goes_by_size in (True, False, True):
            monkeypatch.setattr(dispatch, "goes_by_size", lambda device, goes=goes_by_size, **_: goes)
            net(x)
            plans.append(fused.plans_of(net).plans[0])
    assert plans[0] is plans[2]
    assert plans[0] is not plans[1]
