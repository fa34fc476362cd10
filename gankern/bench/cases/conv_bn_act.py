"""Convolution, batch norm and activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gankern.bench import stock
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


def _norm_case(
    size: Size,
    dtype: torch.dtype,
    device: str,
    *,
    conv: str | None,
    training: bool,
    backward: bool,
) -> Sides:
    """Sides of [convolution +] batch norm + ReLU; `conv` names the op, as torch does, or is None."""
    from gankern.ops.conv_transpose_bn_act import reference

    n, c, h = size["batch"], size["channels"], size["image_size"]
    tensors = {"input": random_tensor(n, c, h, h, dtype=dtype, device=device)}
    outputs = c
    options: dict[str, Any] = {}
    if conv is not None:
        outputs = size["outputs"]
        shape = (c, outputs, 4, 4) if conv == "conv_transpose2d" else (outputs, c, 4, 4)
        tensors["weight"] = random_tensor(*shape, dtype=dtype, device=device, scale=0.05)
        options = {"stride": 2, "padding": 1}
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    tensors |= {
        "bn_weight": 1 + random_tensor(outputs, scale=0.1, **f32),
        "bn_bias": random_tensor(outputs, scale=0.1, **f32),
    }
    statistics = [random_tensor(outputs, scale=0.1, **f32), 1 + random_tensor(outputs, scale=0.1, **f32).abs()]
    oracle = reference.batch_norm_act if conv is None else getattr(reference, f"{conv}_bn_act")
    op = gankern().ops.batch_norm_act if conv is None else getattr(gankern().ops, f"{conv}_bn_act")

    def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Mapping[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
            weights = () if conv is None else (t["weight"], None)
            args = (t["input"], *weights, mean, var, t["bn_weight"], t["bn_bias"])
            return function(*args, **options, training=training, activation="relu")

        return call

    def unfused(t: Mapping[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
        x = t["input"]
        if conv is not None:
            x = getattr(torch.nn.functional, conv)(x, t["weight"], **options)
        return stock.batch_norm_relu(x, mean, var, t["bn_weight"], t["bn_bias"], training)

    with torch.no_grad():
        output = unfused(tensors, *(s.clone() for s in statistics))
    grad_output = random_tensor(*output.shape, dtype=dtype, device=device)

    def side(
        function: Callable[..., Tensor],
        to: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: bool = False,
    ) -> Run:
        def prepared(t: Tensor) -> Tensor:
            form = memory_format if t.dim() == 4 else torch.preserve_format
            return t.detach().to(to or t.dtype, memory_format=form, copy=True)

        own = {name: prepared(t).requires_grad_(backward) for name, t in tensors.items()}
        state = [prepared(s) for s in statistics]

        def call() -> Tensor:
            with under_autocast(device, autocast):
                return function(own, *state)

        if not backward:
            return forward(call)
        arriving = grad_output.to(dtype if autocast else to or dtype, memory_format=memory_format)
        return forward_backward(call, own, arriving, state)

    variants = {
        "eager": side(unfused),
        "channels_last": side(unfused, memory_format=torch.channels_last),
        "compile": side(torch.compile(unfused, dynamic=False)),
    }
    if dtype is torch.bfloat16 and conv is not None:
        variants["autocast"] = side(unfused, to=torch.float32, autocast=True)
    return Sides(
        reference=side(fused(oracle), to=torch.float64),
        stock=variants,
        ours={OURS: side(fused(op)), OURS_CHANNELS_LAST: side(fused(op), memory_format=torch.channels_last)},
        work=n,
        unit="images",
        tolerance=TOLERANCE[dtype],
        moved_bytes=least_bytes(tensors.values(), output, backward=backward),
    )


def _conv_sizes(channels: int, outputs: int, image_size: int) -> dict[str, Any]:
    return {
        "size": {"batch": 64, "channels": channels, "outputs": outputs, "image_size": image_size},
        "tiny": {"batch": 3, "channels": 5, "outputs": 4, "image_size": 6},
        "sizes": {"batch": (8, 16, 32, 64, 128), "channels": (32, 64, 128, 256), "image_size": (4, 8, 16, 32)},
    }


_NORM: dict[str, Any] = {
    "size": {"batch": 64, "channels": 64, "image_size": 32},
    "tiny": {"batch": 3, "channels": 5, "image_size": 7},
    "sizes": {"batch": (8, 16, 32, 64, 128), "channels": (16, 32, 64, 128), "image_size": (8, 16, 32, 64)},
}


_norm = partial(partial, _norm_case)

CASES = [
    Case(
        "batch_norm_act.forward",
        "batch norm + ReLU, inference",
        _norm(conv=None, training=False, backward=False),
        **_NORM,
    ),
    Case(
        "batch_norm_act.training",
        "batch norm + ReLU, forward and backward",
        _norm(conv=None, training=True, backward=True),
        **_NORM,
    ),
    Case(
        "conv_transpose2d_bn_act.forward",
        "a generator block, inference",
        _norm(conv="conv_transpose2d", training=False, backward=False),
        **_conv_sizes(128, 64, 8),
    ),
    Case(
        "conv_transpose2d_bn_act.training",
        "a generator block, forward and backward",
        _norm(conv="conv_transpose2d", training=True, backward=True),
        **_conv_sizes(128, 64, 8),
    ),
    Case(
        "conv2d_bn_act.training",
        "a discriminator block, forward and backward",
        _norm(conv="conv2d", training=True, backward=True),
        **_conv_sizes(64, 128, 16),
    ),
]
