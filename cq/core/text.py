"""Names from outside as text that is fit to show and to store."""

from __future__ import annotations

import re

_BLOCK_NUMBER = re.compile(r"(^|\.)\d+(?=\.)")


def as_text(name: str) -> str:
    """A file name as text that JSON can hold; bytes of it that are not UTF-8 become `?` signs."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable(text: str, limit: int = 200) -> str:
    """`text` fit for a message: one line, no control characters, at most `limit` characters."""
    if text.isprintable() and len(text) <= limit:
        return text
    clean = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def folded(name: str) -> str:
    """A layer's name with its block numbers folded, so that equal layers have one name.

    >>> folded("double_blocks.17.img_mlp.0")
    'double_blocks.*.img_mlp.0'
    """
    return _BLOCK_NUMBER.sub(r"\1*", name)
