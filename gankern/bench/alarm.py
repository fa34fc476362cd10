"""A limit on what cannot be told to stop, such as a compiler."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class TooLong(BaseException):
    """A time limit has passed; no `Exception`, so that what is broken off does not take it for an error of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Break off what runs inside after so many seconds, and what torch's compiler still does for it.

    Parameters
    ----------
    seconds : float
        None is set where it is infinite, or outside of the main thread, which alone gets signals.

    Raises
    ------
    TooLong
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*args: Any) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, stop)
    # Again each second: a destructor, say, swallows what is raised in it.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except TooLong:
        signal.setitimer(signal.ITIMER_REAL, 0)
        from torch._inductor.async_compile import shutdown_compile_workers

        with suppress(Exception):
            shutdown_compile_workers()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
