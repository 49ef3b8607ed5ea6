"""Where layers are computed, as commands are asked for it and tell of it.

Owns what `--device`, `--streaming-mode`, `--quip-checkpointed` and `--vram-limit` mean together,
and how a plan tells of placements. A plan imports no torch, so that of a GPU it knows only what it
is told.
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
from cq.core.streaming import CPU, Checkpointed, Room

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
    if asked.engine == "ray" and ":" in asked.device:
        raise UsageError(
            f"`--engine ray` takes no `--device {asked.device}`: Ray gives each worker a GPU",
            hint="use `--device cuda`, or `--device auto` for GPUs if the cluster has any",
            code="usage.device",
        )


def checkpointed(wanted: bool, columns: int | None, segments: int | None) -> Checkpointed | None:
    """What `--quip-checkpointed` and its two numbers, which ask for it as well, mean together."""
    if not wanted and columns is None and segments is None:
        return None
    usual = Checkpointed()
    return Checkpointed(
        usual.columns if columns is None else columns,
        usual.segments if segments is None else segments,
    )


def found(asked: Delivery, command: str) -> str:
    """The device that was asked for; the word itself for a cluster, whose machines are others.

    Raises: ResourceError if it is not there.
    """
    if asked.engine != "local":
        return asked.device
    where = device.found(asked.device)
    if asked.device == device.AUTO:
        terminal().say(f"{command}: `--device auto` is `{where}` here")
    return where


def remarks(checkpoint: Checkpoint, asked: Delivery) -> Iterator[str]:
    """What is said of modes that were asked for and change nothing."""
    works = [part.work for part in checkpoint.parts if part.work is not None]
    wide = asked.quip_checkpointed
    if wide is not None and not any(work.most(wide) < work.segments for work in works):
        yield (
            f"`--quip-checkpointed` changes nothing: no layer of {wide.columns} columns or more"
            " is rounded by a calibration in several segments of rows"
        )
    if asked.streaming_mode == "auto" or asked.device != CPU:
        return
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
    room, settings = _room(checkpoint, asked), asked.settings(CPU)
    unknown = {
        "device": asked.device,
        **dict.fromkeys(("segments", "ahead", "nbytes_host", "nbytes_device")),
    }
    return [
        {
            "tensor": part.name,
            "of_segments": part.work.segments,
            "dtype": part.work.dtype,
            **(unknown if room is None else settings.placed(part.work, room).to_dict()),
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
        return asked.settings(CPU).placed(part.work, room).nbytes_host

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
