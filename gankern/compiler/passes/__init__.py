"""Rewrites of a derived graph, each exact by itself."""

from __future__ import annotations

from typing import Any

from torch import fx

from gankern.compiler.passes import common, convolutions, dead, layout, views, zeros


def optimise(traced: fx.GraphModule, adapter: Any) -> None:
    """Apply all passes, in place; kernels are an adapter's of the critic layers."""
    dead.forget_detach(traced.graph)
    common.share(traced.graph)
    zeros.fold(traced.graph)
    dead.drop(traced.graph)
    dead.narrow_masks(traced.graph)
    views.relax(traced.graph)
    if hasattr(adapter, "takes_conv"):
        convolutions.lower(traced.graph, adapter)
        layout.settle(traced.graph)
    traced.graph.lint()
