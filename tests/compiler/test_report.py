"""What explain, fusion_report and the profiler tell of a plan: the kernel and the line of code of each call."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern import _native, penalties
from gankern.compiler import forward, fused, replay, report
from gankern.compiler.cache import MOST_PLANS, Plans, known_plans
from gankern.compiler.passes import effects
from gankern.compiler.report import Call
from tests.compiler.test_fused_plan import NETWORKS
from tests.compiler.test_penalty_plan import GP, Alpha, Branches, agrees, conv_critic, images, planned

HERE = Path(__file__).name


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1)
        self.norm, self.head = nn.LayerNorm([2, 8, 8]), nn.Linear(2, 1)
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = F.leaky_relu(h, 0.2)
        h = self.b(h)
        h = self.norm(h)
        h = self.body(h)
        return self.head(h.sum((2, 3)))


def line(text: str, of: Any = Critic.forward) -> str:
    """Where some text is in a function of this file."""
    lines, first = inspect.getsourcelines(of)
    (found,) = (first + i for i, line in enumerate(lines) if text in line)
    return f"{HERE}:{found}"


LINES = {"a": "self.a(x)", "b": "self.b(h)", "norm": "self.norm(h)", "body.0": "self.body(h)", "body.1": "self.body(h)"}
LINES |= {"head": "self.head(h"}


def calls() -> tuple[Call, ...]:
    critic, plans = Critic(), Plans()
    planned(plans, critic, images().float(), (), list(critic.parameters()), GP)
    return plans.calls


def ends_in(lines: str, line: str) -> bool:
    file, number = line.split(":")
    return any(re.search(rf"{file}:(.*, )?{number}(,|$)", part) for part in lines.split("; "))


def test_each_call_of_a_penalty_has_its_line_and_module_in_both_derivatives() -> None:
    found = calls()
    for module, text in LINES.items():
        orders = {call.order for call in found if call.module == module}
        assert orders == {0, 1, 2}, module
        assert all(ends_in(call.lines, line(text)) for call in found if call.module == module)
    leaky = [call for call in found if ends_in(call.lines, line("F.leaky_relu"))]
    assert {call.order for call in leaky} == {0, 1, 2}
    # What the penalty itself does stands for the line that asks for it.
    (tail,) = (call for call in found if call.kernel == "penalty_tail")
    assert re.search(r"test_penalty_plan\.py:\d+$", tail.lines) and not tail.module


def test_kernels_are_named_with_who_runs_them() -> None:
    found = [call for call in calls() if call.order == 0 and call.module in ("a", "norm")]
    conv, norm = found
    if conv.by == "cpu":
        assert conv.kernel == "conv + leaky_relu" and (norm.kernel, norm.by) == ("layer_norm", "cpu")
        assert [ends_in(conv.lines, line(text)) for text in ("self.a(x)", "F.leaky_relu")] == [True, True]
    else:
        assert (conv.kernel, conv.by, norm.kernel) == ("convolution", "torch", "layer_norm")


@pytest.mark.parametrize("name", NETWORKS)
def test_new_nodes_of_passes_know_where_they_are_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    cut = forward._cut
    monkeypatch.setattr(forward, "_cut", lambda traced, *rest: graphs.append(traced.graph) or cut(traced, *rest))
    make, shape = NETWORKS[name]
    net, x = gankern.fuse(make()), torch.randn(shape)
    net(x).sum().backward()
    critic, plans = make(), Plans()
    if shape[1:] == (2, 8, 8):
        planned(plans, critic, x, (), list(critic.parameters()), GP)
        graphs.append(plans.plans[0].graph.graph)
    for graph in graphs:
        nodes = [node for node in graph.nodes if node.op == "call_function" and not effects.views(node)]
        assert nodes and all("origin" in node.meta or "also" in node.meta for node in nodes)
    assert all(call.lines for call in fused.known_plans(net).calls)


def test_a_function_names_the_modules_that_it_closes_over() -> None:
    critic, plans = Critic(), Plans()

    def scores(x: Tensor) -> Tensor:
        return critic(x) * 2

    planned(plans, scores, images().float(), (), list(critic.parameters()), GP)
    lines = {call.lines for call in plans.calls if call.kernel == "mul"}
    assert any(ends_in(found, line("* 2", scores)) for found in lines)
    assert any("norm" in call.module for call in plans.calls if "norm" in call.kernel)


class Keeps(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return super().forward(x)


class Raises(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided(x.shape, x.stride()))


class Prints(Alpha):
    def forward(self, x: Tensor) -> Tensor:
        y = float(x.detach().sum())
        return super().forward(x) * y


@pytest.mark.parametrize(
    ("make", "text"),
    [(Branches, "x.mean() > 0"), (Keeps, "self.seen"), (Raises, "as_strided"), (Prints, "float(x")],
    ids=["branch", "attribute", "strides", "value"],
)
def test_what_could_not_be_captured_is_told_with_its_line(make: Callable[[], nn.Module], text: str) -> None:
    critic, x = make().double(), torch.randn(3, 4, dtype=torch.float64)
    penalties.r1(critic, x).backward()
    found = gankern.explain(penalties.r1, critic, x)
    lines, first = inspect.getsourcelines(type(critic).forward)
    number = first + next(i for i, line in enumerate(lines) if text in line)
    file = Path(inspect.getsourcefile(type(critic)) or "").name
    assert re.search(rf"none for some calls: .*, at \S*{file}:{number}(;|$)", str(found.plan)), found.plan


def test_explain_has_a_table_that_fits_and_the_facts_of_the_cache() -> None:
    critic, x = Critic(), images().float()
    for _ in range(2):
        penalties.r1(critic, x).backward()
    found = gankern.explain(penalties.r1, critic, x)
    assert found.calls == known_plans(critic).calls and found.plan == "1 made, 1 hits, 0 evicted"
    table = str(found).splitlines()[-len(list(report.as_lines(found.calls))) :]
    assert table[0].split() == ["pass", "kernel", "by", "where", "module", "n"]
    assert max(map(len, table)) <= 80
    # Equal lines are one, with their number.
    assert sum(int(row.split()[-1]) for row in table[1:] if row[-1].isdigit()) == len(found.calls)
    head, rows = "", []
    for row in table[1:]:
        head = row[:8].strip() or head
        rows.append((head, row[8:]))
    assert {head for head, _ in rows} >= set(report.PASSES) and len(set(rows)) == len(rows)


def test_fusion_report_and_explain_tell_of_a_fused_modules_plans() -> None:
    net = gankern.fuse(nn.Sequential(nn.Conv2d(2, 16, 3, 1, 1), nn.ReLU(True), nn.Conv2d(16, 2, 3, 1, 1, groups=2)))
    plans = fused.plans_of(net)
    plans.hits = 10_000
    for n in range(1, MOST_PLANS + 2):
        net(torch.randn(n, 2, 8, 8)).sum().backward()
    net(torch.randn(n, 2, 8, 8))
    (run,) = found = gankern.fusion_report(net)
    assert run.plans == f"{MOST_PLANS + 1} made, 10001 hits, 1 evicted"
    assert {call.module for call in run.calls} >= {"0", "2"}
    told = str(found)
    assert run.plans in told and "conv" in told
    assert _native.kernels is None or "torch's convolution: no kernel for its sizes or groups" in told
    assert max(map(len, told.splitlines())) <= 80
    explained = gankern.explain(gankern.fuse, net)
    assert explained.chosen == "plans" and run.plans in str(explained)
    net[0].register_forward_hook(lambda *_: None)
    net(torch.randn(n, 2, 8, 8))
    assert "hook" in str(gankern.explain("fuse", net))


def test_timed_replays_tell_of_each_call_and_leave_the_program_as_it_was() -> None:
    critic, x = conv_critic(nn.BatchNorm2d(4)), images()
    plans = agrees(critic, x)
    net = gankern.fuse(copy.deepcopy(critic).float())
    net(x.float()).sum().backward()
    (penalty,), (whole,) = plans.plans, fused.known_plans(net).plans
    programs = penalty._run, whole._forward, whole._backward
    sources = [program.source for program in programs]
    told: list[Call | None] = []
    with replay.timed([penalty, whole], told.append):
        agrees(critic, x, plans=plans)
        assert told == [None, *report.calls_of(penalty)]
        told.clear()
        net(x.float()).sum().backward()
    assert told == [None, *whole._forward.calls, None, *whole._backward.calls]
    assert [program.source for program in programs] == sources
    told.clear()
    agrees(critic, x, plans=plans)
    assert not told


def test_the_profiler_attributes_phases_to_calls_of_plans() -> None:
    critic = gankern.fuse(Critic())
    x = images().float()
    with gankern.profile.critic_steps(steps=2) as prof:
        for _ in range(9):
            with prof.step():
                with prof.phase("real forward"):
                    scores = critic(x).mean()
                with prof.phase("penalty"):
                    loss = scores + gankern.gradient_penalty(critic, x, x + 1)
                with prof.phase("backward"):
                    loss.backward()
    found = prof.profile()
    (plan,), (whole,) = known_plans(critic).plans, fused.known_plans(critic).plans
    by_phase: dict[str, int] = {}
    for call in found.plan_calls:
        assert call.seconds > 0
        by_phase[call.phase] = by_phase.get(call.phase, 0) + call.calls
    assert by_phase == {
        "penalty/plan": len(report.calls_of(plan)),
        "real forward": len(whole._forward.calls),
        "backward": len(whole._backward.calls),
    }
    assert any(ends_in(call.lines, line("self.norm(h)")) for call in found.plan_calls if call.phase == "penalty/plan")
    told = str(prof.report("my critic"))
    # The table holds those that take the longest, which is chance here, and wraps its lines.
    longest = max(found.plan_calls, key=lambda call: call.seconds)
    assert longest.kernel.split(",")[0] in told, longest
    assert any(call.kernel.startswith("layer_norm_double_backward") for call in found.plan_calls)
