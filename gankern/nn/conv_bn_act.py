"""Modules of the fused blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gankern._native import ACTIVATIONS
from gankern.nn.block import run_block
from gankern.ops import _check


class _ConvBnAct(nn.Module):
    """A convolution and its batch norm as submodules ``conv`` and ``bn``, run as one op."""

    conv: nn.Conv2d | nn.ConvTranspose2d
    bn: nn.BatchNorm2d

    def __init__(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, bn: nn.BatchNorm2d, activation: str, negative_slope: float
    ) -> None:
        super().__init__()
        _check.one_of("activation", activation, tuple(ACTIVATIONS))
        _check.number("negative_slope", negative_slope)
        self.conv, self.bn = conv, bn
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, input: Tensor) -> Tensor:
        return run_block(input, self.conv, self.bn, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation}{slope}"


class ConvTransposeBnAct2d(_ConvBnAct):
    """Transposed convolution, batch norm and activation: the DCGAN generator block.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        As in :class:`torch.nn.ConvTranspose2d`; no bias by default, since the batch norm has its own.
    eps, momentum, affine, track_running_stats
        As in :class:`torch.nn.BatchNorm2d`.
    activation : {"relu", "leaky_relu", "tanh", "none"}, optional
    negative_slope : float, optional
        Slope of leaky_relu below zero.
    device, dtype
        Of the parameters.

    Notes
    -----
    Input (N, C_in, H, W), output (N, C_out, H_out, W_out). Hooks on ``conv`` or ``bn`` make it run them one by one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, int] = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            **place,
        )
        norm = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **place)
        super().__init__(conv, norm, activation, negative_slope)


class ConvBnAct2d(_ConvBnAct):
    """Convolution, batch norm and activation: the DCGAN discriminator block.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in :class:`torch.nn.Conv2d`; no bias by default, since the batch norm has its own.
    eps, momentum, affine, track_running_stats
        As in :class:`torch.nn.BatchNorm2d`.
    activation : {"relu", "leaky_relu", "tanh", "none"}, optional
    negative_slope : float, optional
        Slope of leaky_relu below zero.
    device, dtype
        Of the parameters.

    Notes
    -----
    Input (N, C_in, H, W), output (N, C_out, H_out, W_out). Hooks on ``conv`` or ``bn`` make it run them one by one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **place)
        norm = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **place)
        super().__init__(conv, norm, activation, negative_slope)
