"""The stage that gives a checkpoint of diffusers the model's own names, lazily: renamed tensors
keep their bytes, fused weights are joined from several tensors, row segment by row segment.

Owns telling such a checkpoint (`recognize`) and the plan of what becomes of each tensor. Which
names mean what is said by the families' files (`cq.core.dialects`). Torch only inside parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import families, select
from cq.core.checkpoint import Checkpoint, Part, Piece, Stage, narrowed
from cq.core.components import component_of
from cq.core.dialects import Layout, NativeView
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.families import Family, Match
from cq.core.rows import Rows
from cq.core.source import cuts, largest_cut
from cq.core.text import folded, printable

if TYPE_CHECKING:
    import torch

# Files of diffusers have no prefix, or that of the pipeline's part; some tools put ComfyUI's there.
_PREFIXES = ("", "transformer.", "unet.", "model.diffusion_model.", "diffusion_model.")
_FOREIGN_PREFIXES = ("transformer.", "unet.")
_LISTED = 5


def recognize(specs: Mapping[str, TensorSpec], *, by_names: bool = False) -> Match | None:
    """The family and prefix of a diffusion model that stands in `specs` under other names than its
    own; None if there is none, or nothing decides between several.

    With `by_names` the sizes need not be those of a model that is known, nor the names other ones.
    """
    found = []
    for name in families.names():
        family = families.load(name)
        if family.kind != "diffusion" or not family.other_names:
            continue
        for prefix in _PREFIXES:
            view = NativeView(family.dialect, specs, prefix)
            if by_names:
                if any(replace(s, sizes=()).holds(view, "") for s in family.signatures):
                    found.append(Match(family, None, prefix))
            elif any(s.holds(view, "") for s in family.signatures):
                variant = family.variant(view, "")
                if variant is not None or family.others:
                    found.append(Match(family, variant.name if variant else None, prefix))
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class NativeNames:
    """Gives the diffusion model of a checkpoint the names that its makers and ComfyUI use, in place
    of those of diffusers. Tensors of other components keep their names."""

    name: ClassVar[str] = "native"

    def arguments(self) -> dict[str, Any]:
        """Nothing: the checkpoint's names say it all."""
        return {}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown argument."""
        select.refuse_unknown(arguments, [], "the native stage")
        return cls()

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint under native names. Raises: PlanError if its model is not known under
        other names, or for tensors that have no native name."""
        shown = printable(", ".join(found.shown for found in source.sources))
        match = None if families.detect(source.specs).matches else recognize(source.specs)
        if match is None:
            raise PlanError(
                f"`{shown}` is no model that cq knows under the names of diffusers",
                hint="`cq analyze` says what it is; leave `--native-names` out if the names are the"
                " model's own",
                code="plan.native",
            )
        layouts = _layouts(source.specs, match, shown)
        prefix = "" if match.prefix in _FOREIGN_PREFIXES else match.prefix
        first: dict[str, list[str]] = {}
        for native, layout in layouts.items():
            first.setdefault(layout.rows[0].tensor, []).append(native)
        used = {target.tensor for layout in layouts.values() for target in layout.rows}
        parts: list[Part] = []
        for part in source.parts:
            for name in part.tensors:
                parts += [_part(source, prefix + n, layouts[n]) for n in first.get(name, ())]
            rest = [name for name in part.tensors if name not in used]
            if rest:
                parts.append(part if len(rest) == len(part.tensors) else narrowed(part, rest))
        notes = tuple(_note(prefix + native, layout) for native, layout in layouts.items())
        return source.after(self, parts=tuple(parts), notes=notes)


def _layouts(specs: Mapping[str, TensorSpec], match: Match, shown: str) -> dict[str, Layout]:
    """Every native tensor of the model, in the order of the file, and where its rows lie."""
    family, prefix = match.family, match.prefix
    found: dict[str, Layout] = {}
    lost = []
    users: dict[str, str] = {}
    for name in specs:
        if not name.startswith(prefix) or (not prefix and component_of(name).kind is not None):
            continue
        bare = name.removeprefix(prefix)
        natives = _natives(family, bare, specs, prefix)
        for native, layout in natives.items():
            found[native] = layout
            for target in layout.rows:
                if users.setdefault(target.tensor, native) != native:
                    raise PlanError(
                        f"`{printable(target.tensor)}` of `{shown}` would be `{native}` and"
                        f" `{users[target.tensor]}` of {family.title}",
                        where=target.tensor,
                        code="plan.native",
                    )
        if name not in users:
            lost.append(name)
    if lost:
        listed = ", ".join(f"`{printable(name)}`" for name in lost[:_LISTED])
        more = f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
        raise PlanError(
            f"`{shown}` has tensors that have no native name in {family.title}: {listed}{more}",
            where=lost[0],
            hint="parts of a fused weight must all be there, in one dtype; quantized layers must be"
            " dequantized first",
            code="plan.native",
        )
    return found


def _natives(
    family: Family, bare: str, specs: Mapping[str, TensorSpec], prefix: str
) -> dict[str, Layout]:
    """The native tensors that the tensor `bare` is, or is rows of."""
    layer = bare.removesuffix(".weight").removesuffix(".bias")
    told = family.dialect.natives(bare)
    if not told and folded(layer) in family.layers:
        told = [bare]
    found = {}
    for native in told:
        layout = family.dialect.layout(native, specs, prefix)
        if layout is not None and any(t.tensor == prefix + bare for t in layout.rows):
            found[native] = layout
    return found


def _part(source: Checkpoint, name: str, layout: Layout) -> Part:
    tensors = {name: layout.spec}
    whole = layout.rows[0]
    own = source.part(whole.tensor)
    spec = source.specs[whole.tensor]
    alone = len(layout.rows) == 1 and len(own.tensors) == 1 and spec.numel == layout.spec.numel
    peak = max(source.part(target.tensor).nbytes_peak for target in layout.rows)
    # A segment in hand, what is left of the one before, and the piece that they are joined to
    cut = max(largest_cut(source.specs[target.tensor]) for target in layout.rows)
    held = 2 * (cut + largest_cut(layout.spec))
    return Part(
        tensors=tensors,
        nbytes_peak=peak + TensorSpec(spec.dtype, (held,)).nbytes,
        produce=lambda: _pieces(source, name, layout),
        extent=own.extent if alone else None,
        constant=own.constant if alone else None,
    )


def _pieces(source: Checkpoint, name: str, layout: Layout) -> Iterator[Piece]:
    rows = Rows(_segments(source, layout))
    for start, stop in cuts(layout.spec):
        yield Piece(name, start, rows.take(stop - start) if layout.spec.shape else rows.whole())


def _segments(source: Checkpoint, layout: Layout) -> Iterator[torch.Tensor]:
    for target in layout.rows:
        stop = target.start + target.count
        for piece in source.pieces(target.tensor):
            if not piece.tensor.shape:
                yield piece.tensor
                continue
            low = max(target.start - piece.start, 0)
            high = min(stop - piece.start, piece.tensor.shape[0])
            if low < high:
                segment = piece.tensor[low:high]
                yield segment.reshape(-1) if layout.flat else segment


def _note(name: str, layout: Layout) -> dict[str, Any]:
    """What becomes of a tensor, as plain JSON."""
    sources = list(dict.fromkeys(target.tensor for target in layout.rows))
    return {
        "tensor": name,
        "action": "rename" if len(layout.rows) == 1 else "join",
        "from": sources,
        "shape": list(layout.spec.shape),
        "dtype": layout.spec.dtype,
        "nbytes": layout.spec.nbytes,
    }
