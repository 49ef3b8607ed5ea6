"""The journal beside a partial file: which parts are in it, told so that a crash cannot lie.

Owns the journal's text. Lines: a head (JSON with the work's digest and the boot), `done N` for a
part whose bytes were written, `safe N` for one whose bytes are on the disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import orjson

from cq.core import files
from cq.core.errors import PlanError

_BEGIN = b'\n{"cq":1,"digest"'


class Journal:
    """A journal being written. Not safe from several threads at once: the sink holds a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def open(self) -> None:
        """Open the file, and make it if there is none. Raises: PlanError if it is not cq's."""
        self._fd = files.open_own(self.path, files.OWN_FLAGS | os.O_APPEND)
        if not _BEGIN.startswith(os.read(self._fd, len(_BEGIN))):  # also one that was torn
            raise PlanError(
                f"`{self.path}` is in the way, and it is not cq's",
                where=str(self.path),
                hint="move it away",
                code="plan.other_partial",
            )

    def lock(self) -> bool:
        """Take the open file for this process alone; False if another has it."""
        return files.lock(self._fd)

    def begin(self, digest: str, *, go_on: bool) -> None:
        """Start the journal of the work `digest`, or go on with what there is of it."""
        if self._fd < 0:
            self.open()
        if not go_on:
            os.ftruncate(self._fd, 0)
        # The first newline ends a line that a crash may have torn.
        line = orjson.dumps({"cq": 1, "digest": digest, "boot": files.boot_id()})
        self._note(b"\n" + line + b"\n")

    def part_done(self, index: int) -> None:
        """All bytes of part `index` have been written."""
        self._note(b"done %d\n" % index)

    def parts_safe(self, indexes: Iterable[int]) -> None:
        """These parts are on the disk; so is the journal when this returns."""
        self._note(b"".join(b"safe %d\n" % index for index in indexes))
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove the file, if this journal is what it holds."""
        if self._fd < 0:
            return
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _note(self, line: bytes) -> None:
        if os.write(self._fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_journal(path: Path) -> tuple[str, set[int]] | None:
    """The digest and the finished parts that a journal vouches for, or None if it says nothing.

    Parts finished since the present boot count; of earlier boots only those that were safe, as a
    power loss may have kept the journal's line and lost the data. Torn lines are ignored.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            return None
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    boot_now = files.boot_id()
    digest: str | None = None
    boot: str | None = None
    safe: set[int] = set()
    fresh: set[int] = set()
    for line, after in pairwise(lines):
        if after.startswith(b"{"):
            continue  # torn: a run that resumes leaves an empty line after one that was whole
        if line.startswith(b"{"):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if boot_now is None or boot != record.get("boot"):
                fresh.clear()
            digest, boot = record.get("digest"), record.get("boot")
        elif line.startswith(b"done ") and line[5:].isdigit():
            fresh.add(int(line[5:]))
        elif line.startswith(b"safe ") and line[5:].isdigit():
            safe.add(int(line[5:]))
    if digest is None:
        return None
    trusted = fresh if boot_now is not None and boot == boot_now else set()
    return digest, safe | trusted
