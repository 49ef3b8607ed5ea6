"""Names of a package that are imported when they are first asked for.

`cq --help` must answer at once, and importing a command package must not import what the command
does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds each name of `homes` in the module that it is mapped to.

    A module alone holds the object under the same name; `module:other` under another one. `dir` of
    the package lists the names.

    Source: PEP 562.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module `{package}` has no attribute `{name}`")
        module, _, other = homes[name].partition(":")
        value = getattr(importlib.import_module(module), other or name)
        setattr(sys.modules[package], name, value)  # asked for once
        return value

    sys.modules[package].__dir__ = lambda: sorted(homes)  # type: ignore[method-assign]
    return find
