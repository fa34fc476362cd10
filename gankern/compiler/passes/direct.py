"""Norms are called as their adapter's functions.

    y, mean, rstd = gankern.layer_norm(x, w, b, 1, 1e-5)    ->    y, mean, rstd = layer_norm(adapter, x, w, b, 1, 1e-5)

Exact: an operator chooses the same adapter each time as long as the plan holds. The choice and the dispatcher take as
long as a small norm itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import fx

from gankern.compiler import norms


def bind(graph: fx.Graph, adapter: Any) -> None:
    for node in graph.nodes:
        if node.target in norms.IMPLEMENTATIONS and not adapter.refuse(*(n.meta["val"] for n in node.all_input_nodes)):
            node.target = partial(norms.IMPLEMENTATIONS[node.target], adapter)
