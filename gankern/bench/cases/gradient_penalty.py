"""The gradient penalty, with its double backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gankern.bench import stock
from gankern.bench.cases.case import (
    OURS_CHANNELS_LAST,
    TOLERANCE,
    Case,
    Run,
    Sides,
    Size,
    gankern,
    random_tensor,
    to_channels_last,
    under_autocast,
)
from gankern.bench.check import Results
from gankern.bench.results import OURS


def _penalty_case(size: Size, dtype: torch.dtype, device: str, *, critic: type[nn.Module]) -> Sides:
    """Sides of a gradient penalty and its backward into the critic's parameters."""
    from gankern.ops.gradient_penalty import reference

    n, channels, h = size["batch"], size["channels"], size["image_size"]
    net = critic(channels, size["width"], h).to(device)
    images: dict[str, Any] = {"dtype": torch.float32, "device": device}
    real, fake = random_tensor(n, channels, h, h, **images), random_tensor(n, channels, h, h, **images)
    alpha = torch.rand(n, 1, 1, 1).to(device)
    mixed = dtype is torch.bfloat16

    def side(
        penalty: Callable[..., Tensor],
        to: torch.dtype = torch.float32,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> Run:
        form = torch.channels_last if channels_last else torch.preserve_format
        own = copy.deepcopy(net).to(dtype=to)
        if channels_last:
            to_channels_last(own)
        args = [real.to(to, memory_format=form), fake.to(to, memory_format=form), alpha.to(to)]
        params = list(own.parameters())
        autocast = torch.device(device).type if mixed else None
        step = stock.CompiledGradients(partial(penalty, own), params, autocast) if compiled else None

        def run() -> Results:
            for p in params:
                p.grad = None
            if step is not None:
                loss = step(*args)
            else:
                with under_autocast(device, mixed and to is torch.float32):
                    loss = penalty(own, *args)
                loss.backward()
            return {"penalty": [loss], "gradients": [p.grad for p in params]}

        return run

    def oracle(net: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        return reference.gradient_penalty(net, real, fake, weight=10.0, target=1.0, one_sided=False, alpha=alpha)

    def ours(net: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        return gankern().gradient_penalty(net, real, fake, weight=10.0, alpha=alpha)

    return Sides(
        reference=side(oracle, torch.float64),
        stock={
            "eager": side(stock.gradient_penalty),
            "channels_last": side(stock.gradient_penalty, channels_last=True),
            "func_grad": side(stock.gradient_penalty_func),
            "compile": side(torch.compile(stock.gradient_penalty_func, dynamic=False)),
            stock.COMPILE_STEP: side(stock.gradient_penalty, compiled=True),
        },
        ours={OURS: side(ours), OURS_CHANNELS_LAST: side(ours, channels_last=True)},
        work=n,
        unit="images",
        left_out=stock.without_compile_step(),
        # The gradient of a gradient rounds twice.
        tolerance=2 * TOLERANCE[dtype],
    )


_PENALTY: dict[str, Any] = {
    "tiny": {"batch": 3, "channels": 2, "width": 4, "image_size": 8},
    "sizes": {"batch": (8, 16, 32, 64, 128), "width": (8, 16, 32), "image_size": (16, 32, 64)},
    "not_in_main": dict.fromkeys(
        ("compile", stock.COMPILE_STEP), "takes 15 to 40 s to compile; `gankern bench gradient_penalty` has it"
    ),
}

CASES = [
    Case(
        "gradient_penalty.conv",
        "penalty on a convolutional critic, with its double backward",
        partial(_penalty_case, critic=stock.ConvCritic),
        size={"batch": 64, "channels": 1, "width": 16, "image_size": 32},
        **_PENALTY,
    ),
    Case(
        "gradient_penalty.residual",
        "penalty on a residual critic with layer norm, with its double backward",
        partial(_penalty_case, critic=stock.ResidualCritic),
        size={"batch": 64, "channels": 1, "width": 16, "image_size": 32},
        **_PENALTY,
    ),
]
