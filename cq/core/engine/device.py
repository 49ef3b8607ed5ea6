"""Which device computes: what was asked for, what there is, and what it has of memory.

Owns the words of `--device` and everything that is asked of torch's devices but copies. The words
are read without torch; what is there is found when the work begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cq.core.errors import ResourceError, Unfinished, UsageError
from cq.core.streaming import CPU
from cq.core.text import printable

AUTO = "auto"
_SHARE = 0.8  # of the free VRAM: what torch keeps and does not use is nobody's, but taken


def parse_device(word: str) -> str:
    """The word, if it can name a device. Raises: UsageError.

    >>> parse_device("cuda:1")
    'cuda:1'
    """
    if word in {AUTO, CPU} or re.fullmatch(r"cuda(:\d{1,3})?", word):
        return word
    raise UsageError(
        f"`{printable(word)}` is not a device",
        hint="choose from `auto`, `cpu`, `cuda` and `cuda:N`",
        code="usage.device",
    )


def found(word: str) -> str:
    """The device that a word means on this machine: `cpu`, or `cuda:N`; `auto` is the first CUDA
    device if there is one.

    Raises: ResourceError if it is not there.
    """
    if word == CPU:
        return CPU
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == AUTO:
        return "cuda:0" if count else CPU
    index = int(word.partition(":")[2] or 0)
    if index < count:
        return f"cuda:{index}"
    if count:
        there = ", ".join(f"`cuda:{n}`" for n in range(count))
        raise ResourceError(
            f"there is no device `{word}`",
            hint=f"there is {there}; or leave `--device` out to compute on the CPU",
            code="resource.device",
        )
    reason = (
        f"torch {torch.__version__} is built without CUDA"
        if torch.version.cuda is None
        else "torch finds no CUDA device, or no driver for it"
    )
    raise ResourceError(
        f"there is no device `{word}`: {reason}",
        hint="leave `--device` out to compute on the CPU, or install a torch build for your GPU"
        " (https://pytorch.org/get-started)",
        code="resource.device",
    )


def vram(device: str, limit: int | None) -> int:
    """Bytes that parts may take on `device` together: `limit`, or a share of what is free, and no
    more than that in any case; 0 on the CPU."""
    if device == CPU:
        return 0
    import torch

    free = int(torch.cuda.mem_get_info(torch.device(device))[0] * _SHARE)
    return free if limit is None else min(limit, free)


def one_thread() -> None:
    """Let torch's operators in this thread use one thread, as all workers do: another number of
    threads is another order of sums."""
    import torch

    torch.set_num_threads(1)


def give_back() -> None:
    """Return what torch keeps of a device's memory without using it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def failures_told(name: str, device: str) -> Iterator[None]:
    """Within it a device that runs out of memory, or fails, is a ResourceError about the tensor
    `name`."""
    if device == CPU:
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        give_back()
        raise Unfinished(
            f"the memory of `{device}` ran out at `{printable(name)}`",
            hint="lower `--vram-limit`, close what else uses the device, or leave `--device` out;"
            " what is finished is kept",
            code="resource.vram",
        ) from error
    except torch.AcceleratorError as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unfinished(
            f"`{device}` failed at `{printable(name)}`: {told}",
            hint="run the same command again, or leave `--device` out; what is finished is kept",
            code="resource.device",
        ) from error
