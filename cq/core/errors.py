"""The one tree of errors that the library raises.

Owns: what went wrong, where, what to do, and the exit code that a shell sees. Only `cq.cli` prints
these; library code raises them and a Python user catches `CqError`.
"""

from __future__ import annotations

from typing import ClassVar


class CqError(Exception):
    """Something that a user can act on: a sentence, the place, and a hint.

    `message` is one sentence in lower case without a full stop, literals in backticks. `where`
    names the file or tensor when the sentence does not. `hint` says what to do. `code` is a stable
    slug for programs, such as `input.truncated`.
    """

    exit_code: ClassVar[int] = 70
    default_code: ClassVar[str] = "bug"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        """The sentence and, for those who see it in a traceback, what to do."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_dict(self) -> dict[str, object]:
        """The error as the JSON object that `--json` puts on stderr."""
        return {
            "cq": 1,
            "kind": "error",
            "code": self.code,
            "exit": self.exit_code,
            "message": self.message,
            "where": self.where,
            "hint": self.hint,
        }


class UsageError(CqError):
    """The command or call was worded wrongly."""

    exit_code = 2
    default_code = "usage"


class InputError(CqError):
    """A file cannot be read or is not what it claims to be."""

    exit_code = 3
    default_code = "input"


class PlanError(CqError):
    """The inputs are sound, but what was asked for cannot be done with them."""

    exit_code = 4
    default_code = "plan"


class ResourceError(CqError):
    """Disk, memory or a device is missing or too small."""

    exit_code = 5
    default_code = "resource"


class Unfinished(ResourceError):
    """What computed went away, such as a device or the workers of a cluster; finished parts are
    kept, and the same command goes on from there."""


class InternalError(CqError):
    """A promise between two rooms of cq was broken: a bug to report, never a file."""


class Interrupted(CqError):
    """The user stopped the work; finished parts are kept and the same command goes on from
    there."""

    exit_code = 130
    default_code = "interrupted"


class Terminated(Interrupted):
    """A scheduler or the system stopped the work by SIGTERM; finished parts are kept as well."""

    exit_code = 143
    default_code = "terminated"
