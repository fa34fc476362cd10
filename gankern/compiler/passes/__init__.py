"""Rewrites of a derived graph, each exact by itself."""

from __future__ import annotations

from torch import fx

from gankern.compiler.passes import common, dead, zeros


def optimise(traced: fx.GraphModule) -> None:
    """Apply all passes, in place."""
    dead.forget_detach(traced.graph)
    common.share(traced.graph)
    zeros.fold(traced.graph)
    dead.drop(traced.graph)
    dead.narrow_masks(traced.graph)
    traced.graph.lint()
