"""Processes of a gloo group."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch


def on_ranks(worker: Callable[[int, int, Any], None], count: int) -> dict[int, Any]:
    """Results of ``worker(rank, port, results)`` in as many processes, each of which puts its own into the dict."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (port, results), count)
        return dict(results)
