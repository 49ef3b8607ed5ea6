"""Where layers are computed, as commands are asked for it and tell of it.

Owns what `--device`, `--streaming-mode` and `--vram-limit` mean together, and how a plan tells of
placements. A plan imports no torch, so that of a GPU it knows only what it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cq.cli.options import terminal
from cq.cli.output import size
from cq.core.checkpoint import Checkpoint, Part
from cq.core.engine import device, memory
from cq.core.engine.local import default_workers
from cq.core.errors import UsageError
from cq.core.streaming import CPU, Room, placed

if TYPE_CHECKING:
    from cq.cli.deliver import Delivery


def check(asked: Delivery) -> None:
    """See that the options go together. Raises: UsageError."""
    device.parse_device(asked.device)
    if asked.vram_limit is not None and asked.device == CPU:
        raise UsageError(
            "`--vram-limit` is of a GPU, and everything is computed on the CPU",
            hint="add `--device auto` or `--device cuda`, or leave it out",
            code="usage.device",
        )
    if asked.engine == "ray" and (asked.device != CPU or asked.streaming_mode != "auto"):
        raise UsageError(
            "`--engine ray` takes no device and no streaming mode",
            hint="the workers of the cluster compute on their CPUs",
            code="usage.device",
        )


def found(asked: Delivery, command: str) -> str:
    """The device that was asked for. Raises: ResourceError if it is not there."""
    where = device.found(asked.device)
    if asked.device == device.AUTO:
        terminal().say(f"{command}: `--device auto` is `{where}` here")
    return where


def remarks(checkpoint: Checkpoint, asked: Delivery) -> Iterator[str]:
    """What is said of a mode that was asked for and changes nothing."""
    if asked.streaming_mode == "auto" or asked.device != CPU or asked.engine != "local":
        return
    works = [part.work for part in checkpoint.parts if part.work is not None]
    if not any(work.gains and work.segments > 1 for work in works):
        yield (
            f"`--streaming-mode {asked.streaming_mode}` changes nothing: on the CPU layers are cut"
            " as finely as they can be, but for those that are rounded by a calibration and are"
            " large"
        )


def placements(checkpoint: Checkpoint, asked: Delivery) -> list[dict[str, Any]]:
    """Where each layer is computed that can be computed in several places or portions."""
    if asked.engine != "local":
        return []
    room = _room(checkpoint, asked)
    unknown = {
        "device": asked.device,
        **dict.fromkeys(("segments", "ahead", "nbytes_host", "nbytes_device")),
    }
    return [
        {
            "tensor": part.name,
            "of_segments": part.work.segments,
            "dtype": part.work.dtype,
            **(
                unknown if room is None else placed(part.work, asked.streaming_mode, room).to_dict()
            ),
        }
        for part in checkpoint.parts
        if part.work is not None
    ]


def peak(checkpoint: Checkpoint, asked: Delivery | None) -> int:
    """Bytes that the part takes of the host that takes most, as it is placed: what a worker may
    need beyond torch itself."""
    room = None if asked is None or asked.engine != "local" else _room(checkpoint, asked)

    def needed(part: Part) -> int:
        if part.work is None or room is None or asked is None:
            return part.nbytes_peak
        return placed(part.work, asked.streaming_mode, room).nbytes_host

    return max(map(needed, checkpoint.parts), default=0)


def memory_told(checkpoint: Checkpoint, asked: Delivery) -> str:
    """What the work takes of memory: each worker, and all of them where the limit is less."""
    each = peak(checkpoint, asked)
    told = f"up to {size(each)} for each worker"
    if asked.engine != "local":
        return told
    workers, limit = _workers(checkpoint, asked), _limit(asked)
    return f"{told}, {size(limit)} for all together" if each * workers > limit else told


def _limit(asked: Delivery) -> int:
    return memory.default_limit() if asked.memory_limit is None else asked.memory_limit


def _workers(checkpoint: Checkpoint, asked: Delivery) -> int:
    return max(1, min(asked.workers or default_workers(), len(checkpoint.parts)))


def _room(checkpoint: Checkpoint, asked: Delivery) -> Room | None:
    """What there is; None of a device without a limit, of which only torch knows what there is,
    and whether it is there."""
    here = Room(host=_limit(asked), workers=_workers(checkpoint, asked))
    if asked.device == CPU:
        return here
    if asked.vram_limit is None:
        return None
    named = "cuda:0" if asked.device in {device.AUTO, "cuda"} else asked.device
    return replace(here, device=named, vram=asked.vram_limit)
