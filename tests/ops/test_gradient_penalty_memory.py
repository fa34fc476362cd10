"""Peak memory of a penalty's forward and backward, and what is alive after it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from critics import batch, watched_kernels
from torch import Tensor, nn

from gankern import gradient_penalty
from gankern.bench.timing import peak_memory
from gankern.ops.gradient_penalty import reference


def critic_of(width: int, size: int) -> nn.Module:
    """The paper's kind of critic, without its shortcuts: layer norm."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1)]
    for part in (1, 2):
        for _ in range(2):
            layers += [nn.LayerNorm([width, size // part, size // part]), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)]
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.ReLU(), nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(width, 1))


def measure() -> list[int | None]:
    """Peaks of gankern and stock, in bytes."""
    critic = critic_of(64, 32)
    real, fake = torch.randn(2, 32, 3, 32, 32)
    alpha = torch.rand(32, 1, 1, 1)
    peaks = []
    for penalty in (gradient_penalty, reference.gradient_penalty):

        def run(penalty: Callable[..., Tensor] = penalty) -> None:
            critic.zero_grad()
            penalty(critic, real, fake, alpha=alpha).backward()

        run()
        critic.zero_grad()
        peaks.append(peak_memory(run))
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_at_most_three_quarters_of_stocks() -> None:
    # Every large block its own mapping: the figure is of what is alive, not of how the heap is cut up.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path]),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, stock = json.loads(done.stdout.splitlines()[-1])
    if ours is None:
        pytest.skip("no high-water mark of memory here")
    assert ours <= 0.75 * stock, f"{ours / 2**20:.1f} of {stock / 2**20:.1f} MiB, {ours / stock:.3f}"


@pytest.mark.parametrize("backward", [False, True])
def test_no_activation_is_alive_afterwards(backward: bool) -> None:
    critic = critic_of(4, 8)
    real, fake, _ = batch(dtype=torch.float32)
    # No garbage collection in between: no cycle may hold a graph until the next one.
    gc.collect()
    gc.disable()
    try:
        with watched_kernels() as seen:
            loss = gradient_penalty(critic, real, fake)
            if backward:
                loss.backward()
        assert len(seen) > 30
        assert not [r for r in seen if r() is not None]
    finally:
        gc.enable()


def test_the_number_of_tensors_does_not_grow() -> None:
    critic = critic_of(4, 8)
    real, fake, _ = batch(dtype=torch.float32)
    label = torch.ones(4)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def call() -> None:
        critic.zero_grad()
        gradient_penalty(critic, real, fake).backward()
        gradient_penalty(lambda x, y: critic(x) * y, real, fake, label, params=critic.parameters()).backward()

    call()
    before = tensors()
    for _ in range(3):
        call()
    assert tensors() <= before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure()))
