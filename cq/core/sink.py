"""Where a checkpoint becomes a file: laid out, reserved, filled in any order, journalled,
committed.

Owns `OUT.partial`; `cq.core.journal` owns the journal beside it. The final name only ever holds a
complete file: a laid-out but unfilled safetensors file is valid and reads as zeros, so no name may
show one. Work that a crash cut off is resumed when the same work (equal digest) is asked for again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

from cq.core import files, header, manifest
from cq.core.checkpoint import Checkpoint, Extent, Piece
from cq.core.engine.local import Worker
from cq.core.errors import CqError, InternalError, PlanError, ResourceError
from cq.core.header import Header
from cq.core.journal import Journal, read_journal
from cq.core.source import check_unchanged

if TYPE_CHECKING:
    import torch

_SYNC_SECONDS = 0.25


class Sink(Protocol):
    """Where the engine puts what parts produce. Every method may be called from any thread."""

    finished: set[int]

    def write(self, piece: Piece) -> None:
        """Put rows of a tensor in their place."""
        ...

    def copy(self, name: str, extent: Extent, stop: threading.Event) -> None:
        """Copy a tensor's bytes from a file, unless `stop` is set meanwhile."""
        ...

    def part_done(self, index: int) -> None:
        """All tensors of part `index` are in their place."""
        ...


class _OpenFile:
    """A laid-out file, open for writing at tensor offsets: what the sinks here share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.head, self.header = _lay_out(checkpoint)
        self.finished: set[int] = set()
        self.fd = -1

    def write(self, piece: Piece) -> None:
        entry = self.header.entries[piece.name]
        offset = self.header.data_start + entry.start
        if piece.start:
            rows_before = type(entry.spec)(entry.spec.dtype, (piece.start, *entry.spec.shape[1:]))
            offset += rows_before.nbytes
        files.write_at(self.fd, _bytes_of(piece.tensor), offset)

    def copy(self, name: str, extent: Extent, stop: threading.Event) -> None:
        offset = self.header.data_start + self.header.entries[name].start
        done = 0
        while done < extent.nbytes and not stop.is_set():
            got = files.kernel_copy(
                extent.file.fileno(),
                extent.offset + done,
                self.fd,
                offset + done,
                extent.nbytes - done,
            )
            if not got:  # the kernel cannot, or the source has ended, which the next line tells
                buffer = memoryview(bytearray(min(extent.nbytes - done, files.COPY_BYTES)))
                extent.file.read_into(buffer, extent.offset + done, tensor=name)
                files.write_at(self.fd, buffer, offset + done)
                got = len(buffer)
            done += got

    def part_done(self, index: int) -> None:
        self.finished.add(index)


def _lay_out(checkpoint: Checkpoint) -> tuple[bytes, Header]:
    metadata = dict(checkpoint.metadata)
    if checkpoint.stages:
        metadata[manifest.HISTORY_KEY] = manifest.history(checkpoint)
    return header.lay_out(checkpoint.specs, metadata)


def nbytes_file(checkpoint: Checkpoint) -> int:
    """Size in bytes of the file that a sink would make of `checkpoint`."""
    return _lay_out(checkpoint)[1].nbytes_file


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class FileSink(_OpenFile):
    """Writes `checkpoint` to `target` through `target.partial`.

    Use as a context manager: leaving it normally commits; leaving it by an exception that says the
    work cannot be finished removes the partial file; leaving it by KeyboardInterrupt keeps it, as a
    kill does, and the same call later goes on from there.

    Raises: PlanError if `target` exists (without `force`), is one of the inputs, is not a regular
    file, is being written by another process, or has a partial file of other work (without
    `restart`); ResourceError if the disk has no room.
    """

    def __init__(
        self, checkpoint: Checkpoint, target: Path, *, force: bool = False, restart: bool = False
    ) -> None:
        super().__init__(checkpoint)
        self.shown = str(target)
        # Through a link the file behind it is replaced, not the link.
        self.target = Path(os.path.realpath(target))
        self.partial, journal = _working_files(target)
        self.journal = Journal(journal)
        self._force, self._restart = force, restart
        self._parts = len(checkpoint.parts)
        self._inputs = checkpoint.inputs
        check_target(checkpoint, target, force=force)
        self.digest = manifest.work_digest(checkpoint)
        # What the work is, and of when its inputs are: a touched source means a fresh start.
        self._work = hashlib.sha256(self.digest.encode() + self.head).hexdigest()
        times = repr([file.mtime_ns for file in checkpoint.inputs])
        self._digest = f"{self._work}-{hashlib.sha256(times.encode()).hexdigest()}"
        self._lock = threading.Lock()
        self._unsafe: list[int] = []
        self._closing = threading.Event()
        self._syncer = Worker(self._sync_behind, "cq-sync")
        self._sync_error: OSError | None = None

    def __enter__(self) -> FileSink:
        try:
            self.fd = os.open(self.partial, files.OWN_FLAGS, 0o666)
        except OSError as error:
            raise _unwritable(self.shown, error) from error
        try:
            self._claim()
            if not self._resume():
                self._start()
            self._syncer.start()
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
        digest, finished = read_journal(self.journal.path) or (self._digest, set())
        # Cut off while its space was being reserved, it holds nothing yet.
        whole = size == self.header.nbytes_file or not finished
        if digest.split("-")[0] != self._work or not whole:
            raise PlanError(
                f"`{self.partial}` holds unfinished work of another command",
                where=str(self.partial),
                hint="run that command again to finish it, or add `--restart` to discard it",
                code="plan.other_partial",
            )
        if not finished or digest != self._digest:
            return False
        self.finished = {index for index in finished if index < self._parts}
        files.write_at(self.fd, memoryview(self.head), 0)  # a power loss may have taken it
        self.journal.begin(self._digest, go_on=True)
        return True

    def _start(self) -> None:
        try:
            os.ftruncate(self.fd, 0)
            self.journal.begin(self._digest, go_on=False)
            files.reserve(self.fd, self.header.nbytes_file)
            files.write_at(self.fd, memoryview(self.head), 0)
        except OSError as error:
            raise _no_room(self.shown, self.header.nbytes_file, error) from error

    def part_done(self, index: int) -> None:
        with self._lock:
            super().part_done(index)
            self.journal.part_done(index)
            self._unsafe.append(index)

    def _sync_behind(self) -> None:
        # The disk works while the parts are computed, and the last sync has little left to do.
        try:
            while not self._closing.wait(_SYNC_SECONDS):
                with self._lock:
                    written, self._unsafe = self._unsafe, []
                if written:
                    os.fsync(self.fd)
                    with self._lock:
                        self.journal.parts_safe(written)
        except OSError as error:
            self._sync_error = error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_syncing()
        if kind is None:
            try:
                self._commit()
            except BaseException as failure:
                self._leave(remove=not isinstance(failure, KeyboardInterrupt))
                raise
        else:
            self._leave(remove=not issubclass(kind, KeyboardInterrupt))
            if isinstance(error, OSError):
                raise _no_room(self.shown, self.header.nbytes_file, error) from error

    def _commit(self) -> None:
        if len(self.finished) != self._parts:
            raise InternalError(f"{self._parts - len(self.finished)} parts were never written")
        try:
            if self._sync_error is not None:
                raise self._sync_error
            os.fsync(self.fd)
            check_unchanged(self._inputs)
            if self.target.exists() and not self._force:
                raise _exists(self.shown)
            self.partial.replace(self.target)
        except OSError as error:
            raise _unwritable(self.shown, error) from error
        files.sync_directory(self.target.parent)
        if not self.partial.exists():  # else another run has begun, and the journal is its own
            self.journal.remove()
        self._close()

    def _leave(self, *, remove: bool) -> None:
        if remove:
            self.journal.remove()
            with suppress(OSError):
                self.partial.unlink(missing_ok=True)
        self._close()

    def _stop_syncing(self) -> None:
        self._closing.set()
        self._syncer.wait_out()

    def _close(self) -> None:
        self._stop_syncing()
        self.journal.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _working_files(target: Path) -> tuple[Path, Path]:
    """The partial file and the journal of an output."""
    real = Path(os.path.realpath(target))
    return real.with_name(real.name + ".partial"), real.with_name(real.name + ".partial.journal")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def check_target(checkpoint: Checkpoint, target: Path, *, force: bool) -> None:
    """Check, before any work, that `target` may be written.

    Raises: PlanError if it exists without `force`, is an input, or is not a regular file;
    ResourceError if its directory is missing.
    """
    shown = str(target)
    for path in (target, *_working_files(target)):
        if any(file.same_file(path) for file in checkpoint.inputs) or any(
            _same_file(source.path, path) for source in checkpoint.sources
        ):
            raise PlanError(
                f"`{path}` is an input, and writing `{shown}` would overwrite it",
                where=shown,
                hint="choose another output; cq never overwrites what it reads",
                code="plan.output_is_input",
            )
    if (os.path.exists(target) and not os.path.isfile(target)) or shown.endswith(
        os.sep
    ):  # never raises, whatever the name
        raise PlanError(
            f"`{shown}` is not a regular file",
            where=shown,
            hint="name a file; `-o -` writes the bytes to stdout",
            code="plan.output_kind",
        )
    if os.path.exists(target) and not force:
        raise _exists(shown)
    parent = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(parent):
        raise ResourceError(
            f"the directory `{parent}` does not exist", where=shown, code="resource.directory"
        )


class StreamSink(_OpenFile):
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
            raise _no_room(tempfile.gettempdir(), self.header.nbytes_file, error) from error
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
                raise _no_room(tempfile.gettempdir(), self.header.nbytes_file, error) from error
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
                raise _unwritable("stdout", failure) from failure


def _exists(shown: str) -> PlanError:
    return PlanError(
        f"`{shown}` exists already",
        where=shown,
        hint="add `--force` to replace it, or choose another output",
        code="plan.output_exists",
    )


def _unwritable(shown: str, error: OSError) -> CqError:
    return ResourceError(
        f"cannot write `{shown}`: {(error.strerror or str(error)).lower()}",
        where=shown,
        code="resource.output",
    )


def _no_room(shown: str, nbytes: int, error: OSError) -> CqError:
    return ResourceError(
        f"cannot write `{shown}`, which takes {nbytes} bytes:"
        f" {(error.strerror or str(error)).lower()}",
        where=shown,
        hint="free some space or choose another output",
        code="resource.disk",
    )
