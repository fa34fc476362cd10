"""The training loop of every reference GAN."""

from gankern.train.checkpoint import load_checkpoint
from gankern.train.errors import CheckpointError
from gankern.train.history import History
from gankern.train.loop import fit
from gankern.train.run import load_config
from gankern.train.samples import sample, save_grid
from gankern.train.steps import critic_step, generator_step

__all__ = [
    "CheckpointError",
    "History",
    "critic_step",
    "fit",
    "generator_step",
    "load_checkpoint",
    "load_config",
    "sample",
    "save_grid",
]
