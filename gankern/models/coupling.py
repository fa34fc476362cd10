"""Whether a critic's score of one image depends on the other images of its batch."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.nn.block import has_hooks
from gankern.nn.fuse import stock_class

_KNOWN: frozenset[type[nn.Module]] = frozenset().union(
    {nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish},
    {nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh},
    {nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LayerNorm, nn.GroupNorm},
    {nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle},
)


def couples_samples(critic: nn.Module) -> bool:
    """Whether a critic may couple the samples of a batch, or change with every call.

    Parameters
    ----------
    critic : nn.Module

    Returns
    -------
    bool
        False only where every module is known to treat each sample by itself: sequentials of torch's convolutions,
        linear layers, activations, pooling, layer and group norm, and batch norm and dropout in evaluation mode. True
        for anything else, since a ``forward`` of its own may do anything: minibatch discrimination, batch norm and
        dropout in training mode, spectral norm (a step of its power iteration a call), modules with hooks.
    """
    return not _per_sample(critic, last=True)


def _per_sample(module: nn.Module, *, last: bool) -> bool:
    # Exact types: a subclass or a parametrized module is not what its base is.
    kind = type(module)
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    if stock_class(kind) is nn.Sequential:
        children = list(module.children())
        return all(_per_sample(child, last=last and child is children[-1]) for child in children)
    if isinstance(module, nn.Flatten):
        # Flattening the batch as well keeps scores apart, but not what another layer would mix.
        return kind is nn.Flatten and (module.start_dim > 0 or last)
    if isinstance(module, _BatchNorm):
        known = kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return known and not module.training and module.running_mean is not None
    if kind in (nn.Dropout, nn.Dropout2d):
        return not module.training
    return kind in _KNOWN
