"""Whatever fails while files are written, the last good state stays, and going on from it gives the same bits."""

import csv
import errno
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from train import crashing
from train.crashing import CALLS, failing, fit

from gankern import train
from gankern._files import WriteError

#: The fixture `whole` is made before those of a test, and has to run the same kernels.
pytestmark = pytest.mark.by_size


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def losses(folder):
    with (folder / "losses.csv").open() as file:
        return [row[:3] for row in csv.reader(file)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same bits need as many threads as `crashing` has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tmp_path(tmp_path):
    """In memory, where fsync takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """A run of three steps that nothing stopped, and the state of its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, 3)


def check_same_bits(folder, state, whole):
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(whole[1]), strict=True))
    assert losses(folder) == losses(whole[0])
    for step in range(1, 4):
        grid = f"samples/step-{step:06d}.png"
        assert (folder / grid).read_bytes() == (whole[0] / grid).read_bytes()
    assert not list(folder.rglob("*.tmp")) and not (folder / ".lock").exists()


@pytest.mark.parametrize("stays_full", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, whole, resume, stays_full):
    """Each call that can find it full does so once: while resuming, and in a new run."""
    failures = 0
    for n in range(1000):
        folder = tmp_path / str(n)
        if resume:
            fit(folder, 1)
        calls = iter(range(10_000))

        def fail(n=n, calls=calls):
            call = next(calls)
            return call >= n if stays_full else call == n

        def no_space():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            with monkeypatch.context() as patch:
                for name in CALLS:
                    patch.setattr(os, name, failing(getattr(os, name), fail, no_space))
                fit(folder, 2, resume=resume)
        except WriteError as error:
            failures += 1
            text = str(error)
            assert text.startswith(str(folder)) and "cannot be written: No space left on device" in text
            assert "\n" not in text
            has_state = (folder / "checkpoint.pt").exists()
            if has_state:
                step = train.load_checkpoint(folder)["step"]
                assert text.endswith(f"; {folder} holds step {step}")
            else:
                assert not resume
            if (folder / "losses.csv").exists():
                assert (folder / "losses.csv").read_bytes().endswith(b"\n")
            check_same_bits(folder, fit(folder, 3, resume=has_state), whole)
        else:
            break
    assert failures == n > 15


def test_a_process_that_dies_at_any_write(tmp_path, whole):
    fit(tmp_path / "base", 1)
    subprocess.run([sys.executable, crashing.__file__, tmp_path], check=True)
    runs = sorted(path for path in tmp_path.iterdir() if path.name != "base")
    assert len(runs) > 15
    for folder in runs:
        for grid in (folder / "samples").glob("step-*.png"):
            with Image.open(grid) as image:
                image.verify()
        check_same_bits(folder, fit(folder, 3, resume=True), whole)


def test_a_limit_on_the_size_of_files(tmp_path, whole):
    """The kernel's own error, in the middle of a checkpoint."""
    fit(tmp_path, 1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(WriteError, match=r"checkpoint\.pt: cannot be written: File too large; .* holds step 1$"):
            fit(tmp_path, 3, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    check_same_bits(tmp_path, fit(tmp_path, 3, resume=True), whole)


def test_a_disk_that_is_really_full(tmp_path, whole):
    options = ["-t", "tmpfs", "tmpfs", tmp_path]
    if os.geteuid() or subprocess.run(["mount", "-o", "size=96k", *options], capture_output=True).returncode:
        pytest.skip("mounting a disk takes root")
    try:
        fit(tmp_path, 1)
        filler = tmp_path / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1024)
        with pytest.raises(WriteError, match=r"cannot be written: No space left on device; .* holds step 1$"):
            fit(tmp_path, 3, resume=True)
        filler.unlink()
        check_same_bits(tmp_path, fit(tmp_path, 3, resume=True), whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("name", ["config.json", "losses.csv", "checkpoint.pt", "samples", "samples/step-000001.png"])
def test_a_folder_where_a_file_should_be(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    if name == "samples":
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text("no folder")
    with pytest.raises((WriteError, FileExistsError)) as raised:
        fit(tmp_path, 1)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_name_is_given_to_what_is_on_disk(tmp_path, monkeypatch):
    """A crash of the machine loses what was not synced: contents come before their name, losses before a checkpoint."""
    fit(tmp_path, 1)
    calls = []

    def noting(call):
        def noted(*args):
            if call.__name__ == "replace":
                calls.append(("replace", Path(args[1]).name))
            else:
                calls.append((call.__name__, Path(os.readlink(f"/proc/self/fd/{args[0]}")).name))
            return call(*args)

        return noted

    for name in CALLS:
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    fit(tmp_path, 2, resume=True)
    for name in ("losses.csv", "step-000002.png", "checkpoint.pt"):
        at = calls.index(("replace", name))
        temporary = f".{name}.{os.getpid()}.tmp"
        assert [*calls[at - 2 : at + 2]] == [
            ("write", temporary),
            ("fsync", temporary),
            ("replace", name),
            ("fsync", (tmp_path / "samples" if name.endswith(".png") else tmp_path).name),
        ]
    logged = calls.index(("write", "losses.csv"))
    assert calls[logged + 1] == ("fsync", "losses.csv") and logged < calls.index(("replace", "checkpoint.pt"))
