"""One layer's quantization: from the source's weight to the stored tensors, as parts.

Owns the meeting of a format's grid and an optimizer, segment by segment, and the memory that it
takes. Torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cq.core import comfy, rotation
from cq.core.checkpoint import Checkpoint, Part, Piece, constant_part
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Format, first_release
from cq.core.rounding import Fit, stored_tensors
from cq.core.source import cuts, largest_cut
from cq.core.stored import Stored
from cq.core.streaming import Work
from cq_quant.beside import Beside
from cq_quant.guidance import Guide
from cq_quant.optimizers import Optimizer, Rounded, Task
from cq_quant.where import Where, asked, taken

if TYPE_CHECKING:
    import torch

# float32 rows, a rotation's two steps, and codes twice: the segment before is still in the hands of
# the writer
_BYTES_ROWS, _BYTES_ROTATION, _BYTES_CODES = 4, 4 + 4, 2
# Settings of a marker that change nothing in what is stored.
_AT_RUN_TIME = frozenset({"full_precision_matrix_mult", "orig_dtype"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """How one tensor is stored: the plugs and their settings, resolved. `group` is the rotation
    group; `search` asks for scales of least error; `options` are the numbers that a user set of the
    optimizer, `bf16` asks for its products in bfloat16."""

    format: Format
    scaling: str
    optimizer: Optimizer | None
    group: int | None
    search: bool
    options: Mapping[str, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True, eq=False)  # no slots: what follows from the fields is found once
class Kind:
    """What layers have in common whose weights have one spec and are stored by one plan: of the
    thousands of layers of a model there are a few kinds. `largest` is the largest rotation group
    that was asked for, 0 for none."""

    weight: TensorSpec
    plan: LayerPlan
    largest: int

    @cached_property
    def matrix(self) -> TensorSpec:
        """One weight matrix: the weight itself, or an expert's share of stacked ones."""
        weight = self.weight
        stacked = len(weight.shape) == 3 and not self.plan.format.casts
        return TensorSpec(weight.dtype, weight.shape[1:]) if stacked else weight

    @property
    def experts(self) -> int | None:
        """The number of stacked matrices, None for a plain weight."""
        return None if self.matrix is self.weight else self.weight.shape[0]

    @cached_property
    def stored(self) -> Mapping[str, TensorSpec]:
        """Specs of the stored tensors by local name, without the marker."""
        plan = self.plan
        found = plan.format.tensors(self.matrix, plan.scaling)
        if self.experts is None:
            return found
        return {n: TensorSpec(spec.dtype, (self.experts, *spec.shape)) for n, spec in found.items()}

    @property
    def changes(self) -> bool:
        """Whether anything is stored otherwise than it is."""
        return self.stored != {"weight": self.weight}

    @cached_property
    def marker(self) -> Mapping[str, Any]:
        """The `comfy_quant` settings; empty for a plain dtype."""
        plan = self.plan
        if plan.format.casts:
            return {}
        settings = plan.format.marker(self.matrix, plan.scaling, plan.group)
        return settings if self.experts is None else {**settings, "num_experts": self.experts}

    @cached_property
    def marker_bytes(self) -> bytes:
        """The marker's text, empty without one."""
        return comfy.marker_bytes(self.marker) if self.marker else b""

    @cached_property
    def nbytes_work(self) -> int:
        """Memory that a layer takes at most, besides what its source holds."""
        if self.plan.format.casts:
            return 2 * largest_cut(self.weight) * 8
        work = self.nbytes_weight
        if work is None:  # the format takes the whole weight, and may copy it as it likes
            return self.nbytes_beside + self.matrix.numel * 16
        weights = self.weights_together(0)
        held = self.nbytes_beside + self.nbytes_held + self.nbytes_rotation
        return held + weights * work + self.nbytes_rounding(0)

    @cached_property
    def nbytes_weight(self) -> int | None:
        """Memory for each weight that is rounded at a time, beside the optimizer's; None if the
        format takes the whole weight."""
        if self.plan.optimizer is None:
            return None
        grid = self.plan.format.grid(self.matrix, self.plan.scaling)
        return None if grid is None else _BYTES_ROWS + _BYTES_CODES + grid.nbytes_work

    @cached_property
    def works(self) -> dict[tuple[int, int], Work]:
        """What `cq_quant.where.taken` has found already, by its arguments."""
        return {}

    @property
    def nbytes_rotation(self) -> int:
        """Memory that a rotation takes, which is of one segment at a time."""
        return 0 if self.plan.group is None else largest_cut(self.matrix) * _BYTES_ROTATION

    @cached_property
    def nbytes_beside(self) -> int:
        """Memory for what is stored beside the weight, as it is found and as it is stored."""
        return 2 * sum(spec.nbytes for own, spec in self.stored.items() if own != "weight")

    @property
    def nbytes_held(self) -> int:
        """Memory for one of stacked matrices, which are read and stored one at a time."""
        return 0 if self.experts is None else self.matrix.numel * (_BYTES_ROWS + _BYTES_CODES)

    def nbytes_guided(self, rank: int) -> int:
        """What is added to `nbytes_work` if moments guide the rounding, of `rank` directions."""
        more = self.weights_together(rank) - self.weights_together(0)
        own = more * (self.nbytes_weight or 0)
        return own + self.nbytes_rounding(rank) - self.nbytes_rounding(0)

    def together(self, rank: int) -> int:
        """Row segments that are rounded at a time, with so many directions of moments."""
        optimizer = self.plan.optimizer
        return 1 if optimizer is None else optimizer.segments(largest_cut(self.matrix), rank)

    def weights_together(self, rank: int) -> int:
        """Weights that are rounded at a time."""
        return min(self.matrix.numel, self.together(rank) * largest_cut(self.matrix))

    def nbytes_rounding(self, rank: int) -> int:
        """Memory that the optimizer takes at most, beside rows, scales and codes of a segment."""
        optimizer, columns = self.plan.optimizer, self.matrix.shape[-1]
        if optimizer is None:
            return 0
        return optimizer.nbytes_work(columns, rank, self.weights_together(rank))

    @cached_property
    def decision(self) -> Mapping[str, Any]:
        """What a report tells of such a layer, an ordinary one: no embedding table."""
        plan = self.plan
        return {
            "format": plan.format.name,
            "first_comfyui": self.first_release(embedding=False),
            "scaling": plan.scaling,
            "optimizer": None if plan.optimizer is None else plan.optimizer.name,
            "rotation": plan.group,
            "note": self._remark(),
            "nbytes_after": sum(spec.nbytes for spec in self.stored.values()),
        }

    def first_release(self, *, embedding: bool) -> str | None:
        """The first ComfyUI release that reads such a layer; None if none does."""
        return first_release(
            self.plan.format,
            embedding=embedding,
            experts=self.experts is not None,
            rotated=self.plan.group is not None,
        )

    def _remark(self) -> str | None:
        plan, largest = self.plan, self.largest
        if plan.optimizer is None:
            return None
        if self.experts is not None and largest and plan.group is None:
            return (
                "stacked experts are not rotated, since ComfyUI drops the rotation's flag for them"
            )
        if largest and plan.group != largest:
            group = plan.group
            instead = "is not rotated" if group is None else f"takes rotation group {group}"
            return f"K={self.matrix.shape[-1]} is not a multiple of {largest}, so it {instead}"
        return plan.optimizer.note


def is_stored_so(stored: Stored, layer: Layer | None) -> bool:
    """Whether a quantized layer is stored already as `layer` would be."""
    if layer is None or stored.evidence != "marker" or layer.kind.stored != stored.tensors:
        return False
    wanted, found = layer.kind.marker, stored.settings
    return all(wanted.get(k) == found.get(k) for k in {*wanted, *found} - _AT_RUN_TIME)


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensor `name` of a checkpoint, on its way to what its kind's plan says. `given` tells of
    each use of recorded inputs that was asked for whether the layer has it, or why not."""

    source: Checkpoint
    name: str
    kind: Kind
    guide: Guide | None = None
    beside: Beside | None = None
    given: Mapping[str, bool | str] = field(default_factory=dict)

    @property
    def plan(self) -> LayerPlan:
        """How it is stored."""
        return self.kind.plan

    @property
    def matrix(self) -> TensorSpec:
        """One weight matrix of it."""
        return self.kind.matrix

    def tensors(self) -> Mapping[str, TensorSpec]:
        """Specs of the stored tensors by full name, without the marker."""
        if self.plan.format.casts:
            return {self.name: self.kind.stored["weight"]}
        layer = self._layer
        beside = {} if self.beside is None else self.beside.specs()
        return {f"{layer}.{own}": spec for own, spec in {**self.kind.stored, **beside}.items()}

    def marker(self) -> Mapping[str, Any]:
        """The layer's `comfy_quant` settings; empty for a plain dtype."""
        return self.kind.marker

    def parts(self) -> list[Part]:
        """The stored tensors as a part, and the marker as another."""
        nbytes_source = 2 * self.source.part(self.name).nbytes_peak
        nbytes_peak = nbytes_source + self.kind.nbytes_work
        if self.guide is not None:
            nbytes_peak += self.kind.nbytes_guided(self.guide.rank)
        if self.beside is not None:
            nbytes_peak += self.beside.nbytes_peak(self.kind.weights_together(self._rank))
        produce = self._cast if self.plan.format.casts else self._quantize
        beside = None if self.beside is None else self.beside.nbytes_peak
        work = taken(self.kind, self._rank, nbytes_source, beside)
        found = [Part(tensors=self.tensors(), nbytes_peak=nbytes_peak, produce=produce, work=work)]
        if self.kind.marker_bytes:
            found.append(constant_part(self._layer + comfy.MARKER, self.kind.marker_bytes))
        return found

    def _cast(self) -> Iterator[Piece]:
        """The tensor in another dtype, piece by piece."""
        import torch

        for piece in self.source.pieces(self.name):
            value = self.plan.format.store(piece.tensor)["weight"]
            # In float64, whose sums of what is finite in less are finite.
            if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
                self._check_finite(self._source_segments)
                raise InputError(
                    f"tensor `{self.name}` of `{self._shown}` overflows {self.plan.format.name}",
                    where=self.name,
                    hint=f"cast to bf16, or keep it with `--skip {self._layer}`",
                    code="input.overflow",
                )
            yield Piece(self.name, piece.start, value)

    def _quantize(self) -> Iterator[Piece]:
        with asked(self.name, self.kind.together(self._rank)) as at:
            yield from self._produced(at)

    def _produced(self, at: Where) -> Iterator[Piece]:
        if self.kind.experts is None:
            starts: dict[str, int] = {}
            segments = self._source_segments
            work = None if self.beside is None else self.beside.begin(segments, self.plan.group)
            if work is not None:
                segments = work.segments
            fit, at = self._fit(segments, at, None if work is None else work.multiplier)
            if work is not None:
                fit = work.watching(fit)
            for own, tensor in self._stored(segments, fit, at):
                start = starts.get(own, 0)
                yield Piece(f"{self._layer}.{own}", start, tensor)
                starts[own] = start + (tensor.shape[0] if tensor.ndim else 1)
            for own, tensor in () if work is None else work.tensors():
                yield Piece(f"{self._layer}.{own}", 0, tensor)
            return
        # With a moment, which all experts share, nothing is asked of the rows beforehand.
        guided: Fit | None = None
        if self.guide is not None:
            guided, at = self._fit(lambda: iter(()), at)
        for index, matrix in enumerate(self._matrices()):
            yield from self._expert(index, matrix, guided, at)

    def _expert(
        self, index: int, matrix: torch.Tensor, fit: Fit | None, at: Where
    ) -> Iterator[Piece]:
        """The stored tensors of one of the stacked matrices, each with a leading 1."""
        import torch

        spans = list(cuts(self.matrix))

        def segments() -> Iterator[torch.Tensor]:
            return (matrix[start:stop] for start, stop in spans)

        if fit is None:
            fit, at = self._fit(segments, at)
        found: dict[str, list[torch.Tensor]] = {}
        for own, tensor in self._stored(segments, fit, at):
            found.setdefault(own, []).append(tensor)
        for own, tensors in found.items():
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            yield Piece(f"{self._layer}.{own}", index, whole[None])

    def _matrices(self) -> Iterator[torch.Tensor]:
        for piece in self.source.pieces(self.name):
            yield from piece.tensor

    def _source_segments(self) -> Iterator[torch.Tensor]:
        return (piece.tensor for piece in self.source.pieces(self.name))

    def _fit(
        self,
        segments: Callable[[], Iterator[torch.Tensor]],
        at: Where,
        multiplier: torch.Tensor | None = None,
    ) -> tuple[Fit, Where]:
        """What rounds rows of the layer, whose inputs are multiplied by `multiplier`, and where."""
        rows = largest_cut(self.matrix) // self.matrix.shape[1]
        tell = None if self.guide is None else self.guide.tell()
        return at.fitted(lambda place: self._prepared(segments, place, multiplier, tell), rows)

    def _prepared(
        self,
        segments: Callable[[], Iterator[torch.Tensor]],
        at: Where,
        multiplier: torch.Tensor | None,
        tell: Callable[[Rounded], None] | None,
    ) -> Fit:
        import torch

        plan, guide = self.plan, self.guide
        assert plan.optimizer is not None
        rows, columns = self.matrix.shape
        task = Task(
            shape=(rows, columns),
            rows=lambda: self._rows(segments, at),
            options=plan.options,
            seed=plan.seed,
            device=at.staging.device,
            bf16=plan.bf16,
        )
        if guide is not None and tell is not None:
            moment, held = guide.moments(plan.group, multiplier)
            there = torch.device(at.staging.device)
            task = replace(
                task,
                moment=moment.to(there),
                held=None if held is None else held.to(there),
                tell=tell,
            )
        return plan.optimizer.prepare(task)

    def _stored(
        self, segments: Callable[[], Iterator[torch.Tensor]], fit: Fit, at: Where
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors of one matrix by local name, row segments of the weight first."""
        plan = self.plan
        found = stored_tensors(
            plan.format,
            self.matrix,
            plan.scaling,
            lambda: self._rows(segments, at),
            fit,
            search=plan.search,
            together=at.segments,
        )
        return at.staging.returned(found)

    def _rows(
        self, segments: Callable[[], Iterator[torch.Tensor]], at: Where
    ) -> Iterator[torch.Tensor]:
        """Row segments in float32, in the basis that is rounded in, all finite, where they are
        computed."""
        for segment in at.staging.sent(segments()):
            rows = segment.float()
            if self.plan.group is not None:
                rows = rotation.rotate(rows, self.plan.group)
            self._see_finite(rows, segments)
            yield rows

    def _see_finite(
        self, rows: torch.Tensor, segments: Callable[[], Iterator[torch.Tensor]]
    ) -> None:
        import torch

        # A sum is one pass; it is not finite if a value is not, or if all together are huge.
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            self._check_finite(segments)
            raise self._bad("overflows float32")

    def _check_finite(self, segments: Callable[[], Iterator[torch.Tensor]]) -> None:
        """Raise with counts if the source holds what is not finite."""
        import torch

        nan = infinite = 0
        for segment in segments():
            nan += int(torch.isnan(segment).sum())
            infinite += int(torch.isinf(segment).sum())
        if nan or infinite:
            raise self._bad(f"holds {nan} NaN and {infinite} infinite values")

    def _bad(self, what: str) -> InputError:
        return InputError(
            f"tensor `{self.name}` of `{self._shown}` {what}",
            where=self.name,
            hint=f"mend the checkpoint, or keep the layer as it is with `--skip {self._layer}`",
            code="input.nonfinite",
        )

    @property
    def _rank(self) -> int:
        return 0 if self.guide is None else self.guide.rank

    @property
    def _shown(self) -> str:
        return self.source.sources[0].shown

    @property
    def _layer(self) -> str:
        return self.name.removesuffix(comfy.WEIGHT)
