"""Processes that run programs, and survive those that kill them."""

from __future__ import annotations

import multiprocessing as mp
import time
from typing import Any

from fuzz import checks
from fuzz.fuzzer import Counts, Found, run

#: Seconds after which a program hangs.
_HANGS = 120
#: Programs that a worker counts by itself before it tells.
_BATCH = 20


def _work(first: int, stop: int, step: int, results: Any, current: Any, ours: Any) -> None:
    import torch

    checks.tell_side = lambda side: setattr(ours, "value", side)

    torch.set_num_threads(1)
    counts = Counts()
    for seed in range(first, stop, step):
        current.value = seed
        found = run(seed, counts)
        if found is not None:
            results.put(found)
        if counts.programs == _BATCH:
            results.put(counts)
            counts = Counts()
    results.put(counts)
    results.put(None)


class Worker:
    """Every `step`-th program from the first, in a process that may die of one and is started again behind it."""

    def __init__(self, first: int, stop: int, step: int) -> None:
        self._next, self._stop, self._step = first, stop, step
        # Torch is loaded once, by the process that the others are forked from.
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch._dynamo"])
        self.done = False
        self._start()

    def _start(self) -> None:
        # Each process has a queue of its own: one that dies may hold its lock for ever.
        self._results: Any = self._context.SimpleQueue()
        self._current: Any = self._context.Value("q", self._next, lock=False)
        self._ours: Any = self._context.Value("b", True, lock=False)
        arguments = (self._next, self._stop, self._step, self._results, self._current, self._ours)
        self._process: Any = self._context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        self._seen, self._since = -1, time.monotonic()

    def poll(self) -> list[Found | Counts | str]:
        """What came since the last call; words where a program killed the process or hangs."""
        alive = self._process.is_alive()
        came: list[Found | Counts | str] = []
        while not (self.done or self._results.empty()):
            result = self._results.get()
            self.done = result is None
            if result is not None:
                came.append(result)
        seed = self._current.value
        if seed != self._seen:
            self._seen, self._since = seed, time.monotonic()
        hangs = time.monotonic() - self._since > _HANGS
        if not self.done and (not alive or hangs):
            self._process.kill()
            self._process.join()
            how = "hangs" if hangs else f"dies with exit code {self._process.exitcode}"
            came.append(f"seed {seed}: {'gankern' if self._ours.value else 'stock'} {how}")
            self._next = seed + self._step
            self.done = self._next >= self._stop
            if not self.done:
                self._start()
        return came

    def stop(self) -> None:
        self._process.kill()
