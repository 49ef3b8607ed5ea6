"""Other dtypes for tensors that are not quantized: `--cast PATTERN=DTYPE`.

Owns the cast as a part; overflow is an error. Torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cq.core import catalog, select
from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import Format
from cq.core.source import largest_cut
from cq.core.text import printable
from cq_edit.draft import Draft, matching

_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Casting:
    """Tensors of a pattern, and the plain format that they become: bf16, fp16 or fp32."""

    pattern: str
    format: str

    @classmethod
    def parse(cls, text: str) -> Casting:
        """The rule `PATTERN=DTYPE`. Raises: UsageError if it is none.

        >>> Casting.parse("*.norm*=fp32")
        Casting(pattern='*.norm*', format='fp32')
        """
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(
                f"`{printable(text)}` names no dtype to cast to",
                hint="write `PATTERN=bf16`, `PATTERN=fp16` or `PATTERN=fp32`",
                code="usage.cast",
            )
        if name not in _DTYPES:
            raise UsageError(
                f"tensors cannot be cast to `{printable(name)}`",
                hint=select.nearest(name, _DTYPES)
                or "choose from bf16, fp16, fp32; `cq quant --format` stores in all others",
                code="usage.cast",
            )
        select.matcher(pattern)
        return cls(pattern, name)


def cast(draft: Draft, rule: Casting) -> None:
    """Carry a rule out: of what it matches, the plain floating-point tensors are cast.

    Raises: PlanError if it matches nothing that can be.
    """
    found = matching([rule.pattern], draft.specs, what="tensor")
    coded = {name for layer in draft.layers().values() for name in layer.owned.values()}
    plain = [name for name in found if draft.spec(name).is_float and name not in coded]
    if not plain:
        name = next(iter(found))
        quantized = name in coded or draft.spec(name).dtype.startswith("F8_")
        what = "part of a quantized layer" if quantized else "not floating point"
        raise PlanError(
            f"`{printable(name)}` of {draft.shown} is {draft.spec(name)}, {what}, so it cannot be"
            " cast",
            where=name,
            hint="store it in another format with `cq quant --requantize`, or make it plain with"
            " `cq quant --format bf16`"
            if quantized
            else "name floating-point tensors",
            code="plan.cast_quantized",
        )
    for name in plain:
        spec = TensorSpec(_DTYPES[rule.format], draft.spec(name).shape)
        if spec != draft.spec(name):
            part = _Cast(draft.part(name), spec, draft.shown).part()
            draft.replace("cast", part, f"`--cast {rule.pattern}={rule.format}`")


@dataclass(frozen=True, slots=True)
class _Cast:
    """One tensor in another dtype."""

    source: Part
    spec: TensorSpec
    shown: str

    @property
    def name(self) -> str:
        return self.source.name

    def part(self) -> Part:
        # The piece in both dtypes, and its sum's; the one before is still with the writer
        before = self.source.tensors[self.name]
        held = 2 * largest_cut(self.spec) * (8 + TensorSpec(before.dtype, ()).nbytes)
        return Part(
            tensors={self.name: self.spec},
            nbytes_peak=2 * self.source.nbytes_peak + held,
            produce=self._produce,
        )

    def _produce(self) -> Iterator[Piece]:
        import torch

        plug: Format = catalog.load("formats", _NAMES[self.spec.dtype])
        for piece in self.source.produce():
            value = plug.store(piece.tensor)["weight"]
            # In float64, whose sums of what is finite in less are finite.
            if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
                lost = int((torch.isfinite(piece.tensor) & ~torch.isfinite(value)).sum())
                if lost:
                    raise InputError(
                        f"{lost} values of `{printable(self.name)}` of {self.shown} overflow"
                        f" {_NAMES[self.spec.dtype]}",
                        where=self.name,
                        hint="cast to bf16 or fp32, which reach further",
                        code="input.overflow",
                    )
            yield Piece(self.name, piece.start, value)
