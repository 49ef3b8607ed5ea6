"""Quantized layers as plain floats again: decoding row by row, and the stage that does it to a
checkpoint.

Owns what lies between stored tensors and weights: segments that a format can decode, padding,
stacked experts, smoothing, and the memory that it takes. Which tensors make up a layer is said by
`cq.core.stored`, what they mean by the formats. Torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cq.core import comfy, rotation, select
from cq.core.checkpoint import Checkpoint, Part, Piece, Stage, narrowed
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.rows import Rows, held_together, read_apart
from cq.core.source import cuts, largest_cut
from cq.core.stored import SCALED_FP8, SMOOTHING, Stored, matrix_specs, stored_layers

if TYPE_CHECKING:
    import torch

DTYPES = ("F32", "BF16", "F16", "source")
_TILE_ROWS = 128  # segments that formats decode begin at multiples of it
_MANY_ROWS = 1 << 40  # more than a cut has: its height then depends on the columns alone
# Per weight of a segment: levels, spread scales and a rotation in float32, and unpacked codes.
# Measured with all formats: up to 20 bytes with everything that a part holds.
_BYTES_DECODING = 4 * 4
_DTYPE_NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


class Witness(Protocol):
    """Whoever looks at a layer while it is decoded."""

    def wants(self, start: int, rows: int) -> bool:
        """Whether to be shown the segment of so many stored rows from `start` on."""
        ...

    def see(
        self,
        packed: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        value: torch.Tensor,
    ) -> None:
        """A segment as it is stored, and as it is decoded."""
        ...


@dataclass(frozen=True, slots=True)
class Decoder:
    """A stored layer on its way back to float32, in bounded memory.

    `shape` is what the weight is cropped to: that of `stored`, or one that is known better.
    `witness` is shown the segments that it wants before they are cropped: the stored rows, the
    first row's number, what lies beside them, and the float32 rows that they mean. All others are
    then decoded as near as float32 sums in any order are, which takes less time; without a witness
    all are decoded as ComfyUI does, to the last bit.
    """

    source: Checkpoint
    stored: Stored
    shape: tuple[int, ...]
    witness: Witness | None = None

    @property
    def beside(self) -> list[str]:
        """Full names of the tensors that must be known whole before the first row."""
        return [name for own, name in self.stored.names.items() if own != "weight"]

    @property
    def nbytes_peak(self) -> int:
        """What reading and decoding hold at most, without the decoded rows themselves."""
        stored, specs = self.stored, self.source.specs
        nbytes = self.source.part(stored.names["weight"]).nbytes_peak
        # Pieces wait to be joined to segments of another height
        nbytes += 2 * TensorSpec(stored.weight.dtype, (largest_cut(stored.weight),)).nbytes
        parts = {id(part): part for part in map(self.source.part, self.beside)}
        nbytes += max((part.nbytes_peak for part in parts.values()), default=0)
        nbytes += 2 * sum(specs[name].nbytes for name in self.beside)
        if held_together(self.source, stored.names["weight"], self.beside):
            nbytes += stored.weight.nbytes
        if stored.format.casts:
            return nbytes + largest_cut(stored.weight) * 4
        rows, columns = self._stored_rows, self._matrix[1]
        segment = max((stop - start for start, stop in self._spans(rows, columns)), default=0)
        return nbytes + segment * columns * _BYTES_DECODING

    def read(self) -> tuple[Iterable[torch.Tensor], dict[str, torch.Tensor]]:
        """The stored weight's row segments, and the whole tensors beside it by local name; each
        part is produced once."""
        names = self.stored.names
        segments, others = read_apart(self.source, names["weight"], self.beside)
        return segments, {own: others[name] for own, name in names.items() if own != "weight"}

    def rows(
        self, segments: Iterable[torch.Tensor], beside: Mapping[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """The weight in float32, in row segments of any height; of stacked experts one each.

        `segments` and `beside` are what `read` gave.
        """
        if self.stored.format.casts:
            for segment in segments:
                yield segment.float()
            return
        rows = Rows(segments)
        if len(self.stored.weight.shape) != 3:
            for value in self._decoded(rows, beside):
                yield value.reshape(value.shape[0], *self.shape[1:])
            return
        for index in range(self.stored.weight.shape[0]):
            yield self._expert(index, rows.take(1)[0], beside)

    def _expert(
        self, index: int, packed: torch.Tensor, beside: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        import torch

        experts = self.stored.weight.shape[0]
        own = {n: t[index] if t.shape[:1] == (experts,) else t for n, t in beside.items()}
        found = torch.empty((1, *self.shape[1:]), dtype=torch.float32)
        start = 0
        for value in self._decoded(Rows([packed]), own):
            found[0, start : start + value.shape[0]] = value
            start += value.shape[0]
        return found

    def _decoded(self, rows: Rows, beside: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """The rows of one matrix, cropped and with the smoothing of the activations undone."""
        height, columns = self._matrix
        scales = {own: tensor for own, tensor in beside.items() if own != SMOOTHING}
        # It multiplies the activations before they are quantized: as much as the weight's columns.
        smoothing = beside[SMOOTHING].float() if SMOOTHING in beside else None
        for start, stop in self._spans(self._stored_rows, columns):
            if start >= height:
                return
            packed = rows.take(stop - start)
            packed = packed.reshape(packed.shape[0], -1)
            value = self._unpacked(packed, start, scales)
            value = value[: height - start, :columns]
            yield value if smoothing is None else value * smoothing

    def _unpacked(
        self, packed: torch.Tensor, start: int, scales: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        plug, settings = self.stored.format, self.stored.settings
        if self.witness is not None and not self.witness.wants(start, packed.shape[0]):
            near, group = plug.unturned(settings)
            value = plug.unpack(packed, start, scales, near)
            return value if group is None else rotation.rotate(value, group)
        value = plug.unpack(packed, start, scales, settings)
        if self.witness is not None:
            self.witness.see(packed, start, scales, value)
        return value

    @property
    def _matrix(self) -> tuple[int, int]:
        """`(N, K)` of one matrix."""
        if len(self.shape) == 3:
            return self.shape[1], self.shape[2]
        return self.shape[0], TensorSpec("F32", self.shape).row_numel

    @property
    def _stored_rows(self) -> int:
        return matrix_specs({"weight": self.stored.weight})["weight"].shape[0]

    def _spans(self, rows: int, columns: int) -> Iterator[tuple[int, int]]:
        if self.stored.format.whole:
            return iter([(0, rows)])
        step = next(cuts(TensorSpec("F32", (_MANY_ROWS, columns))))[1]
        step = max(_TILE_ROWS, step // _TILE_ROWS * _TILE_ROWS)
        return ((start, min(rows, start + step)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantize:
    """Makes an ordinary checkpoint of a quantized one: the weight of every quantized layer, plain
    8-bit floats among them, becomes a float tensor.

    `dtype` is F32, which keeps every decoded value, BF16, F16, or `source`: what the layer's marker
    says its weight was before (`orig_dtype`), BF16 where it says nothing. With `layers` these alone
    are dequantized, the others stay quantized. Scales, markers and the header's entries go; what
    was never quantized stays as it is, unread.
    """

    name: ClassVar[str] = "dequantize"

    dtype: str = "F32"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(
                f"weights cannot be dequantized to `{self.dtype}`",
                hint="choose from " + ", ".join(DTYPES),
            )

    def arguments(self) -> dict[str, Any]:
        """The fields; `layers` only if it is not all of them."""
        some = {} if self.layers is None else {"layers": list(self.layers)}
        return {"dtype": self.dtype, **some}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown or ill-typed argument."""
        select.refuse_unknown(arguments, ["dtype", "layers"], "the dequantize stage")
        dtype = arguments.get("dtype", "F32")
        if dtype not in DTYPES:
            raise InputError(
                f"the dequantize stage's argument `dtype` cannot be `{dtype!r}`",
                hint="choose from " + ", ".join(DTYPES),
                code="input.manifest",
            )
        if "layers" not in arguments:
            return cls(dtype=dtype)
        some = arguments["layers"]
        if not isinstance(some, list) or not all(isinstance(layer, str) for layer in some):
            raise InputError(
                f"the dequantize stage's argument `layers` cannot be `{some!r}`",
                hint="it is a list of layer names",
                code="input.manifest",
            )
        return cls(dtype=dtype, layers=tuple(some))

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The plain checkpoint. Raises: InputError for a layer that no format reads, PlanError if
        nothing is quantized."""
        stored = stored_layers(source)
        if not stored and not comfy.find_quantized(source):
            raise PlanError("there is no quantized layer to dequantize", code="plan.not_quantized")
        chosen = {n: o for n, o in stored.items() if self.layers is None or n in self.layers}
        layers = {
            layer.names["weight"]: _Layer(Decoder(source, layer, layer.shape), self._dtype(layer))
            for layer in chosen.values()
        }
        gone = {name for layer in chosen.values() for name in layer.owned} - set(layers)
        left = [layer for name, layer in stored.items() if name not in chosen]
        if not any(layer.evidence == SCALED_FP8 for layer in left):
            gone |= {name for name in source.specs if name.rpartition(".")[2] == SCALED_FP8}
        parts: list[Part] = []
        for part in source.parts:
            parts += [layers[name].part() for name in part.tensors if name in layers]
            rest = [name for name in part.tensors if name not in layers and name not in gone]
            if rest:
                parts.append(part if len(rest) == len(part.tensors) else narrowed(part, rest))
        notes = tuple(layer.note() for layer in layers.values())
        return source.after(self, parts=tuple(parts), metadata=_metadata(source, left), notes=notes)

    def _dtype(self, layer: Stored) -> str:
        if self.dtype != "source":
            return self.dtype
        return _DTYPE_NAMES.get(str(layer.settings.get("orig_dtype")), "BF16")


def _metadata(source: Checkpoint, left: Iterable[Stored]) -> dict[str, str]:
    """The metadata, with the header's entries of the layers that stay quantized."""
    found = {key: value for key, value in source.metadata.items() if key != comfy.HEADER_KEY}
    entries = {layer.layer: layer.settings for layer in left if layer.evidence == "header"}
    return {**found, comfy.HEADER_KEY: comfy.header_value(entries)} if entries else found


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's way to a plain tensor, as a part."""

    decoder: Decoder
    dtype: str

    @property
    def name(self) -> str:
        return self.decoder.stored.names["weight"]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.decoder.shape)

    def part(self) -> Part:
        # A decoded segment in both dtypes, and the piece that it is joined to
        held = largest_cut(self.spec) * (4 + 2 * TensorSpec(self.dtype, ()).nbytes)
        return Part(
            tensors={self.name: self.spec},
            nbytes_peak=self.decoder.nbytes_peak + held,
            produce=self._produce,
        )

    def _produce(self) -> Iterator[Piece]:
        rows = Rows(map(self._cast, self.decoder.rows(*self.decoder.read())))
        for start, stop in cuts(self.spec):
            tensor = rows.take(stop - start) if self.spec.shape else rows.whole()
            yield Piece(self.name, start, tensor)

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        import torch

        found = value.to(torch_dtype(self.dtype)).contiguous()
        # What was not finite before is the file's own; a finite sum shows in one pass that all is.
        if found.dtype != torch.float32 and not bool(
            torch.isfinite(found.sum(dtype=torch.float64))
        ):
            lost = int((torch.isfinite(value) & ~torch.isfinite(found)).sum())
            if lost:
                shown = ", ".join(source.shown for source in self.decoder.source.sources)
                raise InputError(
                    f"{lost} weights of `{self.name}` of `{shown}` overflow {self.dtype}",
                    where=self.name,
                    hint="dequantize to BF16 or F32, which reach further",
                    code="input.overflow",
                )
        return found

    def note(self) -> dict[str, Any]:
        """What becomes of the layer, as plain JSON."""
        stored, specs = self.decoder.stored, self.decoder.source.specs
        return {
            "layer": stored.layer,
            "shape": list(self.spec.shape),
            "dtype": self.dtype,
            "action": "dequantize",
            "reason": f"{stored.label}, as its {_EVIDENCE[stored.evidence]} says",
            "format": stored.label,
            "evidence": stored.evidence,
            "nbytes": sum(specs[name].nbytes for name in stored.owned),
            "nbytes_after": self.spec.nbytes,
        }


_EVIDENCE = {
    "header": f"entry in `{comfy.HEADER_KEY}`",
    "marker": "marker",
    SCALED_FP8: "scale in the old `scaled_fp8` form",
    "scale": "scale's shape, for want of a marker,",
    "dtype": "dtype",
}
