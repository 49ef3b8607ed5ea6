"""Recipe files: rules for layers as JSON, read whole and refused where they are no recipe.

Owns the document around the rules; a rule's own form is `cq.core.recipe.Rule`.
"""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from cq.core import files
from cq.core.errors import InputError
from cq.core.recipe import Rule

_BACKSLASHES = "in JSON a backslash is written twice: `re:blocks\\\\.1\\\\.`"


def load_recipe(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """The rules of a recipe file: `{"cq": 1, "kind": "recipe", "rules": [...]}`.

    Raises: InputError if it cannot be read or is not a recipe.
    """
    shown = os.fspath(path)
    try:
        raw = files.read_document(Path(path))
        document = orjson.loads(raw)
    except OSError as error:
        raise InputError(f"`{shown}` cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        if not raw.strip():
            raise InputError(
                f"`{shown}` is empty",
                hint="the command that was to write it has failed; run it again",
                code="input.recipe",
            ) from error
        raise InputError(
            f"`{shown}` is not JSON: {error}",
            hint=_BACKSLASHES if "escape" in str(error) else None,
            code="input.recipe",
        ) from error
    if not isinstance(document, dict) or document.get("kind") != "recipe":
        raise InputError(
            f"`{shown}` is not a recipe",
            hint='a recipe begins {"cq": 1, "kind": "recipe", "rules": [',
            code="input.recipe",
        )
    if document.get("cq") != 1 or type(document["cq"]) is not int:
        raise InputError(
            f"`{shown}` is a recipe of version {document.get('cq')!r}; this cq reads version 1",
            hint="update cq",
            code="input.version",
        )
    rules = document.get("rules")
    if not isinstance(rules, list):
        raise InputError(f"`{shown}` has no list of `rules`", code="input.recipe")
    return tuple(
        Rule.from_dict(rule, where=f"rule {i + 1} of `{shown}`") for i, rule in enumerate(rules)
    )
