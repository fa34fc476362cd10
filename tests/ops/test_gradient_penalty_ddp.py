"""The critic's step under DistributedDataParallel: two gloo processes against one on the joint batch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from critics import Residual, batch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gankern import gradient_penalty

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

WORLD = 2
# Each: which critic the penalty gets, whether the scores are in the loss, the wrapper's and the penalty's options.
CASES: dict[str, dict[str, Any]] = {
    "wrapper": {"penalty_of": "ddp"},
    "penalty first": {"penalty_of": "ddp", "first": True},
    "module": {"penalty_of": "module"},
    "unused parameters": {"penalty_of": "ddp", "ddp": {"find_unused_parameters": True}},
    "unused parameters, module": {"penalty_of": "module", "ddp": {"find_unused_parameters": True}},
    "one parameter really unused": {"penalty_of": "ddp", "ddp": {"find_unused_parameters": True}, "spare": True},
    "static graph": {"penalty_of": "ddp", "ddp": {"static_graph": True}},
    "penalty alone": {"penalty_of": "ddp", "scores": False},
    "penalty alone, unused parameters": {
        "penalty_of": "ddp",
        "scores": False,
        "ddp": {"find_unused_parameters": True},
    },
    "penalty alone, bucket views": {"penalty_of": "ddp", "scores": False, "ddp": {"gradient_as_bucket_view": True}},
    "differentiable": {"penalty_of": "ddp", "penalty": {"create_graph": True}},
    "accumulated": {"penalty_of": "ddp", "no_sync": True},
    "accumulated, penalty alone": {"penalty_of": "ddp", "no_sync": True, "scores": False},
    "compiled wrapper": {"penalty_of": "compiled"},
}


def make(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    critic = Residual().double()
    if case.get("spare"):
        critic.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    return critic


def step(critic: nn.Module, penalised: nn.Module, data: tuple[Tensor, ...], case: dict[str, Any]) -> Tensor:
    real, fake, alpha = data

    def penalty() -> Tensor:
        return gradient_penalty(penalised, real, fake, alpha=alpha, **case.get("penalty", {}))

    if not case.get("scores", True):
        return penalty()
    if case.get("first"):
        # The order of the calls: the penalty's comes before the wrapper's own forward.
        value = penalty()
        return value + critic(fake).mean() - critic(real).mean()
    return critic(fake).mean() - critic(real).mean() + penalty()


def shards(step_number: int) -> tuple[Tensor, ...]:
    torch.manual_seed(10 + step_number)
    return batch(4 * WORLD)


def run(critic: nn.Module, penalised: nn.Module, case: dict[str, Any], rank: int | None) -> list[list[Tensor]]:
    """Gradients after each of three steps; with no_sync the first two of them are accumulated."""
    found = []
    for number in range(3):
        data = shards(number)
        if rank is not None:
            data = tuple(t.chunk(WORLD)[rank] for t in data)
        local = bool(case.get("no_sync")) and number == 0
        with critic.no_sync() if local and rank is not None else contextlib.nullcontext():  # type: ignore[operator]
            step(critic, penalised, data, case).backward()
        if not local:
            # Of one process nobody waits for a gradient that the penalty does not need.
            missing = torch.zeros_like if rank is None else lambda p: torch.full_like(p, torch.nan)
            found.append([missing(p) if p.grad is None else p.grad.clone() for p in critic.parameters()])
            critic.zero_grad()
    return found


def worker(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    answers: dict[str, Any] = {}
    for name, case in CASES.items():
        critic = make(case)
        ddp = DistributedDataParallel(critic, **case.get("ddp", {}))
        penalised = {"ddp": ddp, "module": critic}.get(case["penalty_of"]) or torch.compile(ddp)
        try:
            answers[name] = [[g.numpy() for g in grads] for grads in run(ddp, penalised, case, rank)]
        except RuntimeError as error:
            answers[name] = str(error)[:300]
    results[rank] = answers
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["0", "1"], ids=["stock", "planned"])
def answers(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GANKERN_PLAN", request.param)
        return on_ranks(worker, WORLD)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joint_batch(name: str, answers: Any) -> None:
    case = CASES[name]
    critic = make(case)
    want = run(critic, critic, case, None)
    for rank in range(WORLD):
        got = answers[rank][name]
        assert not isinstance(got, str), got
        assert len(got) == len(want)
        for step_got, step_want in zip(got, want, strict=True):
            for g, w in zip(step_got, step_want, strict=True):
                torch.testing.assert_close(torch.from_numpy(g), w, rtol=1e-5, atol=1e-8)
