"""Where layers are computed, as commands are asked for it and tell of it.

Owns what `--device`, `--streaming-mode` and `--vram-limit` mean together, and how a plan tells of
placements. A plan imports no torch, so that of a GPU it knows only what it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cq.cli.options import terminal
from cq.core.checkpoint import Checkpoint
from cq.core.engine import device, memory
from cq.core.engine.local import default_workers
from cq.core.errors import UsageError
from cq.core.streaming import CPU, DTYPE, Room, placed

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
    limit = memory.default_limit() if asked.memory_limit is None else asked.memory_limit
    workers = asked.workers or default_workers()
    room: Room | None = Room(host=limit, workers=workers)
    if asked.device != CPU:
        # Without a limit only torch knows what there is of a device, and whether there is one.
        named = "cuda:0" if asked.device in {device.AUTO, "cuda"} else asked.device
        vram = asked.vram_limit
        room = None if vram is None else Room(host=limit, workers=workers, device=named, vram=vram)
    unknown = {
        "device": asked.device,
        "dtype": DTYPE,
        **dict.fromkeys(("segments", "ahead", "nbytes_host", "nbytes_device")),
    }
    return [
        {
            "tensor": part.name,
            "of_segments": part.work.segments,
            **(
                unknown if room is None else placed(part.work, asked.streaming_mode, room).to_dict()
            ),
        }
        for part in checkpoint.parts
        if part.work is not None
    ]
