"""Convolution and activation: a critic's layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.bench.cases.case import (
    OURS_CHANNELS_LAST,
    TOLERANCE,
    Case,
    Run,
    Sides,
    Size,
    forward,
    forward_backward,
    gankern,
    least_bytes,
    random_tensor,
    under_autocast,
)
from gankern.bench.results import OURS


def _case(size: Size, dtype: torch.dtype, device: str, *, backward: bool) -> Sides:
    n, c, outputs, h = size["batch"], size["channels"], size["outputs"], size["image_size"]
    tensors = {
        "input": random_tensor(n, c, h, h, dtype=dtype, device=device),
        "weight": random_tensor(outputs, c, 4, 4, dtype=dtype, device=device, scale=0.05),
        "bias": random_tensor(outputs, dtype=dtype, device=device, scale=0.1),
    }
    grad_output = random_tensor(n, outputs, h // 2, h // 2, dtype=dtype, device=device)

    def stock(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.leaky_relu(F.conv2d(input, weight, bias, 2, 1), 0.2)

    def side(
        function: Callable[..., Tensor],
        to: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: bool = False,
    ) -> Run:
        def prepared(t: Tensor) -> Tensor:
            form = memory_format if t.dim() == 4 else torch.preserve_format
            return t.detach().to(to or t.dtype, memory_format=form, copy=True).requires_grad_(backward)

        own = {name: prepared(t) for name, t in tensors.items()}

        def call() -> Tensor:
            with under_autocast(device, autocast):
                return function(**own)

        if not backward:
            return forward(call)
        arriving = grad_output.to(dtype if autocast else to or dtype, memory_format=memory_format)
        return forward_backward(call, own, arriving)

    variants = {
        "eager": side(stock),
        "channels_last": side(stock, memory_format=torch.channels_last),
        "compile": side(torch.compile(stock, dynamic=False)),
    }
    if dtype is torch.bfloat16:
        variants["autocast"] = side(stock, to=torch.float32, autocast=True)
    ours: Callable[..., Tensor] = partial(gankern().ops.conv2d_act, stride=2, padding=1)
    return Sides(
        reference=side(stock, to=torch.float64),
        stock=variants,
        ours={OURS: side(ours), OURS_CHANNELS_LAST: side(ours, memory_format=torch.channels_last)},
        work=n,
        unit="images",
        tolerance=TOLERANCE[dtype],
        moved_bytes=least_bytes(tensors.values(), grad_output, backward=backward),
    )


_SIZES: dict[str, Any] = {
    "size": {"batch": 64, "channels": 64, "outputs": 128, "image_size": 16},
    "tiny": {"batch": 3, "channels": 5, "outputs": 4, "image_size": 6},
    "sizes": {"batch": (8, 16, 32, 64, 128), "channels": (16, 32, 64, 128), "image_size": (8, 16, 32)},
}

CASES = [
    Case("conv2d_act.forward", "a critic's layer, inference", partial(_case, backward=False), **_SIZES),
    Case("conv2d_act.training", "a critic's layer, forward and backward", partial(_case, backward=True), **_SIZES),
]
