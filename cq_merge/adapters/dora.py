"""DoRA: the magnitudes of a weight's rows, or of its columns, beside what another kind changes.

With the other kind's change `D` and `V = W + D` the weight becomes
`W + strength * (V * magnitude / norm(V) - W)`. `.dora_scale` of shape `(N, 1, ...)` is for rows, of
`(1, K, ...)` for input channels; PEFT's magnitude vector is for rows.

Source: DoRA, arXiv 2402.09353; PEFT `tuners/lora/dora.py` and `variants.py`; LyCORIS
`functional/general.py:weight_decompose`; ComfyUI `comfy/weight_adapter/base.py:weight_decompose`,
which divides rows by the norms of `W`, adds an epsilon to norms, and ignores PEFT's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.text import printable
from cq_merge.adapters import Additive, Apply, Change, Reading
from cq_merge.changes import UNCHANGED, Inert, bounded, contradiction, nbytes_run, runs
from cq_merge.contents import Contents
from cq_merge.rotations import Rotation

if TYPE_CHECKING:
    import torch

_KINDS = ("lora", "loha", "lokr", "glora", "oft", "boft")
_SCALE = ".dora_scale"
_VECTORS = (
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default",
    ".lora_magnitude_vector.default.weight",
)
_ROW_NORMS = "ComfyUI divides DoRA's rows by their norms before the change, not after it"
_IGNORED = "ComfyUI ignores PEFT's magnitude vectors and applies the factors alone"
_ROTATED = "ComfyUI multiplies a rotation by its alpha under DoRA, by 0 without one"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraChange(Additive):
    """A change `inner` and the magnitudes `name` of what it makes of the weight.

    `axis` says what has a magnitude each.
    """

    contents: Contents
    inner: Change
    name: str
    axis: Literal["rows", "columns"]
    as_comfyui: bool

    @property
    def key(self) -> str:
        """The other change's."""
        return self.inner.key

    @property
    def tensors(self) -> tuple[str, ...]:
        """The other change's tensors, and the magnitudes."""
        return (*self.inner.tensors, self.name)

    @property
    def rank(self) -> int | None:
        """The other change's."""
        return self.inner.rank

    @property
    def alpha(self) -> float | None:
        """The other change's."""
        return self.inner.alpha

    @property
    def remarks(self) -> tuple[str, ...]:
        """The other change's, and where ComfyUI does something else here."""
        if self.name.endswith(_VECTORS):
            return (*self.inner.remarks, _IGNORED)
        if any(remark.endswith(UNCHANGED) for remark in self.inner.remarks):
            return self.inner.remarks
        rotated = (_ROTATED,) if isinstance(self.inner, Rotation) else ()
        rows = (_ROW_NORMS,) if self.axis == "rows" else ()
        return (*self.inner.remarks, *rotated, *rows)

    @property
    def reads_base(self) -> bool:
        """Magnitudes are of the weight with its change."""
        return True

    @property
    def whole(self) -> bool:
        """A column's norm reaches over all rows."""
        return self.axis == "columns" or self.inner.whole

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The other change's."""
        return self.inner.shape(weight)

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the other change does not fit, or there are more or fewer magnitudes."""
        refusal = self.inner.refuse(weight)
        if refusal is not None:
            return refusal
        along = self.shape(weight.shape)[0 if self.axis == "rows" else 1 :][:1]
        spec = self.contents.spec(self.name)
        if along == (spec.numel,):
            return None
        return f"the magnitudes `{printable(self.name)}` {spec} are for {spec.numel} {self.axis}"

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """What the other change makes of the rows, and a run of its sum with them, squared."""
        own = self.contents.nbytes_whole(self.name, 8)
        lines = rows if self.axis == "rows" else columns
        held = rows * columns * itemsize + 6 * lines * 8
        run = nbytes_run(rows, columns, itemsize + 2 * 8)
        return own + held + run + self.inner.nbytes_peak(rows, columns, itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Read the magnitudes, and what the other change reads."""
        import torch

        change = self.inner.load(dtype)
        magnitudes = self.contents.matrix(self.name, torch.float64).view(-1)
        within = self.as_comfyui and isinstance(self.inner, Rotation)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            delta = torch.zeros_like(base)
            change(base, delta, first, strength if within else 1.0)
            if self.axis == "rows":
                own = magnitudes[first : first + len(rows)]
                factors = self._factors(own, self._row_norms(base, delta), dtype).view(-1, 1)
            else:
                norms = _column_norms(base, delta, len(magnitudes))
                factors = self._factors(magnitudes, norms, dtype)
                factors = factors.repeat_interleave(base.shape[1] // len(magnitudes))
            # factors * (W + D) - W, without taking numbers from others of almost their size.
            less, factors = (factors - 1).to(dtype), factors.to(dtype)
            delta.mul_(factors).addcmul_(base, less)
            rows.add_(delta, alpha=bounded(strength, rows))

        return apply

    def _row_norms(self, base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        import torch

        norms = torch.empty(len(base), dtype=torch.float64)
        for start, stop in runs(*base.shape):
            run = base[start:stop]
            if not self.as_comfyui:
                run = run + delta[start:stop]
            norms[start:stop] = run.double().square().sum(1).sqrt()
        return norms

    def _factors(
        self, magnitudes: torch.Tensor, norms: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """What each row or column of the changed weight is multiplied by, in float64."""
        import torch

        if self.as_comfyui:
            return magnitudes / (norms + torch.finfo(dtype).eps)
        # What has no direction has no magnitude either: zeros stay zeros.
        return torch.where(norms > 0, magnitudes / norms, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored(Additive):
    """A change `inner` whose magnitudes `name` ComfyUI does not look at."""

    inner: Change
    name: str
    said: tuple[str, ...]

    @property
    def key(self) -> str:
        """The other change's."""
        return self.inner.key

    @property
    def tensors(self) -> tuple[str, ...]:
        """The other change's tensors, and the magnitudes."""
        return (*self.inner.tensors, self.name)

    @property
    def rank(self) -> int | None:
        """The other change's."""
        return self.inner.rank

    @property
    def alpha(self) -> float | None:
        """The other change's."""
        return self.inner.alpha

    @property
    def remarks(self) -> tuple[str, ...]:
        """The other change's, and that this is so."""
        return (*self.inner.remarks, *self.said)

    @property
    def reads_base(self) -> bool:
        """The other change's."""
        return self.inner.reads_base

    @property
    def whole(self) -> bool:
        """The other change's."""
        return self.inner.whole

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The other change's."""
        return self.inner.shape(weight)

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the other change does not fit."""
        return self.inner.refuse(weight)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """The other change's."""
        return self.inner.nbytes_peak(rows, columns, itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """The other change alone."""
        return self.inner.load(dtype)


def _column_norms(base: torch.Tensor, delta: torch.Tensor, channels: int) -> torch.Tensor:
    """Norms of the sum by input channel, whatever the kernel position, in float64."""
    import torch

    squared = torch.zeros(base.shape[1], dtype=torch.float64)
    for start, stop in runs(*base.shape):
        squared += (base[start:stop] + delta[start:stop]).double().square().sum(0)
    return squared.view(channels, -1).sum(1).sqrt()


class _Dora:
    kind: ClassVar[str] = "dora"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with magnitudes whose other tensors another kind claims."""
        names = {
            name.removesuffix(ending): name
            for name in sorted(source.names)
            for ending in (_SCALE, *_VECTORS)
            if name.endswith(ending)
        }
        if not names:
            return []
        return [
            _change(source, reading, change, names[change.key])
            for kind in _KINDS
            for change in catalog.load("adapters", kind).claim(source, reading)
            if change.parameter == "weight" and change.key in names
        ]

    def partner(self, name: str) -> str | None:
        """A factor of LoRA, the kind that magnitudes come with most."""
        if name.endswith(_SCALE):
            return name.removesuffix(_SCALE) + ".lora_up.weight"
        for ending in _VECTORS:
            if name.endswith(ending):
                return name.removesuffix(ending) + ".lora_B.weight"
        return None


PLUG = _Dora()


def _change(source: Contents, reading: Reading, inner: Change, name: str) -> Change:
    axis = _axis(source, name)
    if reading.as_comfyui and (isinstance(inner, Inert) or name.endswith(_VECTORS)):
        said = (_IGNORED,) if name.endswith(_VECTORS) else ()
        return Ignored(inner=inner, name=name, said=said)
    if reading.as_comfyui and isinstance(inner, Rotation):
        inner = replace(inner, decomposed=True)
    return DoraChange(
        contents=source, inner=inner, name=name, axis=axis, as_comfyui=reading.as_comfyui
    )


def _axis(source: Contents, name: str) -> Literal["rows", "columns"]:
    """Which way magnitudes go. Raises: InputError if their shape is of neither."""
    spec = source.floating(name)
    # PEFT's for convolutions stand along the second dimension, and are for rows all the same.
    if spec.numel and (name.endswith(_VECTORS) and max(spec.shape, default=1) == spec.numel):
        return "rows"
    if spec.numel and spec.shape[:1] == (spec.numel,):
        return "rows"
    if spec.numel and spec.shape[:2] == (1, spec.numel):
        return "columns"
    raise contradiction(source, [name], "are magnitudes of neither rows nor columns")
