"""The cases of `gankern bench` under pytest-benchmark."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import gankern
from gankern.bench import timing
from gankern.bench.cases import CASES, OURS_CHANNELS_LAST
from gankern.bench.cli import VARIANTS
from gankern.bench.measure import Checked, checked
from gankern.bench.results import OURS

pytestmark = pytest.mark.filterwarnings("default")


@lru_cache(maxsize=1)
def prepared(name: str) -> Checked:
    case = CASES[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    return checked(case.setup(case.size, torch.float32, "cpu"))


@pytest.mark.parametrize("side", [OURS, OURS_CHANNELS_LAST, *VARIANTS])
@pytest.mark.parametrize("name", CASES)
def test_case(benchmark: BenchmarkFixture, name: str, side: str) -> None:
    runs, error, left_out, _ = prepared(name)
    if side not in runs:
        pytest.skip(left_out.get(side, "not a variant of this case"))
    benchmark.group = name
    benchmark.extra_info.update(
        side=side,
        size=dict(CASES[name].size),
        error=error,
        peak_bytes=timing.peak_memory(runs[side]),
        machine=gankern.info(),
    )
    calls = timing.calls_per_sample({side: runs[side]})
    benchmark.pedantic(runs[side], rounds=15, iterations=calls, warmup_rounds=1)
