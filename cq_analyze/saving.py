"""Small files that commands write beside checkpoints, such as recipes and pages: whole or not at
all, and never over what is read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cq.core.errors import PlanError, ResourceError
from cq.core.source import SourceFile
from cq.core.text import printable

Name = str | os.PathLike[str]


def check(path: Name, *, inputs: Iterable[SourceFile] = (), force: bool = False) -> None:
    """See, before any work, that the file can be written.

    Raises: PlanError if it is one of `inputs`, is no regular file, or exists, unless `force`;
    ResourceError if its directory is missing.
    """
    target, shown = Path(path), printable(os.fspath(path))
    if any(file.same_file(target) for file in inputs):
        raise PlanError(
            f"`{shown}` is the input itself",
            where=shown,
            hint="choose another output; cq never overwrites what it reads",
            code="plan.output_is_input",
        )
    if os.path.lexists(target) and not os.path.isfile(target):
        raise PlanError(f"`{shown}` is not a regular file", where=shown, code="plan.output_kind")
    if os.path.exists(target) and not force:
        raise PlanError(
            f"`{shown}` exists already",
            where=shown,
            hint="choose another output, or add `--force` to replace it",
            code="plan.output_exists",
        )
    parent = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(parent):
        raise ResourceError(
            f"the directory `{printable(parent)}` does not exist",
            where=shown,
            code="resource.directory",
        )


def save(
    content: str | bytes, path: Name, *, inputs: Iterable[SourceFile] = (), force: bool = False
) -> None:
    """Write `content`, text in UTF-8, under another name first.

    Raises: as `check`; ResourceError if it cannot be written.
    """
    check(path, inputs=inputs, force=force)
    target = Path(os.path.realpath(path))
    partial = None
    try:
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        Path(partial).chmod(0o666 & ~_umask())
        Path(partial).replace(target)
    except (OSError, ValueError) as error:
        if partial is not None and os.path.exists(partial):
            Path(partial).unlink()
        told = (getattr(error, "strerror", None) or str(error)).lower()
        shown = printable(os.fspath(path))
        raise ResourceError(
            f"cannot write `{shown}`: {told}", where=shown, code="resource.output"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
