"""The minibatch standard deviation layer."""

from __future__ import annotations

from torch import Tensor, nn

from gankern import ops
from gankern.ops.minibatch_stddev import check_options


class MinibatchStdDev(nn.Module):
    """Appends to each sample's channels the standard deviation over its group of samples.

    Parameters
    ----------
    group_size : int, optional
        Samples of a group; the whole batch where it has fewer.
    num_channels : int, optional
        Channels to append.
    eps : float, optional
        Greater than 0: added to the variance.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Input (N, C, H, W), output (N, C + num_channels, H, W); no parameters. See :func:`gankern.ops.minibatch_stddev`
    for the formula, the groups and the dtypes.

    References
    ----------
    Karras, Aila, Laine and Lehtinen, "Progressive Growing of GANs for Improved Quality, Stability, and Variation",
    2018, section 3.

    Examples
    --------
    >>> MinibatchStdDev(group_size=4)(torch.randn(8, 16, 4, 4)).shape
    torch.Size([8, 17, 4, 4])
    """

    def __init__(self, group_size: int = 4, num_channels: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        check_options(group_size, num_channels, eps)
        self.group_size, self.num_channels, self.eps = group_size, num_channels, eps

    def forward(self, input: Tensor) -> Tensor:
        return ops.minibatch_stddev(input, self.group_size, self.num_channels, self.eps)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}, eps={self.eps}"
