"""The ranks of a process group that a module is given."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def check_group(name: str, value: Any) -> None:
    """Whether value is None, "world" or a process group of which this rank is a member."""
    known = value is None or (isinstance(value, str) and value == "world")
    if not known and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(f'{name} must be None, "world" or a ProcessGroup of this rank; got {value!r}')


def world_size(group: Any) -> int:
    """Ranks of the group; "world" is this process alone where torch.distributed is not initialised."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(resolved(group))


def rank(group: Any) -> int:
    """This rank's number in the group."""
    return dist.get_rank(resolved(group))


def resolved(group: Any) -> Any:
    """The group itself, where it may be called "world"."""
    return dist.group.WORLD if isinstance(group, str) else group
