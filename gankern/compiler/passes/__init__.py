"""Rewrites of a derived graph, each exact by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gankern.compiler import choice, origins
from gankern.compiler.passes import (
    batch_norms,
    common,
    convolutions,
    dead,
    direct,
    effects,
    in_place,
    layout,
    views,
    zeros,
)

# In a step of the first order kernels pay where images have this part of the elements of weights (AMD EPYC, 2 cores).
_OF_WEIGHTS = 4


def optimise(traced: fx.GraphModule, adapter: Any) -> None:
    """Apply all passes, in place; kernels are an adapter's of the critic layers."""
    with origins.inherited(traced.graph):
        dead.forget_detach(traced.graph)
        written = in_place.forget(traced.graph)
        common.share(traced.graph)
        zeros.fold(traced.graph)
        dead.drop(traced.graph)
        dead.narrow_masks(traced.graph)
        views.turn_back(traced.graph)
        views.relax(traced.graph)
        if hasattr(adapter, "takes_conv"):
            convolutions.lower(traced.graph, adapter)
            layout.settle(traced.graph)
            direct.bind(traced.graph, adapter)
        in_place.put_back(traced.graph, written)
    traced.graph.lint()


def optimise_first_order(traced: fx.GraphModule, adapter: Any, norm_adapter: Any, differentiated: bool) -> int:
    """Apply those that serve a graph of the first order, in place; how many calls got faster, 0 if it does not pay.

    `differentiated`, the graph has a backward pass in it.
    """
    images, weights = _elements(traced.graph)
    with origins.inherited(traced.graph):
        dead.forget_detach(traced.graph)
        written = in_place.forget(traced.graph)
        common.share(traced.graph)
        dead.drop(traced.graph)
        dead.narrow_masks(traced.graph)
        views.turn_back(traced.graph)
        views.relax(traced.graph)
        kernels = 0
        if hasattr(adapter, "takes_conv"):
            kernels = batch_norms.fuse(traced.graph, norm_adapter)
            kernels += 0 if differentiated else batch_norms.fold(traced.graph)
            kernels += convolutions.lower(traced.graph, adapter, choice.convolution_pays)
            kernels += layout.settle(traced.graph, convolutions=True)
        in_place.put_back(traced.graph, written)
    traced.graph.lint()
    return kernels if choice.images_pay(images, 0 if differentiated else weights) else 0


def optimise_step(
    traced: fx.GraphModule, adapter: Any = None, norm_adapter: Any = None, *, folds: bool = False, second_order: bool
) -> int:
    """Apply those that serve a whole training step, in place; without kernels where there are no adapters.

    `folds`, zeros fall away that come before the first update; `second_order`, it has a penalty in it. Returns how many
    calls got faster.
    """
    images, weights = _elements(traced.graph)
    with origins.inherited(traced.graph):
        written = in_place.forget(traced.graph)
        common.share(traced.graph)
        if folds:
            zeros.fold(traced.graph)
        dead.drop(traced.graph)
        dead.narrow_masks(traced.graph)
        views.turn_back(traced.graph)
        views.relax(traced.graph)
        kernels = 0
        if hasattr(adapter, "takes_conv") and (second_order or choice.images_pay(images, weights // _OF_WEIGHTS)):
            kernels = batch_norms.fuse(traced.graph, norm_adapter)
            kernels += convolutions.lower(traced.graph, adapter, choice.convolution_pays)
            # What it turns back at the ends are gradients of weights, too.
            kernels += max(layout.settle(traced.graph, convolutions=True), 0)
        in_place.put_back(traced.graph, written)
    traced.graph.lint()
    return kernels


def _elements(graph: fx.Graph) -> tuple[int, int]:
    """Elements of the images that a graph's convolutions leave, and of their weights."""
    forwards = [node for node in graph.nodes if node.target is torch.ops.aten.convolution.default]
    images = sum(node.meta["val"].numel() for node in forwards)
    return images, sum(effects.arguments(node)[1].meta["val"].numel() for node in forwards)
