import errno
import fcntl
import os

import pytest

from gankern._files import FileError, WriteError, append_file, locked, open_file, reason, write_file


def test_a_folder_is_held_once(tmp_path):
    with locked(tmp_path):
        with pytest.raises(BlockingIOError, match=rf"^out: {tmp_path} is in use by process {os.getpid()}: "):
            locked(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_lock_that_its_holder_removes_meanwhile(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError):
            locked(tmp_path).__enter__()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert caplog.messages == [f"{tmp_path / '.lock'}: this file system has no locks: start no second run here"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"o", memoryview(b"ld"))
    append_file(path, b"er", sync=False)

    def write(descriptor, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", write)
    for attempt in (lambda: write_file(path, b"new"), lambda: append_file(path, b"new", sync=True)):
        with pytest.raises(WriteError, match=rf"^{path}: cannot be written: Input/output error$"):
            attempt()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "older")]


def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_errors_are_one_line(tmp_path):
    path = tmp_path / "two\nlines\0"
    with pytest.raises(FileError, match=r"two lines : expected a file, found: embedded null byte$"):
        open_file(path, FileError, "a file")
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(ValueError("x" * 999)) == "x" * 197 + "..."
    assert reason(KeyError()) == "KeyError"
