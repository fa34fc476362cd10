"""Checkpoints: plain dictionaries of tensors and numbers, loaded without running any code from the file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gankern.data import Batches
from gankern.models.gan import GAN
from gankern.train.files import replacing

FILE_NAME = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or of another model."""


def save_checkpoint(run: Path, gan: GAN, batches: Batches, *, step: int, seed: int) -> None:
    """Write all that the next step depends on, random states included, into the folder of a run."""
    state: dict[str, Any] = {
        "config": gan.config,
        "step": step,
        "seed": seed,
        "gan": gan.state_dict(),
        "batches": batches.state_dict(),
        "rng": torch.get_rng_state(),
    }
    if gan.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(gan.device)
    with replacing(run / FILE_NAME) as temporary:
        torch.save(state, temporary)


def load_checkpoint(run: Path | str) -> dict[str, Any]:
    """Read the checkpoint of a run, given its folder.

    Returns
    -------
    dict
        ``config`` (for `gankern.models.from_config`), ``step``, ``seed``, ``gan`` (for `GAN.load_state_dict`),
        ``batches`` and ``rng``, with tensors on the CPU.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be read.
    """
    path = Path(run) / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the checkpoint of a run, found nothing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint, found a file that torch cannot load") from error
    if not isinstance(state, dict) or not {"config", "step", "seed", "gan", "batches", "rng"} <= state.keys():
        raise CheckpointError(f"{path}: expected a checkpoint of gankern, found something else")
    return state


def restore(state: Mapping[str, Any], gan: GAN, batches: Batches) -> None:
    """Bring model, data and random states to where `save_checkpoint` left them."""
    for name in gan.config.keys() | state["config"].keys():
        saved, given = state["config"].get(name), gan.config.get(name)
        if saved != given:
            raise CheckpointError(f"{name}: expected {saved!r}, which the run began with, got {given!r}")
    gan.load_state_dict(state["gan"])
    batches.load_state_dict(state["batches"])
    torch.set_rng_state(state["rng"])
    if gan.device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], gan.device)
