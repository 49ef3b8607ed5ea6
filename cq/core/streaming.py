"""Where a part is computed, and how much of it at a time.

Owns the policies behind `--streaming-mode`: pure functions from what a part takes (`Work`) and what
there is (`Room`) to a `Placement`, and the way in which the engine hands a placement to the part
that it runs. Knows no device but by name; imports no torch, so that a plan can be told without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

StreamingMode = Literal["auto", "off", "minimal", "balanced", "aggressive"]
MODES: tuple[StreamingMode, ...] = get_args(StreamingMode)
CPU = "cpu"
DTYPE = "float32"  # of all rounding, but for products that are asked for in bfloat16


class Checkpointed(NamedTuple):
    """What `--quip-checkpointed` asks for: a layer of at least so many `columns` that is rounded by
    a calibration is rounded in at least so many `segments` of rows, one after the other. Rows are
    independent of each other, so that the integers are the same."""

    columns: int = 8192
    segments: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What producing a part takes, as far as its rows can be cut.

    `weights`, in rows of `columns`, come in row segments of `cut`, of which `usual` go together
    where nothing presses; `gains` says that more together are less work on the CPU, too.
    `nbytes_host` are held on the host wherever it is computed (sources, what the writer holds);
    where it is computed `nbytes_fixed`, and `nbytes_weight` for each weight that is taken together;
    `nbytes_staged` for each that is on its way to a device, as it was read. `dtype` is that of the
    largest products.
    """

    weights: int
    columns: int
    cut: int
    usual: int
    gains: bool
    nbytes_host: int
    nbytes_fixed: int
    nbytes_weight: int
    nbytes_staged: int
    dtype: str = DTYPE

    @property
    def segments(self) -> int:
        """The row segments of all the weights."""
        return -(-self.weights // self.cut)

    def most(self, checkpointed: Checkpointed | None) -> int:
        """The row segments that may go together, if wide layers are `checkpointed`."""
        if checkpointed is None or not self.gains or self.columns < checkpointed.columns:
            return self.segments
        return -(-self.segments // checkpointed.segments)

    def on_cpu(self, segments: int) -> int:
        """Bytes of the host, if so many segments are computed here together."""
        return self.nbytes_host + self.nbytes_fixed + self._of(segments) * self.nbytes_weight

    def on_device(self, segments: int, ahead: int) -> int:
        """Bytes of a device that computes so many segments together, `ahead` more on their way."""
        staged = self._of(segments + ahead) * self.nbytes_staged
        return self.nbytes_fixed + self._of(segments) * self.nbytes_weight + staged

    def beside_device(self, segments: int, ahead: int) -> int:
        """Bytes of the host, if a device computes: what is staged on the way there and back, and
        what it takes to go on here, a segment at a time, should the device's memory run out."""
        staged = self._of(segments + ahead) + self._of(segments) + self.cut
        return self.on_cpu(1) + staged * self.nbytes_staged

    def _of(self, segments: int) -> int:
        return min(self.weights, segments * self.cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is: `host` bytes for `workers` parts at a time, and `vram` bytes on `device`;
    0 where everything is computed on the CPU."""

    host: int
    workers: int = 1
    device: str = CPU
    vram: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a part is computed: `segments` row segments at a time, while up to `ahead` more are
    read and copied; the dtype of its largest products, and the bytes that it takes there and on the
    host."""

    device: str
    segments: int
    ahead: int = 0
    dtype: str = DTYPE
    nbytes_host: int = 0
    nbytes_device: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "segments": self.segments,
            "ahead": self.ahead,
            "nbytes_host": self.nbytes_host,
            "nbytes_device": self.nbytes_device,
        }


class _Policy(NamedTuple):
    """A mode: whether rows are cut at all, at most `usual` or one segment at a time, the parts that
    share the room, and the segments read ahead."""

    cuts: bool = True
    usual: bool = False
    one: bool = False
    parts: int = 1
    ahead: int = 1


_POLICIES: dict[StreamingMode, _Policy] = {
    "off": _Policy(cuts=False, ahead=0),
    "minimal": _Policy(),
    "balanced": _Policy(usual=True, parts=2, ahead=2),
    "aggressive": _Policy(one=True),
    "auto": _Policy(parts=2, ahead=2),
}


def placed(
    work: Work, mode: StreamingMode, room: Room, checkpointed: Checkpointed | None = None
) -> Placement:
    """Where and how `work` is done in `room`.

    More VRAM never means fewer segments on the device. What does not fit there is computed on the
    CPU; what does not fit there either gets the placement that needs least, whose bytes tell so.
    """
    if room.device != CPU:
        segments = _on_device(work, _POLICIES[mode], room.vram, work.most(checkpointed))
        if segments:
            ahead = min(_POLICIES[mode].ahead, work.segments - segments)
            return Placement(
                device=room.device,
                segments=segments,
                ahead=ahead,
                dtype=work.dtype,
                nbytes_host=work.beside_device(segments, ahead),
                nbytes_device=work.on_device(segments, ahead),
            )
    segments = _on_cpu(work, mode, room, work.most(checkpointed))
    return Placement(
        device=CPU,
        segments=segments,
        ahead=0,
        dtype=work.dtype,
        nbytes_host=work.on_cpu(segments),
        nbytes_device=0,
    )


def _on_device(work: Work, policy: _Policy, vram: int, most: int) -> int:
    """Segments that go together on a device with so many bytes, at most `most`; 0 if none do."""
    if not policy.cuts:
        return most if work.on_device(most, 0) <= vram else 0
    most = min(most, 1 if policy.one else work.usual if policy.usual else most)

    def fits(segments: int, share: int) -> bool:
        ahead = min(policy.ahead, work.segments - segments)
        return work.on_device(segments, ahead) * share <= vram

    found = _largest(most, lambda n: fits(n, policy.parts))
    return found or int(fits(1, 1))


def _on_cpu(work: Work, mode: StreamingMode, room: Room, most: int) -> int:
    """Segments that go together on the CPU, at least one and at most `most`."""
    if not work.gains:  # rows are no less work together, and take more memory
        return 1
    if mode == "off":
        return most
    if mode == "aggressive":
        return 1
    most = most if mode == "minimal" else min(work.usual, most)
    parts = 1 if mode == "minimal" else room.workers
    found = _largest(most, lambda n: work.on_cpu(n) * parts <= room.host)
    return found or 1


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, if all smaller ones do; 0 if not even 1."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# How a part gets its placement --------------------------------------------------------------------


class _Offer(NamedTuple):
    placement: Placement
    retreat: Callable[[], None]


class _Here(threading.local):
    offer: _Offer | None = None


_here = _Here()


@contextmanager
def offered(placement: Placement, retreat: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it the part that this thread produces may claim `placement`; `retreat` is called if
    the device's memory runs out, and the part goes on without it."""
    _here.offer = _Offer(placement, retreat)
    try:
        yield
    finally:
        _here.offer = None


def claimed(usual: Placement) -> tuple[Placement, Callable[[], None]]:
    """The placement offered to this thread, once, and what to call on a retreat; `usual` if there
    is none. A part that another one reads was not offered any: its memory is counted with that
    one's."""
    offer, _here.offer = _here.offer, None
    return (usual, lambda: None) if offer is None else (offer.placement, offer.retreat)
