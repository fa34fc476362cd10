"""Minibatch discrimination over ranks: two gloo processes against one on the joint batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gankern import gradient_penalty
from gankern.nn import MinibatchDiscrimination

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

WORLD = 2
ALL = {"bias": True, "weight_norm": True, "include_self": True}
# Each: the layer's options, the parts of a rank's batch, and what makes the loss.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all options": {"options": ALL},
    "parts": {"groups": 2},
    "parts, all options": {"groups": 2, "options": ALL},
    "process group": {"group": "object"},
    "half": {"dtype": torch.bfloat16},
    "second order": {"loss": "second order"},
    "second order, parts": {"loss": "second order", "groups": 2, "options": ALL},
    "compiled": {"compile": True},
    "ranks not compared": {"group": None},
}


def make(case: dict[str, Any], group: Any) -> MinibatchDiscrimination:
    torch.manual_seed(0)
    return MinibatchDiscrimination(
        5, 4, 3, process_group=group, dtype=case.get("dtype", torch.float64), **case.get("options", {})
    )


def data(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Input and weights of the outputs, (ranks, groups, samples, features)."""
    torch.manual_seed(1)
    shape = (WORLD, case.get("groups", 1), 3)
    pair = torch.randn(*shape, 5, dtype=torch.float64), torch.randn(*shape, 9, dtype=torch.float64)
    return pair[0].to(case.get("dtype", torch.float64)), pair[1].to(case.get("dtype", torch.float64))


def run(call: Any, layer: nn.Module, case: dict[str, Any], input: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    input = input.clone().requires_grad_()
    output = call(input, case.get("groups", 1))
    loss = (output * weights).sum()
    if case.get("loss") == "second order":
        (grad,) = torch.autograd.grad(loss, input, create_graph=True)
        loss = grad.pow(3).sum()
    # Of the bias there is no second-order gradient.
    grads = torch.autograd.grad(loss, [input, *layer.parameters()], materialize_grads=True)
    return [output.detach(), *grads]


class Critic(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.minibatch = MinibatchDiscrimination(6, 3, 2, process_group=group)
        self.last = nn.Linear(9, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.minibatch(self.first(x).tanh()))


def critic_batch() -> list[Tensor]:
    torch.manual_seed(2)
    real, fake = torch.randn(2, 4 * WORLD, 4, dtype=torch.float64)
    return [real, fake, torch.rand(4 * WORLD, 1, dtype=torch.float64)]


def critic_step(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> list[Any]:
    loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake, alpha=alpha)
    loss.backward()
    return [p.grad for p in critic.parameters()]


def refusal(layer: nn.Module, *args: Any) -> str:
    try:
        layer(*args)
    except ValueError as error:
        return str(error)
    return "nothing"


def worker(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    answers: dict[str, Any] = {}
    pair = dist.new_group([1, 0])
    for name, case in CASES.items():
        layer = make(case, {"object": pair}.get(case.get("group", "world"), case.get("group", "world")))
        call = torch.compile(layer) if case.get("compile") else layer
        found = run(call, layer, case, *(t[rank].flatten(0, 1) for t in data(case)))
        answers[name] = [t.detach().double().numpy() for t in found]
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    found = run(layer := make({}, alone), layer, {}, *(t[rank].flatten(0, 1) for t in data({})))
    answers["lone group"] = [t.numpy() for t in found]
    layer = make({}, "world")
    answers["samples"] = refusal(layer, torch.zeros(2 + 2 * rank, 5, dtype=torch.float64))
    answers["groups"] = refusal(layer, torch.zeros(2, 5, dtype=torch.float64), 1 + rank)
    ddp = DistributedDataParallel(Critic("world"))
    answers["critic"] = [g.numpy() for g in critic_step(ddp, *(t.chunk(WORLD)[rank] for t in critic_batch()))]
    results[rank] = answers
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers() -> Any:
    return on_ranks(worker, WORLD)


def joint(case: dict[str, Any]) -> list[Tensor]:
    """One process's results on the samples of all ranks; output and gradient of the input by rank."""
    input, weights = (t.transpose(0, 1).flatten(0, 2) for t in data(case))
    layer = make(case, None)
    found = run(layer, layer, case, input, weights)
    by_rank = [t.unflatten(0, (case.get("groups", 1), WORLD, 3)).transpose(0, 1).flatten(1, 2) for t in found[:2]]
    return [t.double() for t in (*by_rank, *found[2:])]


@pytest.mark.parametrize("name", [name for name in CASES if name != "ranks not compared"])
def test_two_processes_are_one_on_the_joint_batch(name: str, answers: Any) -> None:
    case = CASES[name]
    output, grad_input, *grads = joint(case)
    got = [[torch.from_numpy(t) for t in answers[rank][name]] for rank in range(WORLD)]
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if case.get("dtype") == torch.bfloat16 else {}
    for rank in range(WORLD):
        torch.testing.assert_close(got[rank][0], output[rank], **tolerance)
        torch.testing.assert_close(got[rank][1], grad_input[rank], **tolerance)
    for shares, want in zip(zip(*(g[2:] for g in got), strict=True), grads, strict=True):
        torch.testing.assert_close(sum(shares), want, **tolerance)


@pytest.mark.parametrize("name", ["ranks not compared", "lone group"])
def test_ranks_by_themselves(name: str, answers: Any) -> None:
    layer = make({}, None)
    for rank in range(WORLD):
        want = run(layer, layer, {}, *(t[rank].flatten(0, 1) for t in data({})))
        torch.testing.assert_close([torch.from_numpy(t) for t in answers[rank][name]], want)


def test_critic_step_under_ddp(answers: Any) -> None:
    want = critic_step(Critic(None), *critic_batch())
    for rank in range(WORLD):
        torch.testing.assert_close([torch.from_numpy(g) for g in answers[rank]["critic"]], want)


def test_unequal_ranks_are_refused(answers: Any) -> None:
    for rank in range(WORLD):
        rule = "input must have equally many samples and groups on all ranks; got "
        assert answers[rank]["samples"] == rule + "2 in 1, 4 in 1"
        assert answers[rank]["groups"] == rule + "2 in 1, 2 in 2"
