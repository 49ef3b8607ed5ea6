"""Full differences: `weight + strength * diff`, `bias + strength * diff_b`.

Source: LyCORIS `modules/full.py:FullModule`; ComfyUI `comfy/lora.py:load_lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cq_merge.adapters import Change, Parameter, Reading
from cq_merge.changes import Difference
from cq_merge.contents import Contents

_ENDINGS: tuple[tuple[str, Parameter], ...] = ((".diff", "weight"), (".diff_b", "bias"))


class _Diff:
    kind: ClassVar[str] = "diff"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every difference."""
        changes: list[Change] = []
        for name in sorted(source.names):
            for ending, parameter in _ENDINGS:
                if name.endswith(ending):
                    source.floating(name)
                    key = name.removesuffix(ending)
                    changes.append(
                        Difference(contents=source, key=key, name=name, parameter=parameter)
                    )
        return changes

    def partner(self, name: str) -> str | None:
        """A difference stands by itself."""
        return name if name.endswith(tuple(ending for ending, _ in _ENDINGS)) else None


PLUG = _Diff()
