"""What to do about a profile, in words; every number in them was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

import gankern
from gankern.bench.own import CLIP
from gankern.bench.results import OURS, STOCK
from gankern.bench.timing import Spread
from gankern.profile.measure import Measurement
from gankern.profile.results import Advice, Phase, StepProfile, describe_saving
from gankern.profile.sides import Side

PENALTY = "gankern.gradient_penalty"
# Shares of a step from which on something is worth a line.
_WORTH_SAYING = 0.1


def advise(measured: Measurement, ceilings: dict[str, float]) -> list[Advice]:
    """Say what to change, largest saving first, then what there is to know."""
    profiles = measured.profiles()
    if STOCK not in profiles or OURS not in profiles:
        return []
    stock, side = profiles[STOCK], measured.sides[OURS]
    changes = list(_changes(measured, stock))
    changes.sort(key=lambda advice: -(advice.saves_seconds or 0))
    return [*changes, *_of_the_step(profiles[OURS], ceilings), *_of_the_critic(side)]


def _changes(measured: Measurement, stock: StepProfile) -> Iterator[Advice]:
    """Each change by itself, then all together, as they were measured."""
    made = measured.sides[OURS].changes
    singles = [name for name in ("penalty", "fused", "optimizer") if getattr(made, name)]
    for name in singles:
        saving = measured.saving(name if name in measured.sides else OURS)
        if saving is not None:
            yield _change(_about(name, measured, stock), _DO[name], saving, stock.seconds.median)
    if len(singles) > 1:
        saving = measured.saving(OURS)
        if saving is not None:
            yield _change("", "All of gankern together", saving, stock.seconds.median)


_DO = {
    "penalty": PENALTY,
    "fused": "gankern.fuse(critic)",
    "optimizer": f"gankern.optim.RMSprop(..., clip={CLIP})",
}


def _change(about: str, do: str, saving: Spread, step: float) -> Advice:
    effect = describe_saving(do, saving, step, "the step")
    return Advice(f"{about}; {effect}" if about else effect, saving.median)


def _about(name: str, measured: Measurement, stock: StepProfile) -> str:
    step = stock.mean_seconds
    if name == "penalty":
        about = f"The gradient penalty is {stock.seconds_of('penalty') / step:.0%} of the stock step"
        second = stock.phase("penalty/double backward")
        return about + _of_the_double_backward(second, step) if second else about
    if name == "optimizer":
        count = sum(1 for _ in measured.sides[STOCK].critic.parameters())
        share = stock.seconds_of("optimizer") / step
        return f"Weights are clipped tensor by tensor, {count} of them; optimizer and clip are {share:.0%} of the step"
    runs = [run for run in gankern.fusion_report(measured.sides[OURS].critic) if run.reason is None]
    share = stock.seconds_of("real forward", "fake forward", "backward") / step
    return f"{len(runs)} runs of the critic's layers can fuse; its forward and backward are {share:.0%} of the step"


def _of_the_double_backward(phase: Phase, step: float) -> str:
    """The double backward of the kinds of layers that take the most of it."""
    shares = {_layer(node): share * phase.seconds / step for node, share in phase.nodes.items()}
    said = [
        f"{layer}'s double backward {share:.0%}" for layer, share in shares.items() if layer and share >= _WORTH_SAYING
    ]
    return ", " + ", ".join(said) if said else ""


def _layer(node: str) -> str | None:
    """The layer of an autograd node of second order: "layer norm" of "NativeLayerNormBackwardBackward0"."""
    match = re.fullmatch(r"(?:Native|Cudnn|Mkldnn)?(\w+?)BackwardBackward\d+", node)
    return re.sub(r"(?<!^)(?=[A-Z])", " ", match[1]).lower() if match else None


def _of_the_step(ours: StepProfile, ceilings: dict[str, float]) -> Iterator[Advice]:
    step = ours.mean_seconds
    calls = sum(phase.calls or 0 for phase in ours.phases)
    cost = calls * ceilings["call_seconds"]
    if cost > 0.4 * step:
        way = "gankern.capture makes it one CUDA graph" if ours.device != "cpu" else "a larger batch costs little more"
        yield Advice(
            f"Calls are {cost / step:.0%} of the gankern step: {calls} operators at "
            f"{ceilings['call_seconds'] * 1e6:.1f} us each; {way}"
        )
    for name, what in (("data", "The batch"), ("generator forward", "The generator")):
        share = ours.seconds_of(name) / step
        if share >= 2 * _WORTH_SAYING:
            yield Advice(f"{what} takes {share:.0%} of the gankern step")


def _of_the_critic(side: Side) -> Iterator[Advice]:
    found = side.explain()
    if found is None:
        return
    if any("BatchNorm" in type(module).__name__ and module.training for module in side.critic.modules()):
        yield Advice(
            "The critic has batch norm: the penalty couples the samples of a batch (Gulrajani et al. 2017, section 4, "
            "use layer norm)"
        )
    if found.reason is not None:
        plans = found.plan or "not asked for"
        yield Advice(f"{PENALTY} runs the critic by a plan or stock autograd: {found.reason}; plans: {plans}")
    for name, calls in found.stock.items():
        yield Advice(f"{PENALTY} leaves {name} ({calls} in the critic) to stock autograd")
