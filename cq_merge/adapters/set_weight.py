"""Values that take the place of a weight, whatever the strength, as long as that is not 0.

Source: ComfyUI `comfy/lora.py:load_lora` and `calculate_weight` (`set_weight`). Black Forest Labs'
control adapters bring their own normalization gains so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import TensorSpec
from cq_merge.adapters import Additive, Apply, Change, Reading
from cq_merge.changes import add_towards, nbytes_towards, unlike
from cq_merge.contents import Contents

if TYPE_CHECKING:
    import torch

_ENDING = ".set_weight"
_ANY = "the value takes the place of the weight at any strength but 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetChange(Additive):
    """The value `name` of the weight's own shape."""

    contents: Contents
    key: str
    name: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The value."""
        return (self.name,)

    @property
    def remarks(self) -> tuple[str, ...]:
        """That a strength has no effect."""
        return (_ANY,)

    @property
    def reads_base(self) -> bool:
        """What is added to the weight is what it lacks."""
        return True

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the shapes differ in more than ones."""
        return unlike(self.contents, self.name, weight)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Rows of the value, and the way to it."""
        own = self.contents.nbytes_rows(self.name, rows * columns, itemsize)
        return own + nbytes_towards(rows, columns, itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Nothing is read before the rows that need it."""

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            if strength:
                stop = first + len(rows)
                value = self.contents.matrix(self.name, dtype, start=first, stop=stop)
                add_towards(base, rows, value, 1.0)

        return apply


class _Set:
    kind: ClassVar[str] = "set_weight"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every value."""
        names = sorted(name for name in source.names if name.endswith(_ENDING))
        for name in names:
            source.floating(name)
        return [
            SetChange(contents=source, key=name.removesuffix(_ENDING), name=name) for name in names
        ]

    def partner(self, name: str) -> str | None:
        """A value stands by itself."""
        return name if name.endswith(_ENDING) else None


PLUG = _Set()
