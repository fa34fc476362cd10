"""The rates that a device reaches at best, measured: what a time is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gankern.bench.gpu import products_in_tf32

#: Keys of what :func:`measure` finds, beside ``{dtype}_flops``.
COPY, CACHED_COPY, CALL = "copy_bytes", "cached_copy_bytes", "call_seconds"
#: Bytes up to which tensors are taken to lie in a cache: less than a core's second level, or a GPU's.
CACHED_BYTES = 1 << 20

_WARM_UP, _REPEAT = 2, 100
# Seconds after which no further repetition starts.
_BUDGET = 0.25
_COPIED = {"cpu": 1 << 27, "cuda": 1 << 29}
# Which product is the fastest depends on the caches.
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
_CALLS = 200


def measure(
    device: torch.device | str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> dict[str, float]:
    """Measure a device with torch's threads as they are; about a second on a CPU.

    Parameters
    ----------
    device : torch.device or str
        ``"cpu"`` or a CUDA device.
    dtypes : tuple of torch.dtype, optional
        Of the matrix products.

    Returns
    -------
    dict of str to float
        ``copy_bytes`` and ``cached_copy_bytes``, bytes read and written a second by the copy of a tensor much larger
        than a cache and of one that fits; ``{dtype}_flops``, such as ``float32_flops``, operations a second of the
        fastest of a few matrix products; ``call_seconds``, the time of one call of a torch operator on one number.
    """
    device = torch.device(device)
    found = {COPY: _copy(_COPIED[device.type], device), CACHED_COPY: _copy(CACHED_BYTES // 2, device)}
    for dtype in dtypes:
        with products_in_tf32(False):
            found[flops_key(dtype)] = max(_product(n, dtype, device) for n in _SIDES[device.type])
    if device.type == "cuda":
        with products_in_tf32(True):
            found["tf32_flops"] = max(_product(n, torch.float32, device) for n in _SIDES["cuda"])
    one = torch.zeros(1, device=device)
    found[CALL] = _seconds(lambda: [one.add_(1) for _ in range(_CALLS)], device) / _CALLS
    return found


def flops_key(dtype: torch.dtype) -> str:
    """Key of a dtype's matrix product in what :func:`measure` finds."""
    return f"{str(dtype).removeprefix('torch.')}_flops"


def _product(n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _copy(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A short copy is repeated, so that the clock's and a launch's own time do not count.
    calls = max(1, (1 << 23) // size)
    return 2 * size * calls / _seconds(lambda: [target.copy_(source) for _ in range(calls)], device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs: what the device can do undisturbed."""
    run = _on_gpu if device.type == "cuda" else _on_cpu
    for _ in range(_WARM_UP):
        run(work)
    found: list[float] = []
    while len(found) < _REPEAT and sum(found) < _BUDGET:
        found.append(run(work))
    return min(found)


def _on_cpu(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _on_gpu(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
