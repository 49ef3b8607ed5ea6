"""Names from outside as text that is fit to show and to store."""

from __future__ import annotations


def as_text(name: str) -> str:
    """A file name as text that JSON can hold; bytes of it that are not UTF-8 become `?` signs."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable(text: str, limit: int = 200) -> str:
    """`text` fit for a message: one line, no control characters, at most `limit` characters."""
    clean = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
