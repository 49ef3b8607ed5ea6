"""Where a checkpoint becomes a file: laid out, reserved, filled in any order, journalled,
committed.

Owns `OUT.partial`; `cq.core.journal` owns the journal beside it. The final name only ever holds a
complete file: a laid-out but unfilled safetensors file is valid and reads as zeros, so no name may
show one. Work that a crash cut off is resumed when the same work (equal digest) is asked for again.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from cq.core import files, header
from cq.core.checkpoint import Checkpoint, Extent, Piece
from cq.core.errors import CqError, InternalError, PlanError, ResourceError, Unfinished
from cq.core.journal import read_journal
from cq.core.laid_out import JournalledFile, OpenFile, final_metadata
from cq.core.source import check_unchanged


class Sink(Protocol):
    """Where the engine puts what parts produce. Every method may be called from any thread."""

    finished: set[int]

    def write(self, piece: Piece) -> None:
        """Put rows of a tensor in their place."""
        ...

    def put(self, name: str, value: bytes) -> None:
        """Put the bytes of a whole tensor in their place."""
        ...

    def copy(self, name: str, extent: Extent, stop: threading.Event) -> None:
        """Copy a tensor's bytes from a file, unless `stop` is set meanwhile."""
        ...

    def part_done(self, index: int) -> None:
        """All tensors of part `index` are in their place."""
        ...


def nbytes_file(checkpoint: Checkpoint) -> int:
    """Size in bytes of the file that a sink would make of `checkpoint`."""
    return header.nbytes_laid_out(checkpoint.specs, final_metadata(checkpoint))


class FileSink(JournalledFile):
    """Writes `checkpoint` to `target` through `target.partial`.

    Use as a context manager: leaving it normally commits; leaving it by an exception that says the
    work cannot be finished removes the partial file; leaving it by KeyboardInterrupt, or by
    Unfinished, keeps it, as a kill does, and the same call later goes on from there. `in_place`
    says that `target` is the input itself: it stays until the new file is complete, and its mode is
    kept.

    Raises: PlanError if `target` exists (without `force`), is one of the inputs, is not a regular
    file, is being written by another process, or has a partial file of other work (without
    `restart`); ResourceError if the disk has no room.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Path,
        *,
        force: bool = False,
        restart: bool = False,
        in_place: bool = False,
    ) -> None:
        self.partial, journal = working_files(target)
        super().__init__(checkpoint, target, journal)
        self._force, self._restart, self._in_place = force or in_place, restart, in_place
        self._parts = len(checkpoint.parts)
        self._inputs = checkpoint.inputs
        check_target(checkpoint, target, force=force, in_place=in_place)

    def __enter__(self) -> FileSink:
        try:
            self.fd = files.open_own(self.partial)
        except OSError as error:
            raise unwritable(self.shown, error) from error
        try:
            self._claim()
            if not self._resume():
                self._renew()
                self._start()
            self.syncer.start()
        except BaseException as error:
            # Of a PlanError the partial file is somebody else's; of Ctrl-C it is to be resumed.
            self._leave(remove=not isinstance(error, PlanError | KeyboardInterrupt))
            raise
        return self

    def _claim(self) -> None:
        # Between open and lock the other process may have renamed the file we opened.
        if not files.lock(self.fd) or not self._is_ours():
            raise PlanError(
                f"another run is writing `{self.shown}`",
                where=self.shown,
                hint="wait for it, stop it, or choose another output",
                code="plan.output_busy",
            )

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), self.partial.stat())
        except OSError:
            return False

    def _resume(self) -> bool:
        size = os.fstat(self.fd).st_size
        if self._restart or size == 0:
            return False
        if not self.journal.path.exists():
            # Ours has had a journal since before it had a byte; browsers name downloads so, too.
            raise PlanError(
                f"`{self.partial}` is in the way, and it is not cq's",
                where=str(self.partial),
                hint="move it away, or add `--restart` to discard it",
                code="plan.other_partial",
            )
        digest, finished = read_journal(self.journal.path) or (self.dated, set())
        # Cut off while its space was being reserved, it holds nothing yet.
        whole = size == self.header.nbytes_file or not finished
        if digest.split("-")[0] != self.work or not whole:
            raise PlanError(
                f"`{self.partial}` holds unfinished work of another command",
                where=str(self.partial),
                hint="run that command again to finish it, or add `--restart` to discard it",
                code="plan.other_partial",
            )
        if not finished or digest != self.dated:
            return False
        self.finished = {index for index in finished if index < self._parts}
        files.write_at(self.fd, memoryview(self.head), 0)  # a power loss may have taken it
        self.journal.begin(self.dated, go_on=True)
        return True

    def _renew(self) -> None:
        """Begin with a file of our own, where there is one: workers of a cluster may still write to
        that of a run that was killed."""
        if os.fstat(self.fd).st_size:
            self.partial.unlink()
            os.close(self.fd)
            self.fd = files.open_own(self.partial)
            self._claim()

    def _start(self) -> None:
        try:
            os.ftruncate(self.fd, 0)
            self.journal.begin(self.dated, go_on=False)
            files.reserve(self.fd, self.header.nbytes_file)
            files.write_at(self.fd, memoryview(self.head), 0)
        except OSError as error:
            raise no_room(self.shown, self.header.nbytes_file, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_syncing()
        if kind is None:
            try:
                self._commit()
            except BaseException as failure:
                self._leave(remove=not isinstance(failure, KeyboardInterrupt))
                raise
        else:
            self._leave(remove=not issubclass(kind, KeyboardInterrupt | Unfinished))
            if isinstance(error, OSError):
                raise no_room(self.shown, self.header.nbytes_file, error) from error

    def _commit(self) -> None:
        if len(self.finished) != self._parts:
            raise InternalError(f"{self._parts - len(self.finished)} parts were never written")
        try:
            if self._sync_error is not None:
                raise self._sync_error
            os.fsync(self.fd)
            check_unchanged(self._inputs)
            if self.target.exists() and not self._force:
                raise already_there(self.shown)
            if self._in_place and hasattr(os, "fchmod"):
                os.fchmod(self.fd, stat.S_IMODE(self.target.stat().st_mode))
            self.partial.replace(self.target)
        except OSError as error:
            raise unwritable(self.shown, error) from error
        files.sync_directory(self.target.parent)
        if not self.partial.exists():  # else another run has begun, and the journal is its own
            self.journal.remove()
        self.close()

    def _leave(self, *, remove: bool) -> None:
        if remove:
            self.journal.remove()
            with suppress(OSError):
                self.partial.unlink(missing_ok=True)
        self.close()


def working_files(target: Path) -> tuple[Path, Path]:
    """The partial file and the journal of an output, where they lie beside it."""
    real = Path(os.path.realpath(target))
    return real.with_name(real.name + ".partial"), real.with_name(real.name + ".partial.journal")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def check_target(
    checkpoint: Checkpoint, target: Path, *, force: bool, in_place: bool = False
) -> None:
    """Check, before any work, that `target` may be written.

    Raises: PlanError if it exists without `force`, is an input (unless `in_place`), or is not a
    regular file; ResourceError if its directory is missing.
    """
    shown = str(target)
    check_kind(target)
    for path in (*(() if in_place else (target,)), *working_files(target)):
        if any(file.same_file(path) for file in checkpoint.inputs) or any(
            _same_file(source.path, path) for source in checkpoint.sources
        ):
            raise PlanError(
                f"`{path}` is an input, and writing `{shown}` would overwrite it",
                where=shown,
                hint="choose another output; cq never overwrites what it reads",
                code="plan.output_is_input",
            )
    if os.path.exists(target) and not (force or in_place):
        raise already_there(shown)
    parent = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(parent):
        raise ResourceError(
            f"the directory `{parent}` does not exist", where=shown, code="resource.directory"
        )


def check_kind(target: Path) -> None:
    """Raises: PlanError if `target` is there, and no regular file; or a name for an open one."""
    whole = os.path.abspath(target)
    stream = whole.startswith(("/dev/", "/proc/")) and not whole.startswith("/dev/shm/")
    # Neither of these ever raises, whatever the name.
    if stream or (os.path.exists(target) and not os.path.isfile(target)):
        raise PlanError(
            f"`{target}` is not a regular file",
            where=str(target),
            hint="name a file; `-o -` writes the bytes to stdout",
            code="plan.output_kind",
        )


class StreamSink(OpenFile):
    """Writes `checkpoint` to a byte stream in file order, through an unlinked temporary file.

    A file begins with the tensors of the widest dtypes, such as the scales that are known last, so
    the bytes are spooled before the first leaves. TMPDIR says where.
    """

    def __init__(self, checkpoint: Checkpoint, stream: IO[bytes]) -> None:
        super().__init__(checkpoint)
        self._stream = stream
        self._inputs = checkpoint.inputs
        self._spool: IO[bytes] | None = None

    def __enter__(self) -> StreamSink:
        try:
            self._spool = tempfile.TemporaryFile(prefix="cq-")
            self.fd = self._spool.fileno()
            files.reserve(self.fd, self.header.nbytes_file)
            files.write_at(self.fd, memoryview(self.head), 0)
        except OSError as error:
            raise no_room(tempfile.gettempdir(), self.header.nbytes_file, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._spool is not None
        with self._spool:
            if isinstance(error, OSError):
                raise no_room(tempfile.gettempdir(), self.header.nbytes_file, error) from error
            if kind is not None:
                return
            check_unchanged(self._inputs)
            self._spool.seek(0)
            try:
                while chunk := self._spool.read(1 << 20):
                    self._stream.write(chunk)
                self._stream.flush()
            except BrokenPipeError:
                raise
            except OSError as failure:
                raise unwritable("stdout", failure) from failure


def already_there(shown: str) -> PlanError:
    """The error for an output that exists, without `--force`."""
    return PlanError(
        f"`{shown}` exists already",
        where=shown,
        hint="add `--force` to replace it, or choose another output",
        code="plan.output_exists",
    )


def unwritable(shown: str, error: OSError) -> CqError:
    """The error for an output that the system refuses to open or write."""
    return ResourceError(
        f"cannot write `{shown}`: {(error.strerror or str(error)).lower()}",
        where=shown,
        code="resource.output",
    )


def no_room(shown: str, nbytes: int, error: OSError) -> CqError:
    """The error for an output of `nbytes` that the disk has no room for."""
    return ResourceError(
        f"cannot write `{shown}`, which takes {nbytes} bytes:"
        f" {(error.strerror or str(error)).lower()}",
        where=shown,
        hint="free some space or choose another output",
        code="resource.disk",
    )
