"""Whether what a file or a setting asks for fits in memory."""

from __future__ import annotations

import os
import re
from pathlib import Path


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def beyond_memory(size: int) -> str | None:
    """How `size` bytes compare with the memory that is left, where they do not fit."""
    available = available_memory()
    return f"{size / 1e9:.4g} GB, where {available / 1e9:.4g} GB of memory are free" if size > available else None
