"""Whole steps of the reference GANs."""

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
    Case,
    Run,
    Sides,
    Size,
    gankern,
    to_channels_last,
    under_autocast,
)
from gankern.bench.check import Results
from gankern.bench.results import OURS

MODELS = ("dcgan", "wgan", "wgan-gp")


def _with_alpha(loss: Callable[..., Tensor], critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Draw outside what is compiled: Inductor's random numbers are its own."""
    return loss(critic, real, fake, torch.rand(len(real), 1, 1, 1, device=real.device))


def _step_case(size: Size, dtype: torch.dtype, device: str, *, model: str, network: str) -> Sides:
    """Sides of a whole step of one network of a reference GAN: losses, backward, optimizer."""
    from gankern.train import steps

    n, image_size = size["batch"], size["image_size"]
    real = torch.rand(n, 1, image_size, image_size).mul(2).sub(1).to(device)
    latent: Tensor | None = None
    start: dict[str, dict[str, Tensor]] = {}
    penalised = model == "wgan-gp" and network == "critic"

    def side(ops: str, variant: str = "eager") -> Run:
        nonlocal latent
        torch.manual_seed(0)
        gan = gankern().models.build(model, image_size=image_size, ops=ops, width=size["width"]).to(device)
        for name in ("generator", "critic"):
            module = getattr(gan, name)
            module.load_state_dict(start.setdefault(name, copy.deepcopy(module.state_dict())))
            if variant == "channels_last":
                to_channels_last(module)
            elif variant == "compile" and not penalised:
                module.compile(dynamic=False)
        if penalised and variant in ("func_grad", "compile"):
            loss = stock.wgan_gp_loss
            gan.critic_loss = partial(
                _with_alpha, torch.compile(loss, dynamic=False) if variant == "compile" else loss, gan.critic
            )
        if latent is None:
            latent = gan.sample_latent(n).to(device)
        images = real.contiguous(memory_format=torch.channels_last) if variant == "channels_last" else real
        args = (images, latent) if network == "critic" else (latent,)
        step = getattr(steps, f"{network}_step")
        params = list(getattr(gan, network).parameters())

        def run() -> Results:
            # Both sides draw the same interpolation points.
            torch.manual_seed(1)
            with under_autocast(device, dtype is torch.bfloat16):
                loss = step(gan, *args)
            return {"loss": [loss], "gradients": [p.grad for p in params], "parameters": params}

        return run

    variants = ["eager", "channels_last", "compile"] + ["func_grad"] * penalised
    return Sides(
        reference=side("stock"),
        stock={variant: side("stock", variant) for variant in variants},
        ours={OURS: side("gankern"), OURS_CHANNELS_LAST: side("gankern", "channels_last")},
        work=n,
        unit="images",
        tolerance=1e-3 if dtype is torch.float32 else 1e-1,
    )


_STEP: dict[str, Any] = {
    "size": {"batch": 64, "width": 32, "image_size": 32},
    "tiny": {"batch": 4, "width": 4, "image_size": 8},
}

CASES = [
    *(
        Case(
            f"{network}_step.{model}",
            f"a whole {network} step of {model}",
            partial(_step_case, model=model, network=network),
            **_STEP,
        )
        for network in ("critic", "generator")
        for model in MODELS
    ),
]
