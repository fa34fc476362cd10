"""Memory that is kept: no block has two owners, limits hold, forks and threads are safe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gankern import workspace

SIZE = (1 << 20,)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    workspace.release()
    yield
    workspace.set_limit(1 << 30)


def test_a_block_is_used_again_once_nobody_refers_to_it() -> None:
    first = workspace.empty(SIZE, torch.float32)
    address = first.data_ptr()
    view = first[10:]
    del first
    assert workspace.empty(SIZE, torch.float32).data_ptr() != address
    assert view.storage_offset() == 10
    del view
    taken = [workspace.empty(SIZE, torch.float32) for _ in range(2)]
    assert address in map(torch.Tensor.data_ptr, taken)


def test_what_is_given_back_serves_other_sizes() -> None:
    workspace.empty((1 << 22,), torch.float32)
    total = workspace.used_bytes() + workspace.idle_bytes()
    parts = [workspace.empty((1 << 16,), torch.float32) for _ in range(20)]
    for place, part in enumerate(parts):
        part.fill_(place)
    assert [int(part.amin()) for part in parts] == [int(part.amax()) for part in parts] == list(range(20))
    del part, parts
    assert workspace.empty((1 << 22,), torch.float32).numel() == 1 << 22
    assert workspace.used_bytes() + workspace.idle_bytes() == total


def test_layouts_and_sizes() -> None:
    for shape in ((2, 3, 40, 50), (1, 70, 30, 1), (3, 0, 4, 4)):
        for order in (torch.contiguous_format, torch.channels_last):
            ours, stock = workspace.empty(shape, torch.float32, order), torch.empty(shape, memory_format=order)
            assert (ours.shape, ours.stride(), ours.dtype) == (stock.shape, stock.stride(), stock.dtype)
            assert not ours._is_view()
    transposed = torch.empty(300, 200, dtype=torch.float64).t()
    assert workspace.like(transposed).stride() == transposed.stride()


def test_limit_and_release() -> None:
    tensors = [workspace.empty(SIZE, torch.float32) for _ in range(3)]
    used = workspace.used_bytes()
    del tensors
    assert workspace.idle_bytes() >= 3 * (1 << 22)
    assert workspace.used_bytes() <= used - 3 * (1 << 22)
    workspace.set_limit(1 << 22)
    assert workspace.idle_bytes() <= 1 << 22
    workspace.release()
    assert workspace.idle_bytes() == 0
    held = workspace.empty(SIZE, torch.float32)
    workspace.set_limit(0)
    held.fill_(1)
    del held
    assert workspace.idle_bytes() == 0


def test_threads_share_it() -> None:
    def work(value: int) -> bool:
        for _ in range(50):
            tensor = workspace.empty(SIZE, torch.float32).fill_(value)
            if not bool((tensor == value).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_processes_have_their_own() -> None:
    # In a process of its own: fork and torch's threads do not go together.
    code = """
import os, torch
torch.set_num_threads(1)
from gankern import workspace
kept = workspace.empty((1 << 20,), torch.float32).fill_(1)
child = os.fork()
if child == 0:
    other = workspace.empty((1 << 20,), torch.float32).fill_(2)
    kept.fill_(3)
    del kept, other
    os._exit(0 if workspace.idle_bytes() else 1)
assert os.waitpid(child, 0)[1] == 0
assert bool((kept == 1).all()) and workspace.idle_bytes() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("size", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_limits_are_named(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="size must be"):
        workspace.set_limit(size)  # type: ignore[arg-type]


def test_limit_of_the_environment() -> None:
    code = "import torch; from gankern import workspace as w; w.empty((1 << 20,), torch.float32); print(w.idle_bytes())"
    for limit, idle in (("0", "0"), ("4194304", "4194304")):
        env = os.environ | {"GANKERN_WORKSPACE_LIMIT": limit}
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == idle
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"GANKERN_WORKSPACE_LIMIT": "much"},
        capture_output=True,
        text=True,
    )
    assert "GANKERN_WORKSPACE_LIMIT must be a number of bytes; got 'much'" in done.stderr
