"""What a layer gets beside its rounded weight, by its recorded inputs.

Owns a smoothing factor for its inputs (`pre_quant_scale`), the scale by which a runtime rounds them
(`input_scale`), and the corrected bias, all computed with the weight, in its part:

    pre_quant_scale  1 / s for s = a^alpha / w^(1 - alpha), rounded to bfloat16, in which runtimes
                     multiply by it; the weight that is stored is W s
    input_scale      the largest input, or what is left of it, over the format's largest number
    bias             b + E[x] (W - W')^T for the stored W', so that the mean output stays

Source: ComfyUI `comfy/ops.py` (`MixedPrecisionOps.Linear.forward`: inputs are multiplied by
`pre_quant_scale`, then divided by `input_scale`); SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core import rotation
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.grid import Grid, Scales
from cq.core.rounding import Fit
from cq.core.stored import SMOOTHING
from cq.core.text import printable
from cq_quant.equalizing import Multiplier, Rule

if TYPE_CHECKING:
    import torch

    from cq_quant.guidance import Guide

INPUT_SCALE = "input_scale"
_CHUNK = 1 << 20  # weights whose errors are summed at a time
_BYTES_CHUNK = 3 * 8
_BYTES_CHANNEL = 64
_BYTES_LEVEL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a layer gets. `inputs` is what a fold multiplies its inputs by already, `smoothing` the
    rule of factors of its own, `largest` the format's largest number, `bias` the checkpoint and the
    name of the bias that is corrected; each None if there is none."""

    layer: str
    guide: Guide
    columns: int
    inputs: Multiplier | None
    nbytes_inputs: int
    smoothing: Rule | None
    largest: float | None
    bias: tuple[Checkpoint, str] | None

    def __bool__(self) -> bool:
        """Whether it gets anything."""
        return any(x is not None for x in (self.inputs, self.smoothing, self.largest, self.bias))

    @property
    def taken(self) -> str | None:
        """The tensor of the source that is replaced."""
        return None if self.bias is None else self.bias[1]

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors beside the weight by local name."""
        found = {}
        if self.smoothing is not None:
            found[SMOOTHING] = TensorSpec("F32", (self.columns,))
        if self.largest is not None:
            found[INPUT_SCALE] = TensorSpec("F32", ())
        if self.bias is not None:
            source, name = self.bias
            found["bias"] = source.specs[name]
        return found

    def nbytes_peak(self, weights: int) -> int:
        """What it takes at most, if so many weights are rounded together."""
        nbytes = self.nbytes_inputs + self.columns * _BYTES_CHANNEL
        if self.smoothing is not None:  # segments in float64 for its choice, then multiplied ones
            nbytes += weights * (8 + 4)
        if self.bias is not None:
            source, name = self.bias
            nbytes += weights * _BYTES_LEVEL + min(weights, _CHUNK) * _BYTES_CHUNK
            nbytes += 2 * source.part(name).nbytes_peak + 8 * 4 * source.specs[name].numel
        return nbytes

    def begin(
        self, segments: Callable[[], Iterator[torch.Tensor]], group: int | None
    ) -> Production:
        """The state of one production of the layer. Raises: InputError for weights not finite."""
        return Production(self, segments, group)


class Production:
    """One production: the segments that are rounded, and what goes with them."""

    def __init__(
        self, beside: Beside, segments: Callable[[], Iterator[torch.Tensor]], group: int | None
    ) -> None:
        import torch

        self._beside, self._segments, self._group = beside, segments, group
        guide = beside.guide
        self._vectors = guide.calibration.vectors(guide.recorded)
        self.multiplier = torch.ones(beside.columns)
        if beside.inputs is not None:
            self.multiplier = beside.inputs()
        self._smoothing: torch.Tensor | None = None
        if beside.smoothing is not None:
            self._smoothing = self._chosen(beside.smoothing)
            self.multiplier = self.multiplier / self._smoothing
        self._shift: list[torch.Tensor] = []

    def _chosen(self, rule: Rule) -> torch.Tensor:
        """The factors of the weight's columns, one over numbers of bfloat16."""
        weights: torch.Tensor | None = None
        for segment in self._segments():
            size = rule.size(segment)
            weights = size if weights is None else rule.joined(weights, size)
        assert weights is not None, "a layer that is quantized has rows"
        inputs = rule.of_inputs(self._vectors, 1)
        return 1 / rule.exponents(inputs, weights).neg().exp2().bfloat16().float()

    def segments(self) -> Iterator[torch.Tensor]:
        """The rows that are rounded."""
        factors = self._smoothing
        if factors is None:
            return self._segments()
        return (segment.float() * factors for segment in self._segments())

    def watching(self, fit: Fit) -> Fit:
        """`fit`, of which the error on the mean input is taken down, row by row."""
        if self._beside.bias is None:
            return fit
        mean = (self._vectors["mean"] * self.multiplier)[None]
        if self._group is not None:
            mean = rotation.rotate(mean, self._group)
        wide = mean[0].double()

        def watched(
            weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
        ) -> tuple[torch.Tensor, Scales]:
            codes, own = fit(weight, grid, shared, search=search)
            levels = grid.values(codes, {**shared, **own})
            step = max(1, _CHUNK // max(1, weight.shape[1]))
            for start in range(0, weight.shape[0], step):
                rows = slice(start, start + step)
                error = weight[rows].double() - levels[rows].double()
                self._shift.append((error @ wide.to(error.device)).to(mean.device))
            return codes, own

        return watched

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What stands beside the weight, when all its rows were rounded."""
        import torch

        if self._smoothing is not None:
            yield SMOOTHING, (1 / self._smoothing).bfloat16().float()
        if self._beside.largest is not None:
            reach = float((self._vectors["absmax"] * self.multiplier).amax())
            # Of inputs that were always zero nothing is known: 1 is what a runtime takes by itself.
            yield INPUT_SCALE, torch.tensor(reach / self._beside.largest if reach > 0 else 1.0)
        if self._beside.bias is not None:
            yield "bias", self._corrected(*self._beside.bias)

    def _corrected(self, source: Checkpoint, name: str) -> torch.Tensor:
        import torch

        bias = source.read(name)
        value = (bias.double() + torch.cat(self._shift)).to(bias.dtype)
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"tensor `{printable(name)}` of `{source.sources[0].shown}` is not finite, or"
                f" overflows {source.specs[name].dtype} when it is corrected",
                where=name,
                hint="mend the checkpoint, or leave `--bias-correction` out",
                code="input.nonfinite",
            )
        return value
