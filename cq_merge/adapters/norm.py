"""Differences of normalization layers: `weight + strength * w_norm`, `bias + strength * b_norm`.

Source: LyCORIS `modules/norms.py:NormModule`; ComfyUI `comfy/lora.py:load_lora`, which reads
`b_norm` only beside `w_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cq_merge.adapters import Change, Reading
from cq_merge.changes import Difference, Inert
from cq_merge.contents import Contents

_WEIGHT, _BIAS = ".w_norm", ".b_norm"
_ALONE = f"ComfyUI leaves out a `{_BIAS}` without a `{_WEIGHT}`"


class _Norm:
    kind: ClassVar[str] = "norm"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every difference."""
        return [
            _change(source, reading, name)
            for name in sorted(source.names)
            if name.endswith((_WEIGHT, _BIAS))
        ]

    def partner(self, name: str) -> str | None:
        """A difference stands by itself."""
        return name if name.endswith((_WEIGHT, _BIAS)) else None


PLUG = _Norm()


def _change(source: Contents, reading: Reading, name: str) -> Change:
    source.floating(name)
    if name.endswith(_WEIGHT):
        key = name.removesuffix(_WEIGHT)
        return Difference(contents=source, key=key, name=name, parameter="weight")
    key = name.removesuffix(_BIAS)
    said = () if key + _WEIGHT in source else (_ALONE,)
    if said and reading.as_comfyui:
        return Inert(key=key, tensors=(name,), parameter="bias", said=said)
    return Difference(contents=source, key=key, name=name, parameter="bias", said=said)
