"""One layer's quantization: from the source's weight to the stored tensors, as parts.

Owns the meeting of a format's grid and an optimizer, segment by segment, and the memory that it
takes. Torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cq.core import comfy, rotation
from cq.core.checkpoint import Checkpoint, Part, Piece, constant_part
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Format
from cq.core.rounding import stored_tensors
from cq.core.source import cuts, largest_cut
from cq_quant.optimizers import Optimizer

if TYPE_CHECKING:
    import torch

# float32 rows, a rotation's two steps, and codes twice: the segment before is still in the hands of
# the writer
_BYTES_ROWS, _BYTES_ROTATION, _BYTES_CODES = 4, 4 + 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """How one tensor is stored: the plugs and their settings, resolved. `group` is the rotation
    group; `search` asks for scales of least error."""

    format: Format
    scaling: str
    optimizer: Optimizer | None
    group: int | None
    search: bool


@dataclass(frozen=True)  # no slots: what follows from the fields is found once
class Layer:
    """The tensor `name` of a checkpoint, on its way to what `plan` says."""

    source: Checkpoint
    name: str
    plan: LayerPlan

    @cached_property
    def weight(self) -> TensorSpec:
        """The tensor as it is."""
        return self.source.specs[self.name]

    @cached_property
    def matrix(self) -> TensorSpec:
        """One weight matrix of it: the tensor itself, or an expert's share of stacked ones."""
        weight = self.weight
        stacked = len(weight.shape) == 3 and not self.plan.format.casts
        return TensorSpec(weight.dtype, weight.shape[1:]) if stacked else weight

    @cached_property
    def experts(self) -> int | None:
        """The number of stacked matrices, None for a plain weight."""
        return None if self.matrix is self.weight else self.weight.shape[0]

    def tensors(self) -> Mapping[str, TensorSpec]:
        """Specs of the stored tensors by full name, without the marker."""
        return self._tensors

    @cached_property
    def _tensors(self) -> dict[str, TensorSpec]:
        plan = self.plan
        if plan.format.casts:
            return {self.name: plan.format.tensors(self.weight, plan.scaling)["weight"]}
        stack = () if self.experts is None else (self.experts,)
        stored = plan.format.tensors(self.matrix, plan.scaling)
        return {
            f"{self._layer}.{own}": TensorSpec(spec.dtype, (*stack, *spec.shape))
            for own, spec in stored.items()
        }

    def marker(self) -> dict[str, Any]:
        """The layer's `comfy_quant` settings; empty for a plain dtype."""
        plan = self.plan
        if plan.format.casts:
            return {}
        settings = plan.format.marker(self.matrix, plan.scaling, plan.group)
        return settings if self.experts is None else {**settings, "num_experts": self.experts}

    def parts(self) -> list[Part]:
        """The stored tensors as a part, and the marker as another."""
        tensors = self.tensors()
        produce = self._cast if self.plan.format.casts else self._quantize
        found = [Part(tensors=tensors, nbytes_peak=self._nbytes_peak(tensors), produce=produce)]
        settings = self.marker()
        if settings:
            marker = comfy.marker_bytes(settings)
            found.append(constant_part(self._layer + comfy.MARKER, marker))
        return found

    def _nbytes_peak(self, tensors: Mapping[str, TensorSpec]) -> int:
        source = 2 * self.source.part(self.name).nbytes_peak
        if self.plan.format.casts:
            return source + 2 * largest_cut(self.weight) * 8
        beside = 2 * sum(s.nbytes for name, s in tensors.items() if name != self.name)
        grid = self.plan.format.grid(self.matrix, self.plan.scaling)
        if grid is None:  # the format takes the whole weight, and may copy it as it likes
            return source + beside + self.matrix.numel * 16
        work = _BYTES_ROWS + _BYTES_CODES + grid.nbytes_work
        work += _BYTES_ROTATION if self.plan.group is not None else 0
        held = 0 if self.experts is None else self.matrix.numel * (_BYTES_ROWS + _BYTES_CODES)
        return source + beside + largest_cut(self.matrix) * work + held

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
        if self.experts is None:
            starts: dict[str, int] = {}
            for own, tensor in self._stored(self._source_segments):
                start = starts.get(own, 0)
                yield Piece(f"{self._layer}.{own}", start, tensor)
                starts[own] = start + (tensor.shape[0] if tensor.ndim else 1)
            return
        for index, matrix in enumerate(self._matrices()):
            yield from self._expert(index, matrix)

    def _expert(self, index: int, matrix: torch.Tensor) -> Iterator[Piece]:
        """The stored tensors of one of the stacked matrices, each with a leading 1."""
        import torch

        spans = list(cuts(self.matrix))
        found: dict[str, list[torch.Tensor]] = {}
        for own, tensor in self._stored(lambda: (matrix[a:b] for a, b in spans)):
            found.setdefault(own, []).append(tensor)
        for own, tensors in found.items():
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            yield Piece(f"{self._layer}.{own}", index, whole[None])

    def _matrices(self) -> Iterator[torch.Tensor]:
        for piece in self.source.pieces(self.name):
            yield from piece.tensor

    def _source_segments(self) -> Iterator[torch.Tensor]:
        return (piece.tensor for piece in self.source.pieces(self.name))

    def _stored(
        self, segments: Callable[[], Iterator[torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors of one matrix by local name, row segments of the weight first."""
        plan = self.plan
        assert plan.optimizer is not None
        return stored_tensors(
            plan.format,
            self.matrix,
            plan.scaling,
            lambda: self._rows(segments),
            plan.optimizer.fit,
            search=plan.search,
        )

    def _rows(self, segments: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Row segments in float32, in the basis that is rounded in, all finite."""
        for segment in segments():
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
    def _shown(self) -> str:
        return self.source.sources[0].shown

    @property
    def _layer(self) -> str:
        return self.name.removesuffix(comfy.WEIGHT)
