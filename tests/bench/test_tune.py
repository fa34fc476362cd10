"""The fastest backend of each op is found out by timing them."""

from __future__ import annotations

import pytest
import torch

import gankern
from gankern import dispatch
from gankern.bench import tune as module
from gankern.bench.cases import CASES, Case


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that run without a GPU, and one that does not."""
    monkeypatch.setattr(module, "BACKENDS", ("cuda", "cpu", "reference"))


def small(name: str) -> Case:
    case = CASES[name]
    sizes = {next(iter(case.tiny)): (2, 3)}
    return Case(case.name, case.measures, case.setup, case.tiny, case.tiny, sizes=sizes)


@pytest.mark.parametrize("fastest", ["cpu", "reference"])
def test_the_fastest_backend_at_each_size(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    on = module._on

    def taking(name: str, run: object) -> object:
        nonlocal now
        now += 1.0 if name == fastest else 2.0
        return on(name, run)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_on", taking)
    case, said = small("minibatch_discrimination.training"), []
    table = module.tune([case], dtype=torch.float32, device="cpu", repeat=3, clock=lambda: now, say=said.append)
    assert set(table) == {"minibatch_discrimination"}
    found = table["minibatch_discrimination"]["float32"]
    assert set(found.values()) == {fastest}
    left_out = [line for line in said if "left out" in line]
    results = [line for line in said if "=" in line and " ms" not in line]
    assert len(results) == 3 and all(line.endswith(fastest) for line in results)
    assert all("cuda left out: BackendUnavailable: backend 'cuda' cannot run" in line for line in left_out) and left_out
    m = torch.empty(2, *list(case.size.values())[1:])
    assert dispatch.key(m)[1] in found


def test_a_backend_that_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    on = module._on

    def wrong(name: str, run: object) -> object:
        results = on(name, run)  # type: ignore[arg-type]
        return {k: [None if t is None else t + 1 for t in v] for k, v in results.items()} if name == "cpu" else results

    monkeypatch.setattr(module, "_on", wrong)
    table = module.tune([small("l1_distance.training")], dtype=torch.float32, device="cpu", repeat=2)
    assert set(table["l1_distance"]["float32"].values()) == {"reference"}


def test_a_backend_that_memory_does_not_hold_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    on = module._on

    def too_large(name: str, run: object) -> object:
        if name == "reference":
            raise torch.OutOfMemoryError("50 GiB")
        return on(name, run)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_on", too_large)
    said: list[str] = []
    table = module.tune([small("l1_distance.training")], dtype=torch.float32, device="cpu", repeat=2, say=said.append)
    assert set(table["l1_distance"]["float32"].values()) == {"cpu"}
    assert any("reference left out: OutOfMemoryError: 50 GiB" in line for line in said)


def test_each_backend_starts_from_the_same_running_statistics() -> None:
    said: list[str] = []
    module.tune([small("batch_norm_act.training")], dtype=torch.float32, device="cpu", repeat=2, say=said.append)
    assert not [line for line in said if "relative error" in line] and any("reference" in line for line in said)


def test_other_cases_are_passed_over() -> None:
    cases = [CASES["critic_step.wgan"], CASES["batch_norm_act.forward"]]
    assert module.tune(cases, dtype=torch.float32, device="cpu") == {}
    assert gankern.explain("l1_distance", torch.ones(2, 2, 2)).chosen == "cpu"


def test_a_block_tunes_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.timing, "rounds", lambda *args, **options: pytest.fail("timed"))
    said: list[str] = []
    case = small("conv_transpose2d_bn_act.training")
    assert module.tune([case], dtype=torch.float32, device="cpu", say=said.append) == {}
    assert len([line for line in said if line.endswith(": none")]) == 1, "not at every size"


def test_what_is_known_is_kept_after_each_size_and_tf32_apart() -> None:
    kept: list[int] = []
    table = module.tune(
        [small("l1_distance.training")],
        dtype=torch.float32,
        tf32=True,
        device="cpu",
        repeat=2,
        keep=lambda table: kept.append(len(table["l1_distance"]["tf32"])),
    )
    assert len(kept) == 3 and kept == sorted(kept)
    assert set(table["l1_distance"]) == {"tf32"}
