"""What a run tells while it goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

#: Least time between two lines of a log.
LINE_SECONDS = 10.0


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Steps and readings of a run, on stderr."""

    def __init__(self, name: str, done: int, steps: int, *, shown: bool) -> None:
        self._name, self._steps = name, steps
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._next_line = time.monotonic() + LINE_SECONDS
        self._bar = tqdm(total=steps, initial=done, unit="step", desc=name, disable=not (shown and terminal))

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def reading(self, step: int, text: str, *, last: bool) -> None:
        """Show losses and speed."""
        self._bar.set_postfix_str(text)
        if self._lines and (last or time.monotonic() >= self._next_line):
            self._next_line = time.monotonic() + LINE_SECONDS
            print(f"{self._name}: step {step} of {self._steps}: {text}", file=sys.stderr, flush=True)
