"""Checkpoints: plain dictionaries of tensors and numbers, loaded without running any code from the file."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.optim import Optimizer

from gankern import models
from gankern._files import open_file, reason, write_file
from gankern.data import Batches
from gankern.models.gan import GAN
from gankern.train.errors import CheckpointError, shown
from gankern.train.structure import check_keys, check_like, check_optimizer, stateless

FILE_NAME = "checkpoint.pt"
#: Begins the comment of the archive, the hash of all bytes before the comment's length.
_COMMENT = b"gankern sha256 "
_FIELDS = {"config", "step", "seed", "gan", "batches", "rng"}
#: Written where they apply, and not by every version.
_OPTIONAL = {"cuda_rng", "losses", "stateless"}


def save_checkpoint(run: Path, gan: GAN, batches: Batches, *, step: int, seed: int, losses: int) -> None:
    """Write all that the next step depends on, random states included, into the folder of a run.

    `losses` is the checksum of the rows of ``losses.csv``.
    """
    state: dict[str, Any] = {
        "config": gan.config,
        "step": step,
        "seed": seed,
        "gan": gan.state_dict(),
        "batches": batches.state_dict(),
        "rng": torch.get_rng_state(),
        "losses": losses,
        "stateless": {name: stateless(optimizer) for name, optimizer in _optimizers(gan).items()},
    }
    if gan.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(gan.device)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # The last two bytes are the length of the archive's comment, which torch leaves empty.
    content = buffer.getbuffer()[:-2]
    comment = _COMMENT + hashlib.sha256(content).hexdigest().encode()
    write_file(run / FILE_NAME, content, len(comment).to_bytes(2, "little"), comment)


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
        If there is none, or it cannot be read, or was changed since it was written.
    """
    path = Path(run) / FILE_NAME
    with open_file(path, CheckpointError, "the checkpoint of a run") as file:
        try:
            _check_archive(file, path)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except CheckpointError:
            raise
        except Exception as error:  # what a broken file makes zipfile, pickle and torch raise has no end
            found = f"found a file that torch cannot load: {type(error).__name__}"
            raise CheckpointError(f"{path}: expected a checkpoint, {found}") from error
    if not isinstance(state, dict) or not _FIELDS & state.keys():
        raise CheckpointError(f"{path}: expected a checkpoint of gankern, found something else")
    _check_fields(state, path)
    return state


def build(state: Mapping[str, Any], run: Path | str) -> GAN:
    """Make the model of the checkpoint that `load_checkpoint` read from a run, and load its networks.

    Raises
    ------
    CheckpointError
        If there is no such model, or the networks are of another.
    """
    path, config = Path(run) / FILE_NAME, state["config"]
    try:
        with torch.device("meta"):  # settings that nobody has the memory for fit no tensor in the file
            outline = models.from_config(config)
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config: expected the settings of a model, found: {reason(error)}") from error
    check_keys(state["gan"], outline.state_dict(), f"{path}: gan")
    for name in ("generator", "critic"):
        check_like(state["gan"][name], getattr(outline, name).state_dict(), f"{path}: gan.{name}")
    gan = models.from_config(config)
    gan.generator.load_state_dict(state["gan"]["generator"])
    gan.critic.load_state_dict(state["gan"]["critic"])
    return gan


def restore(state: Mapping[str, Any], gan: GAN, batches: Batches, run: Path) -> None:
    """Bring model, data and random states to where `save_checkpoint` left them; all is checked before any changes."""
    path = run / FILE_NAME
    for name in gan.config.keys() | state["config"].keys():
        saved, given = state["config"].get(name), gan.config.get(name)
        if saved != given:
            began = f"{shown(saved)}, as in {path}, which the run began with"
            raise CheckpointError(f"{name[:60]}: expected {began}, got {shown(given)}")
    expected, optimizers = gan.state_dict(), _optimizers(gan)
    check_keys(state["gan"], expected, f"{path}: gan")
    for name, part in expected.items():
        where = f"{path}: gan.{name}"
        if name in optimizers:
            check_optimizer(state["gan"][name], optimizers[name], state.get("stateless", {}).get(name), where)
        else:
            check_like(state["gan"][name], part, where)
    if len(state["batches"]["order"]) != len(batches.images):
        found = len(state["batches"]["order"])
        raise CheckpointError(f"images: expected the {found} of the saved run, got {len(batches.images)}")
    on_cuda = gan.device.type == "cuda" and "cuda_rng" in state
    if on_cuda:
        check_like(state["cuda_rng"], torch.cuda.get_rng_state(gan.device), f"{path}: cuda_rng")

    gan.load_state_dict(state["gan"])
    batches.load_state_dict(state["batches"])
    torch.set_rng_state(state["rng"])
    if on_cuda:
        torch.cuda.set_rng_state(state["cuda_rng"], gan.device)


def _optimizers(gan: GAN) -> dict[str, Optimizer]:
    return {name: value for name, value in vars(gan).items() if isinstance(value, Optimizer)}


def _check_archive(file: BinaryIO, path: Path) -> None:
    """See that no byte has changed: by the file's hash, or by the records' own checksums where it has none."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # torch compresses nothing, so that more can only be claimed.
        if sum(record.file_size for record in records) > size:
            raise CheckpointError(f"{path}: expected records of {size} bytes at most, found more claimed")
        comment = archive.comment
        if comment.startswith(_COMMENT):
            file.seek(0)
            sealed = hashlib.sha256()
            left = size - len(comment) - 2
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                sealed.update(part)
                left -= len(part)
            if comment[len(_COMMENT) :] == sealed.hexdigest().encode():
                return
            where = f"record {archive.testzip() or 'names and sizes'}"
            raise CheckpointError(f"{path}: {where}: expected the bytes that the checksum was taken of, found others")
        if broken := archive.testzip():
            raise CheckpointError(f"{path}: record {broken}: expected the bytes that the checksum was taken of")


def _check_fields(state: dict[str, Any], path: Path) -> None:
    for name in sorted(_FIELDS - state.keys()):
        raise CheckpointError(f"{path}: {name}: expected a field of a checkpoint, found nothing")
    for name in sorted(map(str, state.keys() - _FIELDS - _OPTIONAL)):
        raise CheckpointError(f"{path}: {name[:60]!r}: expected no such field")
    config = state["config"]
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise CheckpointError(f"{path}: config: expected settings by name, found {shown(config)}")
    for name, value in config.items():
        if isinstance(value, Tensor):
            raise CheckpointError(f"{path}: config.{name}: expected a plain setting, found {shown(value)}")
    for name, least, end in (("step", 1, 2**63), ("seed", -(2**63), 2**64), ("losses", 0, 2**32)):
        value = state.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
            raise CheckpointError(f"{path}: {name}: expected an integer of {least} or more, found {shown(value)}")
    for name in ("gan", "batches", *({"stateless"} & state.keys())):
        if not isinstance(state[name], dict):
            raise CheckpointError(f"{path}: {name}: expected its parts by name, found {shown(state[name])}")
    _check_generator(state["rng"], f"{path}: rng")
    batches = state["batches"]
    check_keys(batches, {"order": None, "position": None, "generator": None}, f"{path}: batches")
    order, position = batches["order"], batches["position"]
    is_list = isinstance(order, Tensor) and order.layout is torch.strided and not order.is_meta
    # One that is not contiguous may be far larger than its file.
    if not is_list or order.dtype != torch.int64 or order.ndim != 1 or not order.is_contiguous():
        raise CheckpointError(f"{path}: batches.order: expected the images' indices, found {shown(order)}")
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise CheckpointError(f"{path}: batches.order: expected each of {len(order)} images once, found others")
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= len(order):
        raise CheckpointError(f"{path}: batches.position: expected 0 to {len(order)}, found {shown(position)}")
    _check_generator(batches["generator"], f"{path}: batches.generator")


def _check_generator(state: object, where: str) -> None:
    generator = torch.Generator()
    check_like(state, generator.get_state(), where)
    try:
        generator.set_state(state)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise CheckpointError(f"{where}: expected the state of a random generator, found: {reason(error)}") from error
