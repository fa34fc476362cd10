"""The record of a run, in memory and as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import zlib
from pathlib import Path

from gankern._files import open_file, reason, write_file
from gankern.train.errors import CheckpointError, shown


@dataclasses.dataclass
class History:
    """One entry per training step.

    Attributes
    ----------
    step : list of int
        Steps, from 1.
    critic_loss : list of float
        Loss of the last critic step.
    generator_loss : list of float
    images_per_second : list of float
        Real images that the critic saw per second, averaged over the steps logged together.
    """

    step: list[int] = dataclasses.field(default_factory=list)
    critic_loss: list[float] = dataclasses.field(default_factory=list)
    generator_loss: list[float] = dataclasses.field(default_factory=list)
    images_per_second: list[float] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def append(self, step: int, critic_loss: float, generator_loss: float, images_per_second: float) -> None:
        """Add one step."""
        self.step.append(step)
        self.critic_loss.append(critic_loss)
        self.generator_loss.append(generator_loss)
        self.images_per_second.append(images_per_second)

    def rows(self, start: int = 0) -> list[tuple[int, float, float, float]]:
        """Entries from index `start` on, each in the order of the attributes."""
        columns = (self.step, self.critic_loss, self.generator_loss, self.images_per_second)
        return list(zip(*(column[start:] for column in columns), strict=True))


COLUMNS = tuple(field.name for field in dataclasses.fields(History))


def read_csv(path: Path, last_step: int, checksum: int | None = None) -> History:
    """Read the steps up to `last_step`; a run that was killed may have logged more than its checkpoint holds.

    Raises
    ------
    CheckpointError
        If there are not all of them, or others than those of which the `checksum` was taken.
    """
    history = History()
    with open_file(path, CheckpointError, "the losses of a run") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.reader(iter(lambda: text.readline(1000), ""))  # a file without an end of line is not read whole
        try:
            if next(rows, None) != list(COLUMNS):
                raise CheckpointError(f"{path}: line 1: expected the header {','.join(COLUMNS)}")
            while not history.step or history.step[-1] < last_step:
                row = next(rows, None)
                if row is None:
                    last = history.step[-1] if history.step else "none"
                    raise CheckpointError(
                        f"{path}: step: expected {last_step}, the checkpoint's, at the end, found {last}"
                    )
                _add_row(history, row, last_step, f"{path}: line {rows.line_num}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: line {rows.line_num + 1}: expected numbers, found: {reason(error)}"
            ) from error
    if checksum is not None and add_checksum(0, csv_text(history)) != checksum:
        raise CheckpointError(f"{path}: expected the losses that the checkpoint goes on from, found other numbers")
    return history


def _add_row(history: History, row: list[str], last_step: int, where: str) -> None:
    if len(row) != len(COLUMNS):
        raise CheckpointError(f"{where}: expected {len(COLUMNS)} values, {','.join(COLUMNS)}, found {len(row)}")
    # A record may begin late; from there on no step is missing.
    expected = [history.step[-1] + 1] if history.step else range(1, last_step + 1)
    if not re.fullmatch("[1-9][0-9]{0,17}", row[0]) or int(row[0]) not in expected:
        wanted = " to ".join(str(step) for step in sorted({expected[0], expected[-1]}))
        raise CheckpointError(f"{where}: step: expected {wanted}, found {shown(row[0])}")
    losses = []
    for name, text in zip(COLUMNS[1:], row[1:], strict=True):
        try:
            losses.append(float(text))
        except ValueError as error:
            raise CheckpointError(f"{where}: {name}: expected a number, found {shown(text)}") from error
    history.append(int(row[0]), *losses)


def csv_text(history: History, start: int = 0) -> bytes:
    """The rows from index `start` on."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(history.rows(start))
    return text.getvalue().encode()


def add_checksum(checksum: int, rows: bytes) -> int:
    """Go on with the checksum of the rows before, which begins as 0."""
    return zlib.crc32(rows, checksum)


def write_csv(path: Path, history: History) -> None:
    """Write a file with the header and all steps."""
    write_file(path, (",".join(COLUMNS) + "\r\n").encode(), csv_text(history))
