"""What the machine has of memory, and how this process holds on to its own."""

from __future__ import annotations

import sys
from pathlib import Path

_LIBRARY_BYTES = 300 << 20  # torch and the interpreter themselves
_LEAST_LIMIT = 256 << 20
_UNKNOWN_FREE = 4 << 30
# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20


def default_limit() -> int:
    """Half of the memory that is free now, less torch itself; at least 256 MiB."""
    return max(_LEAST_LIMIT, (free() - _LIBRARY_BYTES) // 2)


def free() -> int:
    """Bytes that can be taken without swapping; 4 GiB where the system does not say."""
    try:
        info = Path("/proc/meminfo").read_text(encoding="ascii")
        line = next(line for line in info.splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration):
        return _UNKNOWN_FREE


def keep_freed() -> None:
    """Let this process reuse memory that it has freed, up to 256 MiB, instead of returning it.

    Row segments are a few MiB, which glibc by default maps anew for each operator: the kernel's
    zeroed pages then cost as much as the arithmetic (160 000 against 50 000 page faults for 1 GB of
    weights, a quarter of the time). For a process of our own, not for a library's host.
    """
    if sys.platform != "linux":
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
