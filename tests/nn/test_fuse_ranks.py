"""Models fused in front of and inside of DistributedDataParallel, over two processes of gloo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gankern
from gankern.compiler import planning
from gankern.compiler.choice import everywhere

WORLD = 2
WAYS = ("stock", "fused, then wrapped", "wrapped, then fused")


def generator() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True)),
        *(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4, momentum=0.3), nn.LeakyReLU(0.3)),
        *(nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh()),
    )


def train(model: nn.Module, part: slice) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(2)
    for _ in range(3):
        z = torch.randn(6, 5, dtype=torch.float64)
        optimizer.zero_grad()
        model(z[part]).square().sum().backward()
        optimizer.step()
    return [t.detach().clone().numpy() for t in model.state_dict().values()]


def worker(rank: int, store: str, shared: Any) -> None:
    with planning(True), everywhere():
        work(rank, store, shared)


def work(rank: int, store: str, shared: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    torch.manual_seed(1)
    model = generator().double()
    answers = {}
    for way in WAYS:
        inner = copy.deepcopy(model)
        if way == WAYS[1]:
            gankern.fuse(inner)
        wrapped = DistributedDataParallel(inner)
        if way == WAYS[2]:
            gankern.fuse(wrapped)
        answers[way] = train(wrapped, slice(3 * rank, 3 * rank + 3))
        answers[f"{way} ran"] = any(run.reason is None for run in gankern.fusion_report(inner))
        if way != "stock":
            # Statistics over both ranks; stock has none on the CPU.
            gankern.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(inner))
            answers[f"{way} sync"] = train(wrapped, slice(3 * rank, 3 * rank + 3))
    shared[rank] = answers
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers() -> Any:
    return on_ranks(worker, WORLD)


@pytest.mark.parametrize("way", WAYS[1:])
def test_trains_as_stock(way: str, answers: Any) -> None:
    for rank in range(WORLD):
        assert answers[rank][f"{way} ran"]
        for got, want in zip(answers[rank][way], answers[rank]["stock"], strict=True):
            torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want))


@pytest.mark.parametrize("way", WAYS[1:])
def test_ranks_share_statistics(way: str, answers: Any) -> None:
    for a, b in zip(*(answers[rank][f"{way} sync"] for rank in range(WORLD)), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))
