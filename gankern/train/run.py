"""The folder that a run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gankern.models.gan import GAN
from gankern.train.checkpoint import FILE_NAME as CHECKPOINT_NAME
from gankern.train.checkpoint import CheckpointError
from gankern.train.files import replacing
from gankern.train.history import COLUMNS, History, append_csv, read_csv, write_csv
from gankern.train.samples import sample, save_grid

CONFIG_NAME = "config.json"
LOSSES_NAME = "losses.csv"
GRID_IMAGES = 64


class Run:
    """Settings, losses and samples of one run, on disk and, where asked for, in TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.tensorboard = tensorboard
        self._writer: Any = None
        self._logged = 0

    def start(self, config: Mapping[str, Any]) -> History:
        """Make the folder of a new run, and begin an empty record."""
        if (self.folder / CHECKPOINT_NAME).exists():
            raise FileExistsError(f"out: {self.folder} holds a run already: resume it or choose another folder")
        self._open_writer(first_step=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
        history = History()
        write_csv(self.folder / LOSSES_NAME, history)
        return history

    def resume(self, step: int) -> History:
        """Read the record up to `step`, and drop what was logged after it."""
        self._open_writer(first_step=step + 1)
        path = self.folder / LOSSES_NAME
        history = read_csv(path, step) if path.exists() else History()
        write_csv(path, history)
        self._logged = len(history)
        return history

    def log(self, history: History) -> None:
        """Write the steps added since the last call."""
        append_csv(self.folder / LOSSES_NAME, history, self._logged)
        if self._writer is not None:
            for step, *values in history.rows(self._logged):
                for name, value in zip(COLUMNS[1:], values, strict=True):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
        self._logged = len(history)

    def save_samples(self, gan: GAN, step: int, seed: int) -> None:
        """Write a grid of samples, from the same latents at every step."""
        save_grid(sample(gan, GRID_IMAGES, seed), self.folder / "samples" / f"step-{step:06d}.png")

    def close(self) -> None:
        """Close the TensorBoard log."""
        if self._writer is not None:
            self._writer.close()

    def _open_writer(self, first_step: int) -> None:
        if not self.tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard: expected its package, found none: pip install tensorboard") from error
        self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=first_step)


def load_config(folder: Path | str) -> dict[str, Any]:
    """Read ``config.json`` of a run: ``model`` (for `gankern.models.from_config`), ``seed`` and what the caller added.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be read.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the settings of a run, found nothing")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(config, dict) or not {"model", "seed"} <= config.keys():
        raise CheckpointError(f"{path}: expected the settings of a run, found something else")
    return config
