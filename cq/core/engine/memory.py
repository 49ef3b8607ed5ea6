"""What the machine has of memory, and how this process holds on to its own."""

from __future__ import annotations

import sys
from pathlib import Path

from cq.core.engine import groups

_ROOT = Path("/")
LIBRARY_BYTES = 300 << 20  # torch and the interpreter themselves
_ENOUGH_LIMIT, _LEAST_LIMIT = 256 << 20, 64 << 20
_UNKNOWN_FREE = 4 << 30
# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_RETURNED_BYTES = 128 << 10
_WITH_GAPS = 3
_may_keep = False


def default_limit(root: Path = _ROOT) -> int:
    """Half of the memory that is free now, less torch itself; at least 256 MiB where there are so
    many, and 64 in any case."""
    left = free(root) - LIBRARY_BYTES
    return max(left // 2, min(left, _ENOUGH_LIMIT), _LEAST_LIMIT)


def free(root: Path = _ROOT) -> int:
    """Bytes that can be taken without swapping, as the machine under `root` and this process's
    control groups have it; 4 GiB where the system does not say."""
    try:
        info = (root / "proc/meminfo").read_text(encoding="ascii")
        line = next(line for line in info.splitlines() if line.startswith("MemAvailable:"))
        found = int(line.split()[1]) << 10
    except (OSError, StopIteration):
        found = _UNKNOWN_FREE
    left = groups.memory_left(root)
    return found if left is None else min(found, left)


def keep_freed() -> None:
    """Let this process reuse memory that it has freed, up to 256 MiB, instead of returning it.

    Row segments are a few MiB, which glibc by default maps anew for each operator: the kernel's
    zeroed pages then cost as much as the arithmetic (160 000 against 50 000 page faults for 1 GB of
    weights, a quarter of the time). For a process of our own, not for a library's host.
    """
    global _may_keep
    _may_keep = True
    _set_thresholds(_KEPT_BYTES)


def fit(limit: int, taken: int) -> None:
    """Keep what is freed only where there is room for it: within `limit` bytes, parts in flight may
    take `taken` together, and the gaps between their segments more than that again.

    Measured: 16 to 30 MB of a layer's segments are 37 to 43 MB of a thread that keeps what it
    frees. Does nothing in a process that was not told to `keep_freed`.
    """
    if _may_keep:
        _set_thresholds(_KEPT_BYTES if _WITH_GAPS * taken <= limit else _RETURNED_BYTES)


def _set_thresholds(nbytes: int) -> None:
    if sys.platform != "linux":
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_TRIM_THRESHOLD, nbytes)
    mallopt(_M_MMAP_THRESHOLD, nbytes)
