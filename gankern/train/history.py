"""The record of a run, in memory and as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from gankern.train.files import replacing


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


def read_csv(path: Path, last_step: int) -> History:
    """Read the steps up to `last_step`; a run that was killed may have logged more than its checkpoint holds."""
    history = History()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]) <= last_step:
                history.append(int(row["step"]), *(float(row[name]) for name in COLUMNS[1:]))
    return history


def write_csv(path: Path, history: History) -> None:
    """Write a file with the header and all steps."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(history.rows())


def append_csv(path: Path, history: History, start: int) -> None:
    """Append the steps from index `start` on."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(history.rows(start))
