"""Names to plugs: what a rule left open becomes what a format and an optimizer go best with.

Owns which settings go together, and the reasons why they do not. Imports no torch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from cq.core import catalog, recipe, rotation
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError, UsageError
from cq.core.formats import Format
from cq.core.knowledge import Knowledge
from cq.core.recipe import How
from cq.core.source import cuts
from cq_quant.guidance import settings_of
from cq_quant.layer import Kind, LayerPlan
from cq_quant.optimizers import Optimizer

if TYPE_CHECKING:
    from cq_quant.stage import QuantStage

ROTATIONS = ("auto", "off", "256", "64", "16")


class Resolver:
    """Names to plugs, and the settings that a rule left open to those that a format and an
    optimizer go best with."""

    def __init__(self, stage: QuantStage, known: Knowledge) -> None:
        self._stage = stage
        self.known = known
        # Asked for each layer, of which there are many, and answered in a few ways.
        self._settings = cache(self._resolved)
        self._refusal = cache(self._refused)
        self._kind = cache(self._kind_of)

    def default(self) -> How:
        """What layers without a rule get; checked, so that an error names the option."""
        stage = self._stage
        how = How(
            format=stage.format,
            scaling=stage.scaling,
            optimizer=stage.optimizer,
            rotate=stage.rotate,
        )
        self._settings(how)
        return how

    def _resolved(self, how: How) -> tuple[Format, str, Optimizer | None, int]:
        """Format, scaling, optimizer and the largest rotation group, 0 for none."""
        format_plug: Format = catalog.load("formats", how.format)
        self._see_loader(format_plug)
        scaling = _scaling(format_plug, how.scaling)
        if format_plug.casts:
            if how.optimizer is not None or how.rotate not in {"auto", "off"}:
                raise UsageError(
                    f"`{how.format}` is a plain dtype: it takes no optimizer and no rotation",
                    code="usage.cast",
                )
            return format_plug, scaling, None, 0
        calibrated = self._stage.calibration is not None
        name = how.optimizer or optimizer_for(format_plug, how.rotate, calibrated=calibrated)
        assert name is not None
        optimizer: Optimizer = catalog.load("optimizers", name)
        return format_plug, scaling, optimizer, largest_group(how.rotate, format_plug, optimizer)

    def _see_loader(self, plug: Format) -> None:
        if plug.first_comfyui is None and not plug.casts and not self._stage.allow_custom_loader:
            raise PlanError(
                f"no released ComfyUI loads the format `{plug.name}`",
                hint=f"add `--allow-custom-loader` if yours has {plug.loader or 'a loader for it'}",
                code="plan.custom_loader",
            )

    def refuse(self, layer: str, weight: TensorSpec, how: How) -> str | None:
        """Why the layer cannot be stored so."""
        format_plug, scaling, _, largest = self._settings(how)
        if format_plug.casts:
            return None
        if not format_plug.embeddings and recipe.has_role(layer, "embedding"):
            return "ComfyUI takes embedding tables in fp8 and int8 only"
        if not format_plug.keeps_shape and self._reads_shape(layer):
            return "ComfyUI tells the model by this weight's shape, which the format may change"
        return self._refusal(weight, format_plug, scaling, self._for_family(layer, how, largest))

    def _refused(
        self, weight: TensorSpec, format_plug: Format, scaling: str, largest: int
    ) -> str | None:
        """Why no layer of the spec can be stored so."""
        if len(weight.shape) == 3:
            if 0 in weight.shape:
                return "its weight is empty"
            if not format_plug.experts:
                return "ComfyUI does not take it for stacked experts"
            weight = TensorSpec(weight.dtype, weight.shape[1:])
        if any(stop % 128 for _, stop in list(cuts(weight))[:-1]):
            return f"K={weight.shape[-1]} is too long to be taken 128 rows at a time"
        return format_plug.refuse(weight, scaling, _group(weight, largest, format_plug))

    def _reads_shape(self, layer: str) -> bool:
        told = self.known.reads_shape(layer)
        return recipe.has_role(layer, "detection") if told is None else told

    def _for_family(self, layer: str, how: How, largest: int) -> int:
        """The largest rotation group, if it may be chosen, as the layer's family calls for it."""
        wanted = self.known.rotation(layer)
        return min(largest, wanted) if wanted and how.rotate == "auto" else largest

    def kind(self, layer: str, weight: TensorSpec, how: How) -> Kind:
        """What a layer that is not refused becomes."""
        largest = self._settings(how)[3]
        return self._kind(weight, how, self._for_family(layer, how, largest))

    def _kind_of(self, weight: TensorSpec, how: How, largest: int) -> Kind:
        format_plug, scaling, optimizer, asked = self._settings(how)
        plan = LayerPlan(
            format=format_plug,
            scaling=scaling,
            optimizer=optimizer,
            group=_group(weight, largest, format_plug),
            search=self._stage.scale_search,
            options={} if optimizer is None else settings_of(optimizer, self._stage.settings),
            seed=self._stage.seed,
            bf16=self._stage.bf16,
        )
        return Kind(weight, plan, asked)


def optimizer_for(plug: Format, rotate: str, *, calibrated: bool = False) -> str | None:
    """The optimizer that a format goes best with; None for a plain dtype, which needs none."""
    if plug.casts:
        return None
    if plug.rotation == "never" or rotate == "off":
        return "gptq" if calibrated else "rtn"
    return "quip"


def _scaling(plug: Format, scaling: str | None) -> str:
    if scaling is None:
        return plug.scalings[0]
    if scaling not in plug.scalings:
        raise PlanError(
            f"format `{plug.name}` has no scaling `{scaling}`",
            hint="it has " + " and ".join(f"`{s}`" for s in plug.scalings),
            code="plan.scaling",
        )
    return scaling


def largest_group(rotate: str, plug: Format, optimizer: Optimizer) -> int:
    """The largest rotation group that layers may take; 0 for no rotation."""
    if rotate not in ROTATIONS:
        raise UsageError(
            f"there is no rotation `{rotate}`", hint="choose from " + ", ".join(ROTATIONS)
        )
    if plug.rotation == "never":
        if optimizer.rotates or rotate not in {"auto", "off"}:
            asks = f"optimizer `{optimizer.name}`" if optimizer.rotates else f"`--rotate {rotate}`"
            raise PlanError(
                f"{asks} needs the rotated basis, which the format `{plug.name}` does not store",
                hint="use `--optimizer rtn`, or a format that stores it, such as int8_tensorwise",
                code="plan.rotate",
            )
        return 0
    if rotate == "off":
        if optimizer.rotates:
            raise UsageError(
                f"optimizer `{optimizer.name}` works in the rotated basis",
                hint="use `--optimizer rtn` for the original basis, or leave `--rotate` out",
                code="usage.rotate",
            )
        if plug.rotation == "always":
            raise PlanError(
                f"the format `{plug.name}` is always rotated",
                hint="leave `--rotate` out",
                code="plan.rotate",
            )
        return 0
    if rotate == "auto":
        return rotation.GROUPS[0] if optimizer.rotates or plug.rotation == "always" else 0
    return int(rotate)


def _group(weight: TensorSpec, largest: int, plug: Format) -> int | None:
    if len(weight.shape) == 3 and plug.rotation == "optional":
        return None  # ComfyUI drops the rotation's flag for stacked experts
    if not largest or len(weight.shape) not in {2, 3}:
        return None
    return rotation.group_for(weight.shape[-1], largest)
