"""Processes of a gloo group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch


def on_ranks(worker: Callable[[int, str, Any], None], count: int) -> dict[int, Any]:
    """Results of ``worker(rank, store, results)`` in as many processes, each of which puts its own into the dict.

    They meet in a file, as another process may take a free port.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (f"file://{folder}/store", results), count)
        return dict(results)
