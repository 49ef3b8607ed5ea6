"""Rows to a device and results back, while others are read and computed.

Owns the copies: segments go up through pinned memory on a stream of their own, up to so many ahead
of the one that is computed, read by a thread of their own; results come down on another stream, one
behind. On the CPU the same steps are taken without streams, and nothing is copied. Knows tensors;
what is computed of them is its caller's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cq.core.engine import device as devices
from cq.core.streaming import CPU

if TYPE_CHECKING:
    import torch

Named = tuple[str, "torch.Tensor"]


class _Copied(NamedTuple):
    """A tensor on its way, and what to wait for before it is touched."""

    tensor: torch.Tensor
    wait: Callable[[], None]


class _Lane(Protocol):
    """How tensors get to a device and back."""

    def up(self, rows: torch.Tensor) -> _Copied:
        """Begin to copy rows to the device; from any thread. The wait is its computing's."""
        ...

    def down(self, result: torch.Tensor) -> _Copied:
        """Begin to copy a result to the host. The wait is the host's."""
        ...


class Staging:
    """The way to `device` and back for one part: `ahead` segments are read and copied while others
    are computed."""

    def __init__(self, device: str, ahead: int = 0) -> None:
        self.device = device
        self._ahead = ahead
        self._lane: _Lane = _cuda_lane(device) if device.startswith("cuda") else _Plain(device)

    def sent(self, segments: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """`segments`, in order, on the device."""
        if not self._ahead and self.device == CPU:
            return segments
        copied = map(self._lane.up, segments)
        return _arrived(_read_ahead(copied, self._ahead) if self._ahead else copied)

    def returned(self, results: Iterator[Named]) -> Iterator[Named]:
        """`results` on the host, each while the next is computed already."""
        if self.device == CPU:
            yield from results
            return
        waiting: tuple[str, _Copied] | None = None
        for name, result in results:
            copied = name, self._lane.down(result)
            if waiting is not None:
                yield _landed(*waiting)
            waiting = copied
        if waiting is not None:
            yield _landed(*waiting)


def _landed(name: str, copied: _Copied) -> Named:
    copied.wait()
    return name, copied.tensor


def _arrived(copied: Iterator[_Copied]) -> Iterator[torch.Tensor]:
    for tensor, wait in copied:
        wait()
        yield tensor


class _Plain:
    """Copies one after the other, as the CPU itself and devices without streams need it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def up(self, rows: torch.Tensor) -> _Copied:
        return _Copied(rows.to(self._device), _nothing)

    def down(self, result: torch.Tensor) -> _Copied:
        return _Copied(result.to(CPU), _nothing)


def _nothing() -> None:
    pass


class _Cuda:
    """Copies on streams of their own, through pinned memory.

    Torch keeps pinned blocks and gives one out again only when the copies from it are done; it
    keeps a device's memory by the stream that asked for it, which is why a thread has the same
    streams for all its parts.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        stream: Any = torch.cuda.Stream  # which has no types
        self._compute, self._up, self._down = (stream(self._device) for _ in range(3))

    def use(self) -> None:
        """Let this thread compute on a stream of its own."""
        import torch

        torch.cuda.set_stream(self._compute)

    def up(self, rows: torch.Tensor) -> _Copied:
        import torch

        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        with torch.cuda.stream(self._up):
            there = pinned.to(self._device, non_blocking=True)
            copied = self._up.record_event()

        def wait() -> None:
            self._compute.wait_event(copied)
            there.record_stream(self._compute)  # which may outlast the last name of it here

        return _Copied(there, wait)

    def down(self, result: torch.Tensor) -> _Copied:
        import torch

        if result.device.type == CPU:
            return _Copied(result, _nothing)
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            host.copy_(result, non_blocking=True)
            result.record_stream(self._down)
            copied = self._down.record_event()
        return _Copied(host, copied.synchronize)


class _Lanes(threading.local):
    def __init__(self) -> None:
        self.found: dict[str, _Cuda] = {}


_lanes = _Lanes()


def _cuda_lane(device: str) -> _Cuda:
    """The streams of this thread for a device."""
    lane = _lanes.found.get(device)
    if lane is None:
        lane = _lanes.found[device] = _Cuda(device)
    lane.use()
    return lane


# Reading ahead ------------------------------------------------------------------------------------


class _Failed(NamedTuple):
    error: BaseException


_END = object()


def _read_ahead(source: Iterator[_Copied], ahead: int) -> Iterator[_Copied]:
    """`source`, up to `ahead` of it taken by another thread before they are asked for.

    The thread ends with the source, or when nobody asks any more.
    """
    taken: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    unwanted = threading.Event()

    def put(thing: object) -> bool:
        while not unwanted.is_set():
            try:
                taken.put(thing, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            devices.one_thread()
            for each in source:
                if not put(each):
                    return
            put(_END)
        except BaseException as error:  # it is the asking thread's to raise
            put(_Failed(error))

    reader = threading.Thread(target=read, name="cq-read-ahead", daemon=True)
    reader.start()
    try:
        while (found := taken.get()) is not _END:
            if isinstance(found, _Failed):
                raise found.error
            yield found
    finally:
        unwanted.set()
        reader.join()
