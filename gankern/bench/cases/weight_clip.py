"""Weight clipping, alone and within RMSProp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gankern.bench import stock
from gankern.bench.cases.case import (
    TOLERANCE,
    Case,
    Run,
    Sides,
    Size,
    gankern,
    random_tensor,
)
from gankern.bench.check import Results
from gankern.bench.results import OURS

CLIP = 0.01


def _critic_parameters(size: Size, dtype: torch.dtype, device: str) -> list[Tensor]:
    w = size["width"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    convs = [(w, 3, 4, 4), (2 * w, w, 4, 4), (4 * w, 2 * w, 4, 4), (8 * w, 4 * w, 4, 4), (1, 8 * w, 4, 4)]
    norms = [(i * w,) for i in (2, 4, 8) for _ in ("weight", "bias")]
    return [random_tensor(*shape, scale=0.02, **like) for shape in [*convs, *norms]]


def _weights_case(size: Size, dtype: torch.dtype, device: str, *, optimizer: bool) -> Sides:
    """Sides of weight clipping, alone or after an RMSProp step, over a DCGAN critic's parameters."""
    params = _critic_parameters(size, dtype, device)
    gradients = [torch.randn_like(p) for p in params]

    capturable = optimizer and torch.device(device).type == "cuda"

    def side(clip: Callable[..., object] | None, to: torch.dtype = dtype, **options: Any) -> Run:
        """Clip copies of the parameters; with `clip` None, gankern's optimizer does it within its step."""
        own = [nn.Parameter(p.detach().to(to, copy=True)) for p in params]
        for p, g in zip(own, gradients, strict=True):
            p.grad = g.to(to)
        if not optimizer:
            step = None
        elif clip is None:
            step = gankern().optim.RMSprop(own, lr=5e-5, clip=CLIP).step
        else:
            step = torch.optim.RMSprop(own, lr=5e-5, **options).step

        def run() -> Results:
            if step is not None:
                step()
            if clip is not None:
                clip(own, CLIP)
            return {"parameters": own}

        return run

    return Sides(
        reference=side(stock.clip_loop, torch.float64, foreach=False),
        stock={
            "eager": side(stock.clip_loop, foreach=False),
            "foreach": side(stock.clip_foreach, foreach=True),
            # What a CUDA graph needs.
            **({"capturable": side(stock.clip_foreach, foreach=True, capturable=True)} if capturable else {}),
        },
        ours={OURS: side(None if optimizer else gankern().clip_weights_)},
        work=sum(p.numel() for p in params),
        unit="elements",
        tolerance=TOLERANCE[dtype],
        # Parameters are read and written; in a step gradients are read, and averages read and written.
        moved_bytes=sum(p.numel() for p in params) * dtype.itemsize * (5 if optimizer else 2),
    )


_WEIGHTS: dict[str, Any] = {"size": {"width": 64}, "tiny": {"width": 3}, "sizes": {"width": (8, 16, 32, 64, 128)}}

CASES = [
    Case(
        "clip_weights.step",
        "clipping a DCGAN critic's weights in place",
        partial(_weights_case, optimizer=False),
        **_WEIGHTS,
    ),
    Case(
        "rmsprop_clip.step",
        "RMSProp with clipping on a DCGAN critic",
        partial(_weights_case, optimizer=True),
        **_WEIGHTS,
        dtypes=(torch.float32,),
    ),
]
