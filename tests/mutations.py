"""Files as they come broken: seeded changes of bytes, and what stands where a file should."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

TEXTS = (
    b"",
    b"\0" * 64,
    b"not what was expected\n",
    b"<html><body>404</body></html>",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\0",
    b"{}",
)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, insert, drop, repeat or replace some of the bytes."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    size = rng.randint(1, 40)
    kind = rng.randrange(9)
    if kind == 0:
        del data[at:]
    elif kind <= 3:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 4:
        data[at : at + size] = rng.randbytes(size)
    elif kind == 5:
        data[at:at] = rng.choice((rng.randbytes(size), b"\0", b"\xff" * 8))
    elif kind == 6:
        del data[at : at + size]
    elif kind == 7:
        data += data[at:]
    else:
        return rng.choice(TEXTS)
    return bytes(data)


def obstacles(path: Path) -> Iterator[str]:
    """Put at `path` one thing after another that is no file that can be read, and say which."""
    path.unlink()
    yield "nothing"
    path.mkdir()
    yield "folder"
    path.rmdir()
    path.symlink_to(path.name)
    yield "Too many levels of symbolic links"
    path.unlink()
    os.mkfifo(path)
    yield "something that is no file"
    path.unlink()
    path.write_bytes(b"secret")
    path.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:  # who may read everything
            os.seteuid(65534)
        yield "Permission denied"
    finally:
        if root:
            os.seteuid(0)
        path.unlink()
