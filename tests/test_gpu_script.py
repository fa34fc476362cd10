"""benchmarks/gpu.sh, rehearsed where there is no GPU and nothing that the GPU machine lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rehearse(out: Path, **environment: str) -> dict[str, str]:
    """How each part of the script ended; results are in `out`."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("LD_PRELOAD", "PYTEST_", "TRITON_INTERPRET"))}
    given |= {"PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", str(out)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    found = dict(re.findall(r"^([\w-]+): (ok|CUT OFF|FAILED|left out)", done.stdout, re.MULTILINE))
    assert done.returncode == (0 if set(found.values()) == {"ok"} else 1)
    return found


def load(file: Path) -> object:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def seconds() -> float:
    """What it takes a process to start here and now: limits follow a busy machine."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch._dynamo, gankern.ops, gankern.bench.cli"], check=True, cwd=ROOT)
    return time.perf_counter() - start


@pytest.mark.timeout(1200)
def test_what_hangs_is_cut_off_and_the_rest_survives(tmp_path: Path, seconds: float) -> None:
    """One smoke process that Ctrl-C does not stop, and the second case of a benchmark."""
    limit = 15 + 8 * seconds
    parts = rehearse(
        tmp_path,
        GANKERN_HANGS="!smoke.json.triton-float32@gankern.ops.weight_clip.triton gankern.cli@gankern.optim.rmsprop",
        LIMITS=f"smoke={limit:.0f} bench={limit:.0f} " + " ".join(f"{n}=600" for n in ("compile", "sanitize", "test")),
        REHEARSE_SECONDS="1100",
    )
    wanted = dict.fromkeys(("test-collection", "compile", "sanitize-memcheck", "sanitize-racecheck", "test"), "ok")
    assert parts == {**wanted, "smoke": "CUT OFF", "bench-float32": "CUT OFF"}
    assert {f.name for f in tmp_path.iterdir()} == {"bench-float32.json", "logs.tar.gz", "smoke.json"}
    (case,) = load(tmp_path / "bench-float32.json")["cases"]  # type: ignore[index]
    assert (case["name"], case["status"]) == ("clip_weights.step", "ok")
    assert load(tmp_path / "smoke.json")["triton tf32"]["wrong"] == {}  # type: ignore[index]
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        names = {Path(name).stem for name in logs.getnames()}
        assert {*parts, "machine", "tests"} <= names
        report = logs.extractfile("logs/test-collection.log")
        assert report is not None and re.search(rb"\d{3}/\d+ tests collected", report.read())


@pytest.mark.timeout(600)
def test_the_script_ends_within_its_time(tmp_path: Path) -> None:
    """Parts that there is no time for are left out, and what there is comes back."""
    parts = rehearse(tmp_path, REHEARSE_SECONDS="0")
    assert set(parts.values()) == {"left out"}
    assert {f.name for f in tmp_path.iterdir()} == {"logs.tar.gz"}


def test_the_limits_fit_the_machine() -> None:
    """Of which a command may run for 10 minutes, and 8 files come back: three types, smoke, the table and the logs."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    total = re.search(r"^total=(\d+) kill_after=(\d+)", script, re.MULTILINE)
    assert total is not None and int(total[1]) + int(total[2]) <= 540
