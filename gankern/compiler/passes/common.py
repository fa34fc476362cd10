"""Equal calls are made once.

    a = t(w); ...; b = t(w)    ->    a = t(w); ...

Exact: only of calls that draw no random number and neither of whose arguments nor results is ever changed in place, and
not across an update of parameters.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from gankern.compiler.passes import effects


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return (type(value), *map(_key, value))
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


def share(graph: fx.Graph) -> None:
    changed = effects.written(graph, marks=False)
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is effects.mark:
            known.clear()
        if node.op != "call_function" or not effects.is_pure(node):
            continue
        if node in changed or any(used in changed for used in node.all_input_nodes):
            continue
        key = node.target, _key(node.args), _key(node.kwargs)
        first = known.setdefault(key, node)
        if first is not node and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(first)
            graph.erase_node(node)
