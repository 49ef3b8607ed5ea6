"""The operating system's file calls that cq needs, with portable fallbacks.

Owns positioned reads and writes, reserving space, kernel copies and locks. Where a platform has no
such call (Windows has no `pread`), a lock around seek and read does the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
from pathlib import Path
from typing import IO

from cq.core.errors import PlanError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KERNEL_COPY_BYTES = 16 << 20
_MOST_DOCUMENT_BYTES = 64 << 20
COPY_BYTES = 1 << 20
_seek_lock = threading.Lock()
READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
WRITE_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# For files of our own making, which nobody may point elsewhere by a link.
OWN_FLAGS = WRITE_FLAGS | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# For a file that others write to as well. An NFS client that has read a page writes the whole of it
# back, stale bytes of its neighbors included; without the right to read it does not.
SHARED_FLAGS = (OWN_FLAGS & ~os.O_RDWR) | os.O_WRONLY


def open_own(path: Path, flags: int = OWN_FLAGS) -> int:
    """Open a file of our own making; never waits for the other end of a pipe of that name.

    Raises: PlanError if it is not a regular file; OSError.
    """
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in {errno.ENXIO, errno.ELOOP, errno.EISDIR}:
            raise
        fd = -1
    if fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    if fd >= 0:
        os.close(fd)
    raise PlanError(
        f"`{path}` is in the way: it is not a regular file",
        where=str(path),
        hint="move it away",
        code="plan.other_partial",
    )


def up_to(stream: IO[bytes], nbytes: int) -> bytes:
    """As `stream.read(nbytes)`, which takes all of that memory for a stream of any length."""
    chunks = []
    while nbytes and (chunk := stream.read(min(nbytes, 1 << 16))):
        chunks.append(chunk)
        nbytes -= len(chunk)
    return b"".join(chunks)


def read_document(path: Path) -> bytes:
    """A JSON document, which a person or a program has written: all of the file, up to 64 MiB.

    Raises: OSError; EFBIG for a larger one.
    """
    with path.open("rb") as file:
        raw = up_to(file, _MOST_DOCUMENT_BYTES + 1)
    if len(raw) > _MOST_DOCUMENT_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MOST_DOCUMENT_BYTES >> 20} MiB")
    return raw


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` from `offset`; the number of bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    return seek_read(fd, buffer, offset)


def seek_read(fd: int, buffer: memoryview, offset: int) -> int:
    """`read_at` where the system has no positioned read."""
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while len(data):
        done = (
            os.pwrite(fd, data, offset) if hasattr(os, "pwrite") else seek_write(fd, data, offset)
        )
        data, offset = data[done:], offset + done


def seek_write(fd: int, data: memoryview, offset: int) -> int:
    """One write at `offset` where the system has no positioned write; the bytes written."""
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def reserve(fd: int, nbytes: int) -> None:
    """Make the file `nbytes` long with the disk space behind it, so that no later write can fail.

    Raises: OSError (ENOSPC, EFBIG) if there is no room.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    os.ftruncate(fd, nbytes)


def extend(fd: int, nbytes: int) -> None:
    """Make the file at least `nbytes` long, with disk space behind it where the file system can
    give that without writing. Safe while others write to the file, which `reserve` is not.

    Raises: OSError (ENOSPC, EFBIG) if there is no room.
    """
    if os.fstat(fd).st_size < nbytes:
        os.ftruncate(fd, nbytes)
    if nbytes and sys.platform == "linux":
        # Python has only posix_fallocate, which writes zeros by hand where the system cannot help.
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        try:
            fallocate = library.fallocate64
        except AttributeError:  # another library than glibc, in which all offsets have 64 bits
            fallocate = library.fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, nbytes) and ctypes.get_errno() in (errno.ENOSPC, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def kernel_copy(
    source: int, source_offset: int, target: int, target_offset: int, nbytes: int
) -> int:
    """Let the kernel copy up to 16 MiB between files, sharing blocks where the file system can.

    The bytes copied; 0 where the kernel cannot, or says nothing more than that.
    """
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # across file systems, or not supported
            count = min(nbytes, _KERNEL_COPY_BYTES)
            return os.copy_file_range(source, target, count, source_offset, target_offset)
    return 0


def hole(fd: int, offset: int, nbytes: int) -> int:
    """How many of `nbytes` from `offset` on lie in a hole, which reads as zeros; 0 where the
    system does not tell, and behind the end of the file."""
    if not hasattr(os, "SEEK_DATA"):
        return 0
    with _seek_lock:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:  # no data follows, or there are no holes on this file system
            if error.errno != errno.ENXIO:
                return 0
            data = os.fstat(fd).st_size
    return max(0, min(nbytes, data - offset))


def lock(fd: int) -> bool:
    """Take the file for this process alone until it is closed; False if another process has it.

    File systems without locks (some network ones) take everybody for alone.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sync_directory(path: Path) -> None:
    """Make a rename in the directory durable, where the system can sync directories."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def boot_id() -> str | None:
    """Identifies the running system since its start, or None where that is not known.

    What was written since the same boot is in the page cache even if it never reached the disk.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
