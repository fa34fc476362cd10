"""Processes of a gloo group."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

# Torch is loaded once, by the process that the others are forked from.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "torch.testing"])


def _on_rank(rank: int, module: str, worker: str, environment: dict[str, str], store: str, results: Any) -> None:
    # The server's environment may be older than the test; gankern reads it where it is loaded.
    os.environ.update(environment)
    getattr(importlib.import_module(module), worker)(rank, store, results)


def on_ranks(worker: Callable[[int, str, Any], None], count: int) -> dict[int, Any]:
    """Results of ``worker(rank, store, results)`` in as many processes, each of which puts its own into the dict.

    They meet in a file, as another process may take a free port.
    """
    with tempfile.TemporaryDirectory() as folder, _CONTEXT.Manager() as manager:
        results = manager.dict()
        arguments = (worker.__module__, worker.__name__, dict(os.environ), f"file://{folder}/store", results)
        torch.multiprocessing.start_processes(_on_rank, arguments, count, start_method="forkserver")
        return dict(results)
