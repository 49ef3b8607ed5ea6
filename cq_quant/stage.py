"""The quantize stage: which layers, in which format, and the parts that compute them.

Owns the meeting of recipe, format and optimizer. Plans from specs alone; torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import catalog, comfy, recipe, rotation, select
from cq.core.checkpoint import Checkpoint, Part, Piece, Stage, constant_part, narrowed
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import Format
from cq.core.grid import Grid
from cq.core.source import largest_cut
from cq_quant.optimizers import Optimizer

if TYPE_CHECKING:
    import torch

ROTATIONS = ("auto", "off", "256", "64", "16")
# float32 rows, the two steps of their rotation, the scaled copy, and codes twice: the segment
# before is still in the hands of the writer
_BYTES_PER_ELEMENT = 4 + 4 + 4 + 4 + 1 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantStage:
    """Stores the linear layers of a checkpoint quantized. See `quantize` for the fields."""

    name: ClassVar[str] = "quant"

    format: str = "int8_tensorwise"
    scaling: str = "row"
    optimizer: str = "quip"
    rotate: str = "auto"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    save_quant_metadata: bool = False

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown or ill-typed argument."""
        defaults = {f.name: f.default for f in fields(cls)}
        select.refuse_unknown(arguments, defaults, "the quant stage")
        values = {key: _typed(key, value, defaults[key]) for key, value in arguments.items()}
        return cls(**values)

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The quantized checkpoint. Raises: PlanError with the reason if it cannot be."""
        format_plug: Format = catalog.load("formats", self.format)
        optimizer: Optimizer = catalog.load("optimizers", self.optimizer)
        _check_scaling(format_plug, self.scaling)
        largest = _largest_group(self.rotate, optimizer)
        _refuse_quantized(source)

        def refuse(weight: TensorSpec) -> str | None:
            return format_plug.refuse(weight, self.scaling, _group(weight, largest))

        choices = recipe.choose(source.specs, only=self.only, skip=self.skip, refuse=refuse)
        quantized = {c.layer + comfy.WEIGHT: c for c in choices if c.quantize}
        parts: list[Part] = []
        for part in source.parts:
            chosen = [name for name in part.tensors if name in quantized]
            if not chosen:
                parts.append(part)
            for name in chosen:
                layer = quantized[name].layer
                group = _group(part.tensors[name], largest)
                job = _Layer(source, layer, format_plug, self.scaling, optimizer, group)
                parts += [job.part(), job.marker_part()]
            rest = [name for name in part.tensors if name not in quantized]
            if chosen and rest:
                parts.append(narrowed(part, rest))
        return source.after(
            self,
            parts=tuple(parts),
            metadata=self._metadata(source, quantized, format_plug, largest),
            notes=tuple(self._note(c, format_plug, optimizer, largest) for c in choices),
        )

    def _metadata(
        self,
        source: Checkpoint,
        quantized: Mapping[str, recipe.Choice],
        format_plug: Format,
        largest: int,
    ) -> Mapping[str, str]:
        if not self.save_quant_metadata:
            return source.metadata
        layers = {
            c.layer: format_plug.marker(_group(c.weight, largest)) for c in quantized.values()
        }
        return {**source.metadata, comfy.HEADER_KEY: comfy.header_value(layers)}

    def _note(
        self, choice: recipe.Choice, format_plug: Format, optimizer: Optimizer, largest: int
    ) -> dict[str, Any]:
        note: dict[str, Any] = {
            "layer": choice.layer,
            "shape": list(choice.weight.shape),
            "dtype": choice.weight.dtype,
            "action": "quantize" if choice.quantize else "keep",
            "reason": choice.reason,
            "nbytes": choice.weight.nbytes,
        }
        if choice.quantize:
            group = _group(choice.weight, largest)
            stored = format_plug.tensors(choice.weight, self.scaling)
            note |= {
                "format": self.format,
                "first_comfyui": format_plug.first_comfyui,
                "scaling": self.scaling,
                "optimizer": self.optimizer,
                "rotation": group,
                "note": _rotation_note(choice.weight, group, largest) or optimizer.note,
                "nbytes_after": sum(spec.nbytes for spec in stored.values()),
            }
        return note


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's quantization: from the source's weight to the stored tensors."""

    source: Checkpoint
    layer: str
    format: Format
    scaling: str
    optimizer: Optimizer
    group: int | None

    def part(self) -> Part:
        """The stored tensors of the layer, without the marker."""
        weight = self.source.specs[self.layer + comfy.WEIGHT]
        stored = self.format.tensors(weight, self.scaling)
        nbytes_segment = largest_cut(weight) * _BYTES_PER_ELEMENT
        nbytes_scales = 2 * sum(spec.nbytes for name, spec in stored.items() if name != "weight")
        nbytes_source = self.source.part(self.layer + comfy.WEIGHT).nbytes_peak
        return Part(
            tensors={f"{self.layer}.{name}": spec for name, spec in stored.items()},
            nbytes_peak=2 * nbytes_source + nbytes_segment + nbytes_scales,
            produce=self.produce,
        )

    def marker_part(self) -> Part:
        """The layer's `comfy_quant` tensor."""
        return constant_part(
            self.layer + comfy.MARKER, comfy.marker_bytes(self.format.marker(self.group))
        )

    def produce(self) -> Iterator[Piece]:
        """Quantize row segment by row segment; the scales come last, when all are known."""
        import torch

        grid = self.format.grid(self.scaling)
        shared = self._shared_scales(grid) if grid.scaling == "tensor" else None
        found: list[torch.Tensor] = []
        for piece in self.source.pieces(self.layer + comfy.WEIGHT):
            codes, scales = self.optimizer.fit(self._rows(piece), grid, shared)
            if shared is None:
                self._check_finite(scales)
            found.append(scales)
            yield Piece(piece.name, piece.start, self.format.pack(codes))
        scales = shared if shared is not None else torch.cat(found)
        for name, tensor in self.format.pack_scales(scales).items():
            yield Piece(f"{self.layer}.{name}", 0, tensor)

    def _rows(self, piece: Piece) -> torch.Tensor:
        """The piece's rows in float32, in the basis that is rounded in."""
        rows = piece.tensor.float()
        return rows if self.group is None else rotation.rotate(rows, self.group)

    def _shared_scales(self, grid: Grid) -> torch.Tensor:
        import torch

        # A scale for all rows needs all rows first: the layer is read twice, never held.
        pieces = self.source.pieces(self.layer + comfy.WEIGHT)
        largest = torch.stack([grid.absmax(self._rows(piece)) for piece in pieces]).amax(0)
        scales = grid.scales(largest)
        self._check_finite(scales)
        return scales

    def _check_finite(self, scales: torch.Tensor) -> None:
        """A scale is non-finite exactly if a weight that it reaches is."""
        import torch

        if torch.isfinite(scales).all():
            return
        name = self.layer + comfy.WEIGHT
        nan = infinite = 0
        for piece in self.source.pieces(name):
            nan += int(torch.isnan(piece.tensor).sum())
            infinite += int(torch.isinf(piece.tensor).sum())
        shown = self.source.sources[0].shown
        what = (
            f"holds {nan} NaN and {infinite} infinite values"
            if nan or infinite
            else "overflows float32 when it is rotated"
        )
        raise InputError(
            f"tensor `{name}` of `{shown}` {what}",
            where=name,
            hint=f"mend the checkpoint, or keep the layer as it is with `--skip {self.layer}`",
            code="input.nonfinite",
        )


def quantize(
    checkpoint: Checkpoint,
    *,
    format: str = "int8_tensorwise",
    scaling: str | None = None,
    optimizer: str = "quip",
    rotate: str = "auto",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    save_quant_metadata: bool = False,
) -> Checkpoint:
    """A checkpoint whose linear layers are stored quantized; nothing is computed yet.

    `scaling` None is the format's default. `rotate` is `auto` (as the optimizer works), `off`, or
    the largest ConvRot group; a layer whose K it does not divide takes the next smaller one, or
    none. `only` and `skip` are patterns over layer names. With `save_quant_metadata` the markers
    stand in the header as well.

    Raises: PlanError if the checkpoint is quantized already, a pattern matches nothing, or there is
    nothing to quantize.
    """
    if scaling is None:
        scaling = catalog.load("formats", format).scalings[0]
    stage = QuantStage(
        format=format,
        scaling=scaling,
        optimizer=optimizer,
        rotate=rotate,
        only=tuple(only),
        skip=tuple(skip),
        save_quant_metadata=save_quant_metadata,
    )
    return stage.apply(checkpoint)


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif type(value) is type(default):
        return value
    raise InputError(
        f"the quant stage's argument `{key}` cannot be `{value!r}`", code="input.manifest"
    )


def _check_scaling(format_plug: Format, scaling: str) -> None:
    if scaling not in format_plug.scalings:
        raise PlanError(
            f"format `{format_plug.name}` has no scaling `{scaling}`",
            hint="it has " + " and ".join(f"`{s}`" for s in format_plug.scalings),
            code="plan.scaling",
        )


def _largest_group(rotate: str, optimizer: Optimizer) -> int:
    """The largest rotation group that layers may take; 0 for no rotation."""
    if rotate not in ROTATIONS:
        raise UsageError(
            f"there is no rotation `{rotate}`", hint="choose from " + ", ".join(ROTATIONS)
        )
    if rotate == "auto":
        return rotation.GROUPS[0] if optimizer.rotates else 0
    if rotate == "off":
        if optimizer.rotates:
            raise UsageError(
                f"optimizer `{optimizer.name}` works in the rotated basis",
                hint="use `--optimizer rtn` for the original basis, or leave `--rotate` out",
                code="usage.rotate",
            )
        return 0
    return int(rotate)


def _group(weight: TensorSpec, largest: int) -> int | None:
    if not largest or len(weight.shape) != 2:
        return None
    return rotation.group_for(weight.shape[1], largest)


def _rotation_note(weight: TensorSpec, group: int | None, largest: int) -> str | None:
    if not largest or group == largest:
        return None
    instead = "is not rotated" if group is None else f"takes rotation group {group}"
    return f"K={weight.shape[1]} is not a multiple of {largest}, so it {instead}"


def _refuse_quantized(source: Checkpoint) -> None:
    found = comfy.find_quantized(source)
    if found:
        first = found[0]
        raise PlanError(
            f"`{source.sources[0].shown}` is quantized already: {len(found)} layers,"
            f" such as `{first.layer}` (by its {first.evidence})",
            where=first.layer,
            hint="start from the unquantized checkpoint; rounding twice adds both errors",
            code="plan.already_quantized",
        )
