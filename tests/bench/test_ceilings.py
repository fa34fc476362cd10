"""Measured ceilings: positive, and nothing that this machine's own work beats by much."""

from __future__ import annotations

import time

import pytest
import torch

from gankern.bench import ceilings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._COPIED, "cpu", 1 << 22)
    monkeypatch.setitem(ceilings._SIDES, "cpu", (256,))


def test_has_a_rate_for_each_key() -> None:
    found = ceilings.measure("cpu")
    assert list(found) == ["copy_bytes", "cached_copy_bytes", "float32_flops", "bfloat16_flops", "call_seconds"]
    assert all(value > 0 for value in found.values())
    assert found["call_seconds"] < 1e-3


def test_a_product_runs_near_its_ceiling() -> None:
    peak = ceilings.measure("cpu", (torch.float32,))["float32_flops"]
    a, b = torch.randn(2, 256, 256).unbind()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    assert 0.3 < 2 * 256**3 / min(seconds) / peak < 3
