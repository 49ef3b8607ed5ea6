"""`INDEX.partial`: the directory in which the files of one output are made before they get names.

Owns its notes, its lock, and the moment in which all files get their names. Until then the names
hold what they held before; from then on the same command only goes on with giving names. The index,
without which files are no checkpoint, loses its name first and gets it last, so that no index ever
speaks of files of different work.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from cq.core import files
from cq.core.errors import Interrupted, PlanError, Unfinished
from cq.core.sink import already_there, no_room, unwritable

_NOTE, _NEW, _LOCK = "work.json", "work.new", "lock"
_MADE = re.compile(r".+-\d{5,}-of-\d{5,}\.safetensors(\.partial|\.partial\.journal)?", re.DOTALL)
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a directory says of the work in it: the work's digest; the hash of the index once names
    are given, None before; and files outside that unfinished work, since given up, has named."""

    work: str
    naming: str | None = None
    left: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"cq": 1, "work": self.work, "naming": self.naming, "left": list(self.left)}

    @classmethod
    def parse(cls, raw: bytes) -> Note | None:
        """The note that `raw` is; None if it is none."""
        try:
            found = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(found, dict) or not isinstance(found.get("work"), str):
            return None
        naming, left = found.get("naming"), found.get("left")
        if not isinstance(left, list) or not all(isinstance(each, str) for each in left):
            return None
        if not (naming is None or isinstance(naming, str)):
            return None
        return cls(work=found["work"], naming=naming, left=tuple(left))


@dataclass(kw_only=True)  # no slots: files are opened as the work begins
class Workplace:
    """The directory beside an index, for the work `digest` that makes files of certain `names`.

    `look` tells what may be done; as a context manager it is claimed for this process. It stays as
    it is, for the same work to go on, when it is left by Ctrl-C or by an error that says so, and is
    removed with all that is in it when it is left by any other.
    """

    index: Path
    digest: str
    names: tuple[str, ...]
    restart: bool = False
    note: Note = field(init=False)
    _lock: int = field(init=False, default=-1)

    @property
    def path(self) -> Path:
        """The directory; beside a link, not behind it."""
        return self.index.with_name(self.index.name + ".partial")

    def look(self) -> frozenset[str]:
        """The names outside that this work may replace, since it, or work that is to be discarded,
        has put its own files there.

        Raises: PlanError if the directory is somebody else's, or is of other work that is not to be
        discarded.
        """
        found = self._noted()
        self.note = Note(work=self.digest)
        if found is None:
            return frozenset()
        mine = frozenset(self.names) | {self.index.name}
        if found.work == self.digest and not self.restart:
            self.note = found
            return frozenset(found.left) | (mine if found.naming else frozenset())
        if self._is_named(found):
            return frozenset()
        if not self.restart:
            raise PlanError(
                f"`{self.path}` holds unfinished work of another command",
                where=str(self.path),
                hint="run that command again to finish it, or add `--restart` to discard it",
                code="plan.other_partial",
            )
        self.note = Note(work=self.digest, left=found.left)
        return frozenset(found.left)

    def _noted(self) -> Note | None:
        """The note, None where there is nothing yet. Raises: PlanError if this is not cq's."""
        try:
            inside = sorted(path.name for path in self.path.iterdir())
        except FileNotFoundError:
            if self.path.is_symlink():
                raise self._in_the_way() from None
            return None
        except NotADirectoryError as error:
            if self.index.parent.is_dir():
                raise self._in_the_way() from error
            return None
        except OSError as error:
            raise unwritable(str(self.index), error) from error
        kinds = (self.path / name for name in inside)
        if self.path.is_symlink() or not all(
            (name in {_NOTE, _NEW, _LOCK, self.index.name} or _MADE.fullmatch(name))
            and stat.S_ISREG(path.lstat().st_mode)
            for name, path in zip(inside, kinds, strict=True)
        ):
            raise self._in_the_way()
        if _NOTE not in inside:
            if set(inside) <= {_NEW, _LOCK}:  # cut off before it was said what for
                return None
            raise self._in_the_way()
        with (self.path / _NOTE).open("rb") as file:
            found = Note.parse(file.read(_MOST_BYTES))
        if found is None and not self.restart:
            raise self._in_the_way()
        return found or Note(work="")

    def _is_named(self, found: Note) -> bool:
        """Whether all of the work that is noted has its names: only the notes are left of it."""
        with suppress(OSError):
            whole = found.naming == _hash(self.index.read_bytes())
            return whole and not any(_MADE.fullmatch(p.name) for p in self.path.iterdir())
        return False

    def _in_the_way(self) -> PlanError:
        return PlanError(
            f"`{self.path}` is in the way, and it is not cq's",
            where=str(self.path),
            hint="move it away",
            code="plan.other_partial",
        )

    def __enter__(self) -> Workplace:
        self.look()
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = files.open_own(self.path / _LOCK)
        except OSError as error:
            raise unwritable(str(self.index), error) from error
        try:
            if not files.lock(self._lock) or not self._is_ours():
                raise PlanError(
                    f"another run is writing `{self.index}`",
                    where=str(self.index),
                    hint="wait for it, stop it, or choose another output",
                    code="plan.output_busy",
                )
            self.look()  # again, as another run may have been here meanwhile
            found = self._noted()
            if found is None or found.work != self.digest or self.restart:
                self._clear(keep={_LOCK, _NOTE})
                self._put(self.note)
        except PlanError:
            self._close()
            raise
        except BaseException:
            self._remove()
            raise
        return self

    def _is_ours(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._lock), (self.path / _LOCK).stat())
        return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._remove()
            return
        # Once names are given there is no way but on.
        goes_on = KeyboardInterrupt | Interrupted | Unfinished
        if (
            self.note.naming is None
            and issubclass(kind, Exception)
            and not issubclass(kind, goes_on)
        ):
            self._remove()
        self._close()

    def _remove(self) -> None:
        with suppress(OSError):
            self._clear(keep={_LOCK, _NOTE})  # what they are of is said until they are gone
            self._clear(keep=set())
        self._close()
        with suppress(OSError):
            self.path.rmdir()

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _clear(self, *, keep: set[str]) -> None:
        for path in list(self.path.iterdir()):
            if path.name not in keep:
                with suppress(OSError):
                    path.unlink()

    def made(self, name: str) -> Path:
        """Where the file `name` is made."""
        return self.path / name

    def check_room(self, sizes: Iterable[tuple[str, int]]) -> None:
        """See that the disk has room for files of so many bytes, less what there is of them.

        Raises: ResourceError.
        """
        needed = 0
        for name, nbytes in sizes:
            there = 0
            for path in (self.made(name), self.made(f"{name}.partial")):
                with suppress(OSError):
                    there += path.stat().st_size
            needed += max(0, nbytes - there)
        if shutil.disk_usage(self.path).free < needed:
            error = OSError(28, "no space left on device")
            raise no_room(str(self.index), needed, error)

    def name(
        self, text: bytes, *, force: bool, allowed: frozenset[str], sound: Callable[[], bool]
    ) -> None:
        """Give all files their names, and write `text` as the index. Files that are in the way are
        replaced with `force`, and if they are `allowed`; `sound` tells whether all that has a name
        now is what was made.

        Raises: PlanError, before any name is given, if a file is in the way; ResourceError.
        """
        ready = [name for name in self.names if self.made(name).exists()]
        for name in (*ready, self.index.name):
            path = self.index.with_name(name)
            if os.path.lexists(path) and not (force or name in allowed):
                raise already_there(str(path))
        try:
            self._put(Note(work=self.digest, naming=_hash(text), left=(*self.note.left, *ready)))
            self.index.unlink(missing_ok=True)
            files.sync_directory(self.index.parent)
            for name in ready:
                self.made(name).replace(self.index.with_name(name))
            files.sync_directory(self.index.parent)
            if not sound():
                raise PlanError(
                    f"files of `{self.index}` were changed by somebody else while it was written",
                    where=str(self.index),
                    hint="run the same command again with `--restart --force`",
                    code="plan.output_changed",
                )
            self._write(self.made(self.index.name), text)
            self.made(self.index.name).replace(self.index)
            files.sync_directory(self.index.parent)
        except OSError as error:
            raise unwritable(str(self.index), error) from error
        self.note = Note(work=self.digest)

    def _put(self, note: Note) -> None:
        try:
            self._write(self.path / _NEW, orjson.dumps(note.to_dict()))
            (self.path / _NEW).replace(self.path / _NOTE)
            files.sync_directory(self.path)
        except OSError as error:
            raise unwritable(str(self.index), error) from error
        self.note = note

    def _write(self, path: Path, raw: bytes) -> None:
        fd = files.open_own(path)
        try:
            os.ftruncate(fd, 0)
            files.write_at(fd, memoryview(raw), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
