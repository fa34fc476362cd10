"""The profiler of any loop: what it attributes to which phase, and what it leaves alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gankern
from gankern import _phases
from gankern.profile.meters import OTHER


def pause(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_phases_are_exclusive_and_add_up_to_the_step() -> None:
    walls = []
    with gankern.profile.critic_steps(warm_up=0) as prof:
        for _ in range(3 + 6):
            start = time.perf_counter()
            with prof.step():
                with prof.phase("data"):
                    pause(2e-3)
                pause(1e-3)
                with prof.phase("penalty"):
                    pause(1e-3)
                    with prof.phase("tail"):
                        pause(3e-3)
                    pause(1e-3)
            walls.append(time.perf_counter() - start)
    found = prof.profile()
    assert found.steps == 6
    assert [p.name for p in found.phases] == ["data", "penalty", "penalty/tail", OTHER]
    milliseconds = [p.seconds * 1e3 for p in found.phases]
    assert milliseconds == pytest.approx([2, 2, 3, 1], rel=0.3)
    assert found.mean_seconds == pytest.approx(sum(p.seconds for p in found.phases))
    assert found.seconds.median == pytest.approx(sorted(walls[3:])[3], rel=0.05)


def test_statements_do_as_blocks_do() -> None:
    with gankern.profile.critic_steps(warm_up=1) as prof:
        for _ in range(4 + 3):
            prof.phase("data")
            pause(1e-3)
            prof.phase("real forward")
            pause(2e-3)
            prof.step()
    found = prof.profile()
    assert found.steps == 3
    seconds = {p.name: p.seconds for p in found.phases}
    assert seconds["data"] == pytest.approx(1e-3, rel=0.4)
    assert seconds["real forward"] == pytest.approx(2e-3, rel=0.4)


@pytest.fixture
def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.LayerNorm([8, 4, 4]), nn.Flatten(),
        nn.Linear(128, 1),
    )  # fmt: skip


def penalty_steps(critic: nn.Module, prof: gankern.profile.CriticSteps, count: int) -> None:
    real, fake = torch.randn(2, 4, 3, 16, 16).unbind()
    for _ in range(count):
        with prof.step():
            with prof.phase("real forward"):
                critic(real)
            with prof.phase("penalty"):
                gankern.gradient_penalty(critic, real, fake).backward()


def test_the_penalty_marks_and_counts_its_passes(critic: nn.Module) -> None:
    with gankern.profile.critic_steps(steps=2) as prof:
        penalty_steps(critic, prof, 7)
    flops = {p.name: p.flops for p in prof.profile().phases}
    forward = flops["real forward"]
    assert forward == 4 * 2 * (8 * 8 * 8 * 3 * 16 + 8 * 4 * 4 * 8 * 16 + 128)
    assert flops["penalty/inner forward"] == forward
    assert flops["penalty/inner gradient"] == forward
    # The tangent's first convolution is that of the points' gradient; both have each layer once.
    assert flops["penalty/tangent"] == flops["penalty/weight gradient"] == forward
    calls = {p.name: p.calls for p in prof.profile().phases}
    assert calls["real forward"] >= 5
    assert {"penalty/interpolation", "penalty/tail"} <= calls.keys()


def test_counting_leaves_results_as_they_are(critic: nn.Module) -> None:
    def gradients(steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        critic.zero_grad()
        with gankern.profile.critic_steps(warm_up=0, enabled=steps > 0) as prof:
            penalty_steps(critic, prof, max(steps, 4))
        return [p.grad.clone() for p in critic.parameters() if p.grad is not None]

    for plain, profiled in zip(gradients(0), gradients(4), strict=True):
        assert torch.equal(plain, profiled)


def test_off_and_after_the_block_nothing_is_watched(critic: nn.Module) -> None:
    with gankern.profile.critic_steps(enabled=False) as prof:
        penalty_steps(critic, prof, 8)
    with pytest.raises(RuntimeError, match="no step was timed"):
        prof.profile()
    with gankern.profile.critic_steps(warm_up=0) as prof, pytest.raises(ZeroDivisionError):
        for number in range(10):
            with prof.step(), prof.phase("data"):
                assert _phases.hook is not None or number == 2
                1 / (8 - number)
    assert prof.profile().steps == 5
    assert _phases.hook is None
    assert not _phases.inline


def test_the_trace_names_the_phases(critic: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a" / "trace.json"
    with gankern.profile.critic_steps(trace=path) as prof:
        penalty_steps(critic, prof, 6)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"phase: real forward", "phase: penalty", "phase: penalty/tangent"} <= names
    assert prof.profile().phase("real forward").allocated > 4 * 8 * 64 * 4


def test_no_step_is_said() -> None:
    with pytest.warns(UserWarning, match="saw no step"), gankern.profile.critic_steps():
        pass


@pytest.mark.parametrize("options", [{"steps": 0}, {"warm_up": -1}, {"steps": 2.0}, {"device": "meta"}])
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        gankern.profile.critic_steps(**options)
