"""Every case that gankern measures itself by, defined once: a file for each op room, one for training steps."""

from __future__ import annotations

from collections.abc import Sequence

from gankern.bench.cases import conv_act, conv_bn_act, gradient_penalty, minibatch_discrimination, training, weight_clip
from gankern.bench.cases.case import OURS_CHANNELS_LAST, TOLERANCE, Case, Run, Sides, Size

__all__ = ["CASES", "OURS_CHANNELS_LAST", "TOLERANCE", "Case", "Run", "Sides", "Size", "select"]

# In the order in which they run and are listed.
_ROOMS = (conv_bn_act, conv_act, minibatch_discrimination, gradient_penalty, weight_clip, training)

CASES: dict[str, Case] = {case.name: case for room in _ROOMS for case in room.CASES}


def select(names: Sequence[str]) -> list[Case]:
    """Return the cases of these names or groups; all op cases where there are none.

    Raises
    ------
    KeyError
        With a name that is neither.
    """
    if not names:
        return [case for case in CASES.values() if case.is_op]
    chosen: dict[str, Case] = {}
    for name in names:
        found = {case.name: case for case in CASES.values() if name in (case.name, case.group)}
        if not found:
            raise KeyError(name)
        chosen |= found
    return list(chosen.values())
