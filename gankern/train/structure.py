"""Whether what a checkpoint holds is built as what it is loaded into."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gankern.train.errors import CheckpointError, shown


def check_like(found: object, expected: object, where: str) -> None:
    """Raise CheckpointError, naming the entry, unless keys, lengths, types, shapes and dtypes are the same."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype, found.layout) == (
            expected.shape,
            expected.dtype,
            expected.layout,
        )
        if not same or found.is_meta:  # type: ignore[attr-defined]
            raise CheckpointError(f"{where}: expected {shown(expected)}, found {shown(found)}")
    elif isinstance(expected, Mapping):
        check_keys(found, expected, where)
        for name, value in expected.items():
            check_like(found[name], value, f"{where}.{name}")  # type: ignore[index]
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise CheckpointError(f"{where}: expected {len(expected)} values, found {shown(found)}")
        for index, (part, value) in enumerate(zip(found, expected, strict=True)):
            check_like(part, value, f"{where}.{index}")
    elif _kind(found) is not _kind(expected):
        raise CheckpointError(f"{where}: expected a value like {shown(expected)}, found {shown(found)}")


def check_keys(found: object, expected: Mapping[Any, Any], where: str) -> None:
    """Raise CheckpointError unless `found` is a dictionary of just the keys that are `expected`."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: expected a dictionary, found {shown(found)}")
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{where}.{name}: expected an entry, found nothing")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where}.{str(name)[:60]!r}: expected no such entry")


def check_optimizer(found: object, optimizer: Optimizer, without: object, where: str) -> None:
    """Raise CheckpointError unless `found` is a state that this optimizer can go on from.

    Parameters
    ----------
    found : object
        What the checkpoint holds.
    optimizer : Optimizer
    without : object
        Indices of the parameters that had no state when it was written; None where it was not noted.
    where : str
        The file and the entry in it.
    """
    check_keys(found, {"state": None, "param_groups": None}, where)
    groups, state = found["param_groups"], found["state"]  # type: ignore[index]
    expected = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(expected):
        raise CheckpointError(f"{where}.param_groups: expected a list of {len(expected)}, found {shown(groups)}")
    for index, group in enumerate(groups):
        _check_group(group, expected[index], f"{where}.param_groups.{index}")
    reference = _after_a_step(optimizer)
    if without is None:
        without = list(reference)
    if not isinstance(without, list):
        raise CheckpointError(f"{where}: stateless: expected indices of parameters, found {shown(without)}")
    kept = state if isinstance(state, dict) else {}
    check_keys(state, {i: None for i in reference if i not in without or i in kept}, f"{where}.state")
    for index, entry in state.items():
        check_like(entry, reference[index], f"{where}.state.{index}")


def stateless(optimizer: Optimizer) -> list[int]:
    """Indices of the parameters that have no state: they never had a gradient."""
    saved = optimizer.state_dict()
    return [i for group in saved["param_groups"] for i in group["params"] if i not in saved["state"]]


def _check_group(group: object, expected: Mapping[str, Any], where: str) -> None:
    def is_switch(value: object) -> bool:
        return value is None or isinstance(value, bool)

    # One torch has switches that another lacks.
    switches = {name for name, value in expected.items() if is_switch(value)}
    if isinstance(group, dict):
        switches |= {name for name, value in group.items() if name not in expected and is_switch(value)}
        for name in switches & group.keys():
            if not is_switch(group[name]):
                raise CheckpointError(f"{where}.{name}: expected true, false or none, found {shown(group[name])}")
        group = {name: value for name, value in group.items() if name not in switches}
    check_like(group, {name: value for name, value in expected.items() if name not in switches}, where)
    if group["params"] != expected["params"]:  # type: ignore[index]
        raise CheckpointError(f"{where}.params: expected {shown(expected['params'])}, found others")


def _after_a_step(optimizer: Optimizer) -> dict[int, Any]:
    """The state that this optimizer keeps of each parameter."""
    optimizer = copy.deepcopy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()["state"]


def _kind(value: object) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)
