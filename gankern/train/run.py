"""The folder that a run writes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gankern._files import append_file, locked, make_folder, open_file, reason, write_file
from gankern.data import Batches
from gankern.models.gan import GAN
from gankern.train.checkpoint import FILE_NAME as CHECKPOINT_NAME
from gankern.train.checkpoint import load_checkpoint, save_checkpoint
from gankern.train.errors import CheckpointError, shown
from gankern.train.history import COLUMNS, History, add_checksum, csv_text, read_csv, write_csv
from gankern.train.samples import sample, save_grid

CONFIG_NAME = "config.json"
LOSSES_NAME = "losses.csv"
GRID_IMAGES = 64
#: What a killed process was writing.
_UNFINISHED = (*(f".{name}.*.tmp" for name in (CONFIG_NAME, LOSSES_NAME, CHECKPOINT_NAME)), "samples/.step-*.tmp")


class Run:
    """Settings, losses, samples and checkpoint of one run, on disk and, where asked for, in TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self._writer_class: Any = _summary_writer() if tensorboard else None
        self._writer: Any = None
        self._logged = 0
        self._checksum = 0

    @contextlib.contextmanager
    def held(self, *, make: bool) -> Iterator[None]:
        """Keep other processes from writing to the folder, which is made where `make` is set, until the block ends."""
        if make:
            make_folder(self.folder)
        elif not self.folder.is_dir():
            raise CheckpointError(f"{self.folder / CHECKPOINT_NAME}: expected the checkpoint of a run, found nothing")
        with locked(self.folder):
            for pattern in _UNFINISHED:
                for left in self.folder.glob(pattern):
                    with contextlib.suppress(OSError):
                        left.unlink()
            try:
                yield
            finally:
                if self._writer is not None:
                    self._writer.close()

    def start(self, config: Mapping[str, Any]) -> History:
        """Begin an empty record."""
        if (self.folder / CHECKPOINT_NAME).exists():
            raise FileExistsError(f"out: {self.folder} holds a run already: resume it or choose another folder")
        write_file(self.folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        history = History()
        write_csv(self.folder / LOSSES_NAME, history)
        self._open_writer(first_step=1)
        return history

    def resume(self, step: int, checksum: int | None) -> History:
        """Read the record up to `step`, see that it has this checksum, and drop what was logged after it."""
        path = self.folder / LOSSES_NAME
        history = read_csv(path, step, checksum)
        write_csv(path, history)
        self._logged = len(history)
        self._checksum = add_checksum(0, csv_text(history))
        self._open_writer(first_step=step + 1)
        return history

    def log(self, history: History, *, sync: bool) -> None:
        """Write the steps added since the last call."""
        rows = csv_text(history, self._logged)
        append_file(self.folder / LOSSES_NAME, rows, sync=sync)
        self._checksum = add_checksum(self._checksum, rows)
        if self._writer is not None:
            for step, *values in history.rows(self._logged):
                for name, value in zip(COLUMNS[1:], values, strict=True):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
        self._logged = len(history)

    def save_samples(self, gan: GAN, step: int, seed: int) -> None:
        """Write a grid of samples, from the same latents at every step."""
        save_grid(sample(gan, GRID_IMAGES, seed), self.folder / "samples" / f"step-{step:06d}.png")

    def save(self, gan: GAN, batches: Batches, step: int, seed: int) -> None:
        """Write the checkpoint; all that was logged before is in its record."""
        save_checkpoint(self.folder, gan, batches, step=step, seed=seed, losses=self._checksum)

    def saved(self) -> str:
        """What the folder holds, for messages."""
        try:
            return f"{self.folder} holds step {load_checkpoint(self.folder)['step']}"
        except CheckpointError:
            return "nothing was saved"

    def _open_writer(self, first_step: int) -> None:
        if self._writer_class is not None:
            self._writer = self._writer_class(self.folder / "tensorboard", purge_step=first_step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: expected its package, found none: pip install tensorboard") from error
    return SummaryWriter


def load_config(folder: Path | str) -> dict[str, Any]:
    """Read ``config.json`` of a run: ``model`` (for `gankern.models.from_config`), ``seed`` and what the caller added.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be read.
    """
    path = Path(folder) / CONFIG_NAME
    with open_file(path, CheckpointError, "the settings of a run") as file:
        try:
            config = json.load(file)
        except (MemoryError, OSError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{path}: expected JSON, found: {reason(error)}") from error
    if not isinstance(config, dict) or not {"model", "seed"} & config.keys():
        raise CheckpointError(f"{path}: expected the settings of a run, found something else")
    fields = (("model", dict, "settings by name"), ("seed", int, "an integer"), ("data", str, "a text"))
    for name, kind, expected in fields:
        if name not in config and name == "data":  # the command line's own
            continue
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, kind):
            found = shown(value) if name in config else "nothing"
            raise CheckpointError(f"{path}: {name}: expected {expected}, found {found}")
    return config
