"""Whole steps of the reference GANs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gankern.bench import gpu, stock
from gankern.bench.cases.case import (
    OURS_CHANNELS_LAST,
    Case,
    Run,
    Sides,
    Size,
    to_channels_last,
    under_autocast,
)
from gankern.bench.check import Results
from gankern.bench.results import OURS

if TYPE_CHECKING:
    from gankern.models.gan import GAN

MODELS = ("dcgan", "wgan", "wgan-gp")


def _with_alpha(loss: Callable[..., Tensor], critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Draw outside what is compiled: Inductor's random numbers are its own."""
    return loss(critic, real, fake, torch.rand(len(real), 1, 1, 1, device=real.device))


def _update(gan: GAN, network: str, images: Tensor, latent: Tensor, by: Any) -> list[Tensor]:
    """Make a step of one network, or those of a whole iteration; return the losses."""
    from gankern.bench.training import Batch, iteration

    if network == "critic":
        return [by.critic_step(gan, images, latent)]
    if network == "generator":
        return [by.generator_step(gan, latent)]
    return iteration(gan, Batch([images] * gan.n_critic, [latent] * (gan.n_critic + 1), seed=1), by)


class _CompiledSteps:
    """The functions of `gankern.train.steps`, each compiled whole up to the gradients; for one GAN."""

    def __init__(self, gan: GAN, penalised: bool) -> None:
        def critic_loss(real: Tensor, latent: Tensor, alpha: Tensor) -> Tensor:
            with torch.no_grad():
                fake = gan.generator(latent)
            if penalised:
                return stock.wgan_gp_loss(gan.critic, real, fake, alpha, stock.gradient_penalty)
            return gan.critic_loss(real, fake)

        def generator_loss(latent: Tensor) -> Tensor:
            return gan.generator_loss(gan.generator(latent))

        self._critic = stock.CompiledGradients(critic_loss, gan.critic.parameters())
        self._generator = stock.CompiledGradients(generator_loss, gan.generator.parameters())

    def critic_step(self, gan: GAN, real: Tensor, latent: Tensor) -> Tensor:
        # Drawn outside of what is compiled, as by `_with_alpha`.
        loss = self._critic(real, latent, torch.rand(len(real), 1, 1, 1, device=real.device))
        gan.critic_optimizer.step()
        gan.after_critic_step()
        return loss

    def generator_step(self, gan: GAN, latent: Tensor) -> Tensor:
        from gankern.train.steps import frozen

        with frozen(gan.critic):
            loss = self._generator(latent)
        gan.generator_optimizer.step()
        return loss


def _step_case(size: Size, dtype: torch.dtype, device: str, *, model: str, network: str) -> Sides:
    """Sides of a step of a reference GAN: losses, backward, optimizer; of one network, or of both in turn."""
    from gankern import models
    from gankern.train import steps

    n, image_size = size["batch"], size["image_size"]
    real = torch.rand(n, 1, image_size, image_size).mul(2).sub(1).to(device)
    latent: Tensor | None = None
    start: dict[str, dict[str, Tensor]] = {}
    penalised = model == "wgan-gp" and network != "generator"
    networks = ("generator", "critic") if network == "both" else (network,)

    def side(ops: str, variant: str = "eager") -> Run:
        nonlocal latent
        torch.manual_seed(0)
        gan = models.build(model, image_size=image_size, ops=ops, width=size["width"]).to(device)
        # What a CUDA graph needs, of both sides.
        for optimizer in (gan.generator_optimizer, gan.critic_optimizer):
            for group in optimizer.param_groups:
                group["capturable"] = torch.device(device).type == "cuda"
        for name in ("generator", "critic"):
            module = getattr(gan, name)
            module.load_state_dict(start.setdefault(name, copy.deepcopy(module.state_dict())))
            if variant == "channels_last":
                to_channels_last(module)
            # The compiled loss holds the critic's penalty, which no module compiled by itself can give.
            elif variant == "compile" and not (penalised and name == "critic"):
                module.compile(dynamic=False)
        if penalised and variant in ("func_grad", "compile"):
            loss = stock.wgan_gp_loss
            gan.critic_loss = partial(  # type: ignore[method-assign]
                _with_alpha, torch.compile(loss, dynamic=False) if variant == "compile" else loss, gan.critic
            )
        if latent is None:
            latent = gan.sample_latent(n).to(device)
        images = real.contiguous(memory_format=torch.channels_last) if variant == "channels_last" else real
        by = _CompiledSteps(gan, penalised) if variant == stock.COMPILE_STEP else steps
        step = partial(_update, gan, network, images, latent, by)
        params = [p for name in networks for p in getattr(gan, name).parameters()]

        def run() -> Results:
            # Both sides draw the same interpolation points.
            gpu.seed(1)
            with under_autocast(device, dtype is torch.bfloat16):
                losses = step()
            # After several updates gradients are those of networks that rounding has moved apart.
            gradients = {} if network == "both" else {"gradients": [p.grad for p in params]}
            return {"loss": losses, "parameters": params, **gradients}

        return run

    variants = ["eager", "channels_last", "compile", stock.COMPILE_STEP] + ["func_grad"] * penalised
    return Sides(
        reference=side("stock"),
        stock={variant: side("stock", variant) for variant in variants},
        ours={OURS: side("gankern"), OURS_CHANNELS_LAST: side("gankern", "channels_last")},
        work=n,
        unit="images",
        left_out=stock.without_compile_step(),
        # An activation within a rounding error of its kink takes the other slope: stock's own gradients differ by up
        # to 2e-3 between its memory layouts.
        tolerance=1e-1 if dtype is torch.bfloat16 else 5e-3,
    )


_STEP: dict[str, Any] = {
    "size": {"batch": 64, "width": 32, "image_size": 32},
    "tiny": {"batch": 4, "width": 4, "image_size": 8},
    "sizes": {"batch": (1, 4, 16, 64, 128), "width": (8, 16, 32, 64), "image_size": (16, 32, 64)},
}

CASES = [
    *(
        Case(
            f"{kind}.{model}",
            f"{measures} of {model}",
            partial(_step_case, model=model, network=network),
            **_STEP,
            # Losses near zero after several steps in bfloat16 are rounding noise.
            dtypes=(torch.float32,) if (network, model) == ("both", "wgan") else (torch.float32, torch.bfloat16),
        )
        for kind, network, measures in (
            ("critic_step", "critic", "a whole critic step"),
            ("generator_step", "generator", "a whole generator step"),
            ("training_step", "both", "a whole training step: the paper's number of critic steps, a generator step,"),
        )
        for model in MODELS
    ),
]
