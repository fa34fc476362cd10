"""Files: opened with errors of one line, written whole or not at all, a folder held by one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: What a file system answers that has no locks, and one that syncs no folders.
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_NO_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)


class FileError(ValueError):
    """A file is missing or broken; one line names it, what was expected and what was found."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class WriteError(OSError):
    """A file could not be written; one line names it and says why."""


def reason(error: BaseException) -> str:
    """What an exception says, in at most two lines' length; its type where it says nothing."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else text[:197] + "...") or type(error).__name__


def open_file(path: Path, error: type[FileError], expected: str) -> BinaryIO:
    """Open a regular file for reading; anything else, or nothing, is an `error` that says what was `expected`."""
    try:
        # A named pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        found = "found a folder" if stat.S_ISDIR(mode) else "found something that is no file"
    except FileNotFoundError:
        found = "found nothing"
    except OSError as cause:
        found = f"found: {cause.strerror}"
    except ValueError as cause:  # NUL in the path
        found = f"found: {cause}"
    raise error(f"{path}: expected {expected}, {found}")


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole: until it is safely on disk under another name, what `path` held stays.

    Raises
    ------
    WriteError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "something is there that is no file")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write(descriptor, *parts)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error


def append_file(path: Path, content: bytes, *, sync: bool) -> None:
    """Append to a file all of `content` or, where that fails, nothing; with `sync`, see that all of it is on disk.

    Raises
    ------
    WriteError
        If it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write(descriptor, content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises
    ------
    WriteError
        If something else is there, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{path}: cannot be made a folder: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder until the block ends or the process does.

    Raises
    ------
    BlockingIOError
        If another process, which the message names, holds it.
    WriteError
        If nothing can be written there.
    """
    path = folder / ".lock"
    try:
        descriptor = _lock(path)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except OSError:
            os.close(descriptor)
            raise
    except BlockingIOError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        # Before the lock is released: whoever opens the file from now on makes another one.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace")
            os.close(descriptor)
            by = f"process {holder}" if holder else "another process"
            raise BlockingIOError(
                f"out: {path.parent} is in use by {by}: wait for it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logging.getLogger(__name__).warning("%s: this file system has no locks: start no second run here", path)
            return descriptor
        os.close(descriptor)  # its holder removed it in between


def _write(descriptor: int, *parts: bytes | memoryview) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    """See that a file's new name is on disk, where the file system can tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
