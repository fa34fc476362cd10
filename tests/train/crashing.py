"""Resume a run in process after process, each dying at the next of its calls that change a file.

``python crashing.py FOLDER``: FOLDER/base is a run, FOLDER/0, FOLDER/1, ... become what each process left.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gankern import models, train

SMALL = {"image_size": 8, "width": 1, "latent_dim": 2, "batch_size": 2, "n_critic": 1}
#: What changes files on disk.
CALLS = ("write", "fsync", "replace")


def images() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fit(folder: Path, steps: int, *, resume: bool = False) -> dict[str, Any]:
    """Train with a file written at every step, and return the model's state."""
    torch.manual_seed(3)
    gan = models.build("dcgan", **SMALL)
    options = {"sample_every": 1, "checkpoint_every": 1, "log_every": 1, "progress": False}
    train.fit(gan, images(), steps=steps, out=folder, resume=resume, **options)
    return gan.state_dict()


def failing(call: Callable[..., Any], fail: Callable[[], bool], then: Callable[[], Any]) -> Callable[..., Any]:
    """`call`, but where `fail` says so half of a write is done, and `then` what comes of it."""

    def wrapped(*args: Any) -> Any:
        if not fail():
            return call(*args)
        if call.__name__ == "write" and len(args[1]) > 1:
            call(args[0], args[1][: len(args[1]) // 2])
        return then()

    return wrapped


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    fit(folder / "0", 1)  # so that no child has to load what training needs
    shutil.rmtree(folder / "0")
    for n in range(1000):
        run = folder / str(n)
        shutil.copytree(folder / "base", run)
        child = os.fork()
        if child == 0:
            calls = iter(range(10_000))

            def dies(n: int = n, calls: Iterator[int] = calls) -> bool:
                return next(calls) == n

            for name in CALLS:
                setattr(os, name, failing(getattr(os, name), dies, lambda: os._exit(9)))
            fit(run, 2, resume=True)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
