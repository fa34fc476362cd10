"""What gankern's penalty would save in a loop that has stock's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import gankern
from gankern.bench import stock, timing
from gankern.bench.own import copied
from gankern.profile.results import Advice, describe_saving


def try_penalty(critic: nn.Module, real: Tensor, fake: Tensor, *inputs: Tensor, rounds: int = 20) -> Advice:
    """Time `gankern.gradient_penalty` against the penalty as most code has it, on a copy of a critic.

    Parameters
    ----------
    critic : nn.Module
        Called as ``critic(x, *inputs)``; left as it is.
    real, fake : Tensor
        Shape (N, ...), as in training.
    *inputs : Tensor
        Labels and the like.
    rounds : int
        Runs of each, in turn.

    Returns
    -------
    Advice
        With the seconds that each penalty and its backward pass are shorter by.
    """
    alpha = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    (ours,), (theirs,) = copied(critic), copied(critic)

    def run(net: nn.Module, penalty: Callable[[], Tensor]) -> None:
        net.zero_grad()
        penalty().backward()

    sides = {
        "stock": partial(run, theirs, lambda: stock.gradient_penalty(lambda x: theirs(x, *inputs), real, fake, alpha)),
        "ours": partial(run, ours, lambda: gankern.gradient_penalty(ours, real, fake, *inputs, alpha=alpha)),
    }
    device = str(real.device)
    timing.rounds(sides, 3, device=device)
    found = timing.rounds(sides, rounds, device=device)
    saving = timing.Spread.of([a - b for a, b in zip(found["stock"], found["ours"], strict=True)])
    whole = timing.Spread.of(found["stock"]).median
    return Advice(describe_saving("gankern.gradient_penalty", saving, whole, "the penalty"), saving.median)
