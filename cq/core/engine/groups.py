"""What control groups leave a process, as containers and job schedulers bound it on Linux.

Owns the files of `/proc/self/cgroup` and `/sys/fs/cgroup`, of version 1 and 2: pure functions of
what lies under `root`, which tests make up. Of several groups around each other the tightest
counts. What is not there, or is no number, bounds nothing.

Source: the Linux kernel's `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"


class _Memory(NamedTuple):
    """The files of a version: the limits, what is used, and the prefix of what tells of it."""

    limits: tuple[str, ...]
    used: str
    prefix: str


_V1 = _Memory(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2 = _Memory(("memory.max", "memory.high"), "memory.current", "")


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that the groups of this process may still take, the page cache of files given up; None
    if nothing bounds them."""
    left = []
    for place, is_second in _places(root, "memory"):
        version = _V2 if is_second else _V1
        limits = [_number(place / name) for name in version.limits]
        left += [limit - _taken(place, version) for limit in limits if limit is not None]
    return max(0, min(left)) if left else None


def cores(root: Path = _ROOT) -> int | None:
    """Cores that the groups of this process may keep busy, rounded up; None if nothing bounds
    them."""
    found = []
    for place, is_second in _places(root, "cpu"):
        names = ("cpu.max",) if is_second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in _text(place / name).split()]
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            found.append(-(-int(words[0]) // int(words[1])))
    return min(found, default=None)


def _places(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The directories that may bound this process by `controller`, and whether they are of version
    2.

    A container sees its own group as the root of all, whatever its path is called outside.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops, is_second = {""}, True
        elif controller in controllers.split(","):  # mounted by all their names, by this, or both
            tops, is_second = {controller, controllers}, False
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        if ".." in own.parts:  # a group outside of the namespace that is seen here
            own = PurePosixPath()
        for each in (own, *own.parents):
            for top in sorted(tops):
                yield root / _GROUPS / top / each, is_second


def _taken(place: Path, version: _Memory) -> int:
    """Bytes in use that cannot be given up at once."""
    told = dict(
        words
        for line in _text(place / "memory.stat").splitlines()
        if len(words := line.split()) == 2
    )
    kept = 0
    for name in ("active_file", "inactive_file"):
        text = told.get(f"{version.prefix}{name}", "")
        kept += int(text) if text.isdecimal() else 0
    return max(0, (_number(place / version.used) or 0) - kept)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # `max` is no bound


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
