"""Symbolic traces of forwards as people write them, which know what they depend on.

A trace freezes what Python decided while it was made. So it is only made of code whose decisions can be told: of what
it reads, each value that may change is recorded and compared at every later call, and what cannot be recorded
(lists, the time, a random number, a side effect) is refused before it is run.
"""

from gankern.nn.tracing.guards import Guards
from gankern.nn.tracing.tracer import trace
from gankern.nn.tracing.values import Leaf, Untraceable, flatten

__all__ = ["Guards", "Leaf", "Untraceable", "flatten", "trace"]
