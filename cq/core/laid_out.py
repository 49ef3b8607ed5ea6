"""A laid-out file while it is filled: its header is known, its tensors come in any order.

Owns where a tensor's rows go, and that what is finished is noted and brought to the disk. How a
file begins, is claimed and gets its name is the sinks' business.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from cq.core import files, header, manifest
from cq.core.checkpoint import Checkpoint, Extent, Piece
from cq.core.engine.local import Worker
from cq.core.header import Header
from cq.core.journal import Journal

if TYPE_CHECKING:
    import torch

_SYNC_SECONDS = 0.25


class OpenFile:
    """A laid-out file, open for writing at tensor offsets: what the sinks here share."""

    # What was reserved reads as zeros already, as a source's hole does.
    reads_as_zeros = True

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

    def put(self, name: str, value: bytes) -> None:
        offset = self.header.data_start + self.header.entries[name].start
        files.write_at(self.fd, memoryview(value), offset)

    def copy(self, name: str, extent: Extent, stop: threading.Event) -> None:
        offset = self.header.data_start + self.header.entries[name].start
        done = 0
        while done < extent.nbytes and not stop.is_set():
            got = 0
            if self.reads_as_zeros:
                got = files.hole(extent.file.fileno(), extent.offset + done, extent.nbytes - done)
            got = got or files.kernel_copy(
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


class JournalledFile(OpenFile):
    """An open file whose finished parts are noted in a journal, and brought to the disk meanwhile.

    The work is named by what it is and by when its inputs were written: a touched source means a
    fresh start.
    """

    def __init__(self, checkpoint: Checkpoint, target: Path, journal: Path) -> None:
        super().__init__(checkpoint)
        self.shown = str(target)
        # Through a link the file behind it is replaced, not the link.
        self.target = Path(os.path.realpath(target))
        self.journal = Journal(journal)
        self.digest, self.work, self.dated = names_of(checkpoint, self.head)
        self._lock = threading.Lock()
        self._unsafe: list[int] = []
        self._closing = threading.Event()
        self.syncer = Worker(self._sync_behind, "cq-sync")
        self._sync_error: OSError | None = None

    def part_done(self, index: int) -> None:
        with self._lock:
            super().part_done(index)
            self.journal.part_done(index)
            self._unsafe.append(index)

    def _sync_behind(self) -> None:
        # The disk works while the parts are computed, and the last sync has little left to do.
        try:
            while not self._closing.wait(_SYNC_SECONDS):
                self._sync()
        except OSError as error:
            self._sync_error = error

    def _sync(self) -> None:
        with self._lock:
            written, self._unsafe = self._unsafe, []
        if written:
            os.fsync(self.fd)
            with self._lock:
                self.journal.parts_safe(written)

    def sync(self) -> None:
        """Bring all that was written to the disk, and say so in the journal. Raises: OSError."""
        self.stop_syncing()
        if self._sync_error is not None:
            raise self._sync_error
        self._sync()

    def stop_syncing(self) -> None:
        """Bring nothing more to the disk behind the workers' backs."""
        self._closing.set()
        self.syncer.wait_out()

    def close(self) -> None:
        """Close the file and its journal, whatever is in them."""
        self.stop_syncing()
        self.journal.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def names_of(checkpoint: Checkpoint, head: bytes) -> tuple[str, str, str]:
    """What the work of a file that begins with `head` is called: the digest that a manifest tells,
    that with what the file will hold, and that with when the inputs were written."""
    digest = manifest.work_digest(checkpoint)
    work = hashlib.sha256(digest.encode() + head).hexdigest()
    times = repr([file.mtime_ns for file in checkpoint.inputs])
    return digest, work, f"{work}-{hashlib.sha256(times.encode()).hexdigest()}"


def final_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata that a file of `checkpoint` gets, its history included."""
    metadata = dict(checkpoint.metadata)
    if checkpoint.stages:
        metadata[manifest.HISTORY_KEY] = manifest.history(checkpoint)
    return metadata


def _lay_out(checkpoint: Checkpoint) -> tuple[bytes, Header]:
    return header.lay_out(checkpoint.specs, final_metadata(checkpoint))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
