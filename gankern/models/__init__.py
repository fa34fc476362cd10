"""Reference GANs, each with its paper's defaults, on gankern's ops or on stock PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gankern.arguments import closest
from gankern.models.dcgan import DCGAN
from gankern.models.gan import GAN
from gankern.models.wgan import WGAN
from gankern.models.wgan_gp import WGANGP

__all__ = ["DCGAN", "GAN", "MODELS", "WGAN", "WGANGP", "build", "from_config"]

MODELS: dict[str, type[GAN]] = {model.name: model for model in (DCGAN, WGAN, WGANGP)}


def build(name: str, *, image_size: int = 32, channels: int = 1, ops: str = "gankern", **overrides: Any) -> GAN:
    """Build a reference GAN by name.

    Parameters
    ----------
    name : str
        A key of `MODELS`: ``"dcgan"``, ``"wgan"`` or ``"wgan-gp"``.
    image_size : int
        Side of the square images, a power of two of at least 8.
    channels : int
        Channels of the images.
    ops : {"gankern", "stock"}
        Run on gankern's kernels, or on stock PyTorch.
    **overrides
        Any other argument of the model, such as ``width`` or ``batch_size``, in place of its default.

    Returns
    -------
    GAN

    Raises
    ------
    ValueError
        If the name or a setting is not valid; the message names the argument and what was received.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}{closest(str(name), MODELS)}")
    return MODELS[name](image_size=image_size, channels=channels, ops=ops, **overrides)


def from_config(config: Mapping[str, Any]) -> GAN:
    """Build the model whose `GAN.config` is `config`, with fresh parameters."""
    settings = dict(config)
    return build(settings.pop("model"), **settings)
