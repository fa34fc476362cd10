"""Measured ceilings, of a machine whose operators take a known time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.bench import ceilings

COPIED, MULTIPLIED, CALL = 2.0**24, 2.0**25, 2.0**-8


class Machine(TorchDispatchMode):
    """Its clock moves with the bytes that it copies, the products that it computes and the other calls."""

    now = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::copy_":
            self.now += 2 * args[0].nbytes / COPIED
        elif name == "aten::mm":
            # Larger products are faster.
            n = args[0].size(0)
            self.now += 2 * n**3 / (MULTIPLIED * n / 256 * (2 if args[0].dtype == torch.bfloat16 else 1))
        elif name == "aten::add_":
            self.now += CALL
        return func(*args, **kwargs or {})

    def perf_counter(self) -> float:
        return self.now


def test_has_the_rate_of_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._COPIED, "cpu", 1 << 22)
    monkeypatch.setitem(ceilings._SIDES, "cpu", (128, 256))
    with Machine() as machine:
        monkeypatch.setattr(ceilings, "time", machine)
        assert ceilings.measure("cpu") == {
            "copy_bytes": COPIED,
            "cached_copy_bytes": COPIED,
            "float32_flops": MULTIPLIED,
            "bfloat16_flops": 2 * MULTIPLIED,
            "call_seconds": CALL,
        }


def test_the_shortest_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(ceilings, "time", machine)
    lengths = iter([9.0, 9.0, 0.1, 0.05, 0.2, 9.0])

    def work() -> None:
        machine.now += next(lengths)

    # The first two warm up, and none starts after a quarter of a second.
    assert ceilings._seconds(work, torch.device("cpu")) == pytest.approx(0.05)
    assert next(lengths) == 9.0
