"""One output, written by several processes: each fills its share of the parts, the last commits.

Owns `OUT.shares`, the directory in which they meet: the file `partial`, and a journal for each
share that has begun. The processes may run on several machines, one after the other or side by
side, and talk to each other only through these files.

No step needs a lock. A share writes its own parts and its own journal and nothing else; whoever
begins lays the file out, which changes nothing in one that is laid out already; whoever is done
looks at all journals, and if all are complete gives the file its head and its name, which comes out
the same if two do it. What is assumed of a shared file system: a file that was closed is seen whole
by whoever opens it afterwards (close-to-open, as NFS has it), a rename within a file system is
atomic, and all machines see the sources with the same modification times. Until the commit the file
has no head, so that nobody takes it for a safetensors file.
"""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cq.core import files
from cq.core.checkpoint import Checkpoint, Part
from cq.core.engine import local
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.journal import read_journal
from cq.core.laid_out import JournalledFile
from cq.core.sink import already_there, check_kind, check_target, no_room, unwritable
from cq.core.source import check_unchanged
from cq.core.text import as_text
from cq.core.write import Written, fill

_COMPUTED_COST = 16  # of a byte that is computed, in bytes that are copied
_ATTEMPTS = 3
_SAMPLES, _SAMPLE_BYTES = 64, 1024  # of the tensors of an output without stages


@dataclass(frozen=True, slots=True)
class Share:
    """The `number`-th of `count` shares, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_share(text: str) -> Share:
    """The share that `text` names, such as `2/4`.

    Raises: UsageError for anything else.

    >>> parse_share("2/4")
    Share(number=2, count=4)
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(
            f"`{as_text(text)}` is not a share",
            hint="write which of how many, such as `2/4`; they count from 1",
            code="usage.shard",
        )
    return Share(int(found[1]), int(found[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareDone:
    """What a share has come to: the file, if it is whole, and else the shares that are missing.
    `ready` says that the file was whole before the share began."""

    written: Written
    missing: tuple[Share, ...] = ()
    ready: bool = False


def divide(parts: Sequence[Part], count: int) -> tuple[tuple[int, ...], ...]:
    """The indexes of `parts` in `count` shares of about equal work; a function of specs alone, so
    that every process comes to the same."""

    def cost(index: int) -> int:
        part = parts[index]
        ready = part.extent is not None or part.constant is not None
        return 1 + part.nbytes * (1 if ready else _COMPUTED_COST)

    loads = [(0, number) for number in range(count)]
    shares: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(parts)), key=lambda i: (-cost(i), i)):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + cost(index), number))
        shares[number].append(index)
    return tuple(tuple(sorted(share)) for share in shares)


def write_share(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    share: Share,
    *,
    force: bool = False,
    settings: local.Settings | None = None,
) -> ShareDone:
    """Write the share `share` of `checkpoint` towards `path`, run as the `settings` say, going on
    from where a died process of the same share stopped; `path` appears when all shares are done. A
    file that is there already and is this checkpoint's is left as it is.

    Raises: PlanError, InputError or ResourceError. What this and other shares have finished stays
    for the next run of this one, unless no share had begun anything.
    """
    started = time.monotonic()
    retreated: list[str] = []
    settings = replace(settings or local.Settings(), on_retreat=retreated.append)
    check_kind(Path(path))
    sink = ShareSink(checkpoint, Path(path), share, force=force)

    def written(resumed: int) -> Written:
        return Written(
            path=Path(path),
            nbytes=sink.header.nbytes_file,
            seconds=time.monotonic() - started,
            parts=len(sink.own),
            parts_resumed=resumed,
            digest=sink.digest,
            retreated=tuple(sorted(set(retreated))),
        )

    if not force and sink.is_whole():
        sink.sweep()
        return ShareDone(written=written(len(sink.own)), ready=True)
    check_target(checkpoint, Path(path), force=force)
    with sink:
        resumed = len(sink.finished)
        fill(sink, checkpoint, settings, only=sink.own)
    return ShareDone(written=written(resumed), missing=sink.missing)


class ShareSink(JournalledFile):
    """Writes one share. A context manager: leaving it normally says that the share is complete, and
    commits if all are; `missing` then names those that are not. Leaving it by an exception keeps
    what is finished."""

    # What an earlier process left may be of a source that was written to since.
    reads_as_zeros = False

    def __init__(
        self, checkpoint: Checkpoint, target: Path, share: Share, *, force: bool = False
    ) -> None:
        real = Path(os.path.realpath(target))
        self.directory = real.with_name(real.name + ".shares")
        self.partial = self.directory / "partial"
        self.share = share
        super().__init__(checkpoint, target, self._journal(share))
        self.own = divide(checkpoint.parts, share.count)[share.number - 1]
        self.missing: tuple[Share, ...] = ()
        self._checkpoint = checkpoint
        self._force = force
        self._claimed = False

    def _journal(self, share: Share) -> Path:
        return self.directory / f"{share.number}-of-{share.count}.journal"

    def is_whole(self) -> bool:
        """Whether the output is there and is this checkpoint's: it was written after the sources
        were, its head names them and the stages, and a file under its own name is complete. Without
        stages a head says little, and samples of the tensors are compared."""
        newest = max((i.mtime_ns for i in self._checkpoint.inputs), default=0)
        try:
            with self.target.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_size != self.header.nbytes_file or stat.st_mtime_ns < newest:
                    return False
                alike = file.read(len(self.head)) == self.head
                return alike and (bool(self._checkpoint.stages) or self._samples_agree(file))
        except OSError:
            return False

    def _samples_agree(self, file: BinaryIO) -> bool:
        parts = [part for part in self._checkpoint.parts if part.extent is not None]
        for part in parts[:: max(1, len(parts) // _SAMPLES)]:
            assert part.extent is not None
            count = min(part.extent.nbytes, _SAMPLE_BYTES)
            file.seek(self.header.data_start + self.header.entries[part.name].start)
            own = memoryview(bytearray(count))
            part.extent.file.read_into(own, part.extent.offset, tensor=part.name)
            if file.read(count) != own:
                return False
        return True

    def __enter__(self) -> ShareSink:
        try:
            try:
                self._meet()
            except OSError as error:
                raise unwritable(self.shown, error) from error
            try:
                files.extend(self.fd, self.header.nbytes_file)
            except OSError as error:
                raise no_room(self.shown, self.header.nbytes_file, error) from error
            self.syncer.start()
        except BaseException:
            self._leave(begun=bool(self.finished))
            raise
        return self

    def _meet(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.directory.mkdir(exist_ok=True)
                self._refuse_others()
                self._begin()
            except FileNotFoundError:  # another share has found no room, and tidied up
                self.journal.close()
                if attempt == _ATTEMPTS:
                    raise
            else:
                return

    def _refuse_others(self) -> None:
        """Refuse to meet work that is not ours, or whose file is gone."""
        gone = not self.partial.exists()
        for path in sorted(self.directory.glob("*.journal")):
            name = re.fullmatch(r"(\d+)-of-(\d+)\.journal", path.name)
            noted = read_journal(path)
            if noted is None or name is None:
                continue
            digest, finished = noted
            if digest.split("-")[0] != self.work or int(name[2]) != self.share.count:
                raise self._in_the_way("holds unfinished work of another command")
            if gone and finished and not self.partial.exists():
                raise self._in_the_way("is left of work that was finished")

    def _in_the_way(self, what: str) -> PlanError:
        return PlanError(
            f"`{self.directory}` {what}",
            where=str(self.directory),
            hint="finish it with as many shares as it was begun with, or remove the directory when"
            " nothing writes to it any more",
            code="plan.other_partial",
        )

    def _begin(self) -> None:
        noted = read_journal(self.journal.path)
        same = noted is not None and noted[0] == self.dated
        # A journal is there before the file has a byte, so a file without one is not ours.
        self.journal.open()
        if not self.journal.lock():
            raise PlanError(
                f"share {self.share} of `{self.shown}` is being written by another process",
                where=self.shown,
                hint="give each process a share of its own; if its machine is gone for good,"
                f" remove `{self.journal.path}`",
                code="plan.output_busy",
            )
        self._claimed = True
        self.journal.begin(self.dated, go_on=same)
        # Of two that have begun at once at least one sees the other here: first noted, then looked.
        self._refuse_others()
        self.fd = files.open_own(self.partial, files.SHARED_FLAGS)
        if same and noted is not None:
            self.finished = noted[1] & set(self.own)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_syncing()
        try:
            if error is None:
                self._finish()
        except BaseException as failure:
            if isinstance(failure, OSError):
                raise unwritable(self.shown, failure) from failure
            raise
        finally:
            keep = error is None or isinstance(error, KeyboardInterrupt) or bool(self.finished)
            self._leave(begun=keep)
        if isinstance(error, OSError):
            raise no_room(self.shown, self.header.nbytes_file, error) from error

    def _finish(self) -> None:
        try:
            check_unchanged(self._checkpoint.inputs)
        except InputError:
            self.journal.remove()  # what it vouches for is a mixture
            raise
        self.sync()
        self.journal.close()  # what is closed is seen by whoever opens it from now on
        self.missing = self._still_missing()
        if not self.missing:
            self._commit()

    def _still_missing(self) -> tuple[Share, ...]:
        missing = []
        for number, own in enumerate(divide(self._checkpoint.parts, self.share.count), 1):
            share = Share(number, self.share.count)
            if not own:
                continue
            digest, finished = read_journal(self._journal(share)) or (self.dated, set())
            if digest != self.dated and self.is_whole():
                return ()  # another share has seen all of them, and begun to tidy up
            if digest != self.dated:
                raise PlanError(
                    f"share {share} was made of a source that has been written to since",
                    where=self.shown,
                    hint=f"run share {share} again",
                    code="plan.source_changed",
                )
            if not finished.issuperset(own):
                missing.append(share)
        return () if missing and self.is_whole() else tuple(missing)

    def _commit(self) -> None:
        if self.is_whole():  # another share was faster
            self.sweep()
            return
        if self.target.exists() and not self._force:
            raise already_there(self.shown)
        files.write_at(self.fd, memoryview(self.head), 0)
        os.fsync(self.fd)
        try:
            self.partial.replace(self.target)
        except FileNotFoundError:
            if not self.is_whole():
                raise
        files.sync_directory(self.target.parent)
        self.sweep()

    def sweep(self) -> None:
        """Remove what is left of the work beside a whole output."""
        if self.partial.exists():  # of work that was begun anew
            return
        for number in range(1, self.share.count + 1):
            with suppress(OSError):
                self._journal(Share(number, self.share.count)).unlink()
        with suppress(OSError):
            self.directory.rmdir()

    def _leave(self, *, begun: bool) -> None:
        self.close()
        if begun or not self._claimed:
            with suppress(OSError):
                self.directory.rmdir()  # if it is empty
            return
        # Nothing was begun: leave nothing, unless others are at work here.
        with suppress(OSError):
            noted = read_journal(self.journal.path)
            if noted is None or not noted[1]:  # a full disk tears its first line
                self.journal.path.unlink()
        with suppress(OSError):
            if not any(self.directory.glob("*.journal")):
                self.partial.unlink(missing_ok=True)
            self.directory.rmdir()
