"""Every way in which quantized layers have been stored, as ComfyUI stores them today: `--migrate`.

Owns how a layer's tensors change on the way: weights are copied unread, scales get the shape and
the dtype that the format writes, and each layer a marker. What the layers are is said by
`cq.core.stored`, what they should be by the formats.

Source: ComfyUI `comfy/utils.py:convert_old_quants`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cq.core import catalog, comfy, recipe, stored
from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import DTYPES, TensorSpec, torch_dtype
from cq.core.errors import InputError, PlanError
from cq.core.formats.int8_tensorwise import convrot_group
from cq.core.source import cuts
from cq.core.stored import SCALED_FP8, Clue, Stored
from cq.core.text import printable
from cq_edit import headers
from cq_edit.draft import Draft
from cq_edit.settings import SCHEMA
from cq_edit.soundness import of_layers

FORMS = ("comfy_quant",)
# Formats whose layers ComfyUI gives a static scale of the activations, and their smoothing.
_STATIC = frozenset({"float8_e4m3fn", "float8_e5m2", "nvfp4"})
_HINT = "`cq quant --requantize` stores it anew, `cq quant --format bf16` makes it plain"


def migrate(draft: Draft) -> None:
    """Write every quantized layer as the format does, with a marker as a tensor.

    Plain 8-bit floats without scales stay as they are. Raises: InputError for a layer that no
    format reads, PlanError for one that cannot be written without new codes.
    """
    source = draft.checkpoint()
    full = _full_precision(draft)
    found = [
        (clue, stored.resolve(clue, ", ".join(s.shown for s in source.sources)))
        for clue in stored.clues(source)
    ]
    found = [(clue, layer) for clue, layer in found if not layer.format.casts]
    faulty = of_layers(source, {layer.layer for _, layer in found})
    migrations = [
        _Migration(
            draft,
            clue,
            layer,
            full_precision=layer.layer.startswith(full),
            faulty=layer.layer in faulty,
        )
        for clue, layer in found
    ]
    gone: dict[str, str] = {}
    names: dict[str, str] = {}
    for migration in migrations:
        records, moved = migration.records()
        gone |= dict.fromkeys(records, f"no part of `{migration.layer.format.name}`")
        names |= moved
    draft.remove(gone)
    if names:
        draft.rename(names, "today's name")
    for migration in migrations:
        migration.write()
    flags = [name for name in draft.specs if name.rpartition(".")[2] == SCALED_FP8]
    draft.remove(dict.fromkeys(flags, "every layer has a marker"))
    if draft.header is not None:
        headers.drop(draft, "every layer has a marker")
    _see_readable(draft, {layer.layer for _, layer in found})


def _see_readable(draft: Draft, layers: set[str]) -> None:
    """Raises: PlanError if ComfyUI would not read what a layer became."""
    for name, finding in of_layers(draft.checkpoint(), layers).items():
        raise PlanError(
            f"the layers of {draft.shown} cannot be migrated as they are: {finding}",
            where=name,
            hint=_HINT,
            code="plan.migrate",
        )


def _full_precision(draft: Draft) -> tuple[str, ...]:
    """The prefixes under which a flag of the old form asks for full-precision products."""
    return tuple(
        name.removesuffix(SCALED_FP8)
        for name, spec in draft.specs.items()
        if name.rpartition(".")[2] == SCALED_FP8 and spec.numel == 2
    )


@dataclass(slots=True)
class _Migration:
    """One layer on its way to today's form."""

    draft: Draft
    clue: Clue
    layer: Stored
    full_precision: bool
    faulty: bool

    @property
    def _stacked(self) -> bool:
        weight = self.layer.weight
        return len(weight.shape) == 3 and recipe.has_role(self.layer.layer, "experts")

    def write(self) -> None:
        """Write tensors and marker, where they are not as they should be."""
        targets = self._targets()
        unfit = [local for local, spec in targets.items() if spec != self.layer.tensors[local]]
        for local in unfit:
            name = f"{self.layer.layer}.{local}"
            part = _Reshaped(self.draft.part(name), targets[local]).part()
            self.draft.replace("reshape", part, f"as `{self.layer.format.name}` has it")
        # What a tool has written and ComfyUI reads stays, to the byte.
        if self.faulty or unfit or self.layer.layer + comfy.MARKER not in self.draft:
            reason = f"{self.layer.label}, by its {self.layer.evidence}"
            settings = self._settings()
            self.draft.set_marker(self.layer.layer, settings, reason)
            if self.draft.header is not None and self.layer.layer in self.draft.header:
                self.draft.set_entry(self.layer.layer, settings, reason)

    def _matrix(self) -> TensorSpec:
        """The plain weight's matrix, in the dtype that scales in 16 bits speak of."""
        scale = self.layer.tensors.get("weight_scale")
        dtype = "F16" if scale is not None and scale.dtype == "F16" else "BF16"
        shape = self.layer.shape[1:] if self._stacked else self.layer.shape
        return TensorSpec(dtype, shape)

    def _scaling(self) -> str:
        scale = self.layer.tensors.get("weight_scale")
        plug = self.layer.format
        if scale is None or plug.scalings != ("row", "tensor"):
            return plug.scalings[0]
        shape = scale.shape[1:] if self._stacked and len(scale.shape) > 1 else scale.shape
        rows = self._matrix().shape[0] if self._matrix().shape else 0
        lone = TensorSpec("F32", shape).numel == 1 and shape != (rows, 1)
        per_expert = self._stacked and scale.shape == self.layer.weight.shape[:1]
        return "tensor" if lone or per_expert else "row"

    def _targets(self) -> dict[str, TensorSpec]:
        """What each tensor of the layer should be, by local name; its bytes or numbers stay."""
        layer, matrix = self.layer, self._matrix()
        wanted: Mapping[str, TensorSpec] = {}
        if len(matrix.shape) == 2:
            wanted = layer.format.tensors(matrix, self._scaling())
        stack = layer.weight.shape[:1] if self._stacked else ()
        found = {}
        for local, spec in layer.tensors.items():
            want = wanted.get(local)
            if want is None:
                found[local] = spec
                continue
            want = TensorSpec(want.dtype, (*stack, *want.shape))
            spread = spec.numel == 1 and local != "weight" and want.numel > 0
            shape = want.shape if spec.numel == want.numel or spread else spec.shape
            found[local] = TensorSpec(_dtype(spec.dtype, want.dtype), shape)
        return found

    def records(self) -> tuple[list[str], dict[str, str]]:
        """Tensors beside the weight that no reader of the format has, and new names of those that
        the old form called otherwise."""
        layer = self.layer.layer
        gone: list[str] = []
        moved = {
            name: f"{layer}.{local}"
            for local, name in self.layer.names.items()
            if name != f"{layer}.{local}"
        }
        for local, name in self.clue.names.items():
            if local in {"smooth_factors", "weight_scalar"}:
                gone.append(name)
            elif local in {"input_scale", "scale_input"}:
                twice = local == "scale_input" and "input_scale" in self.clue.names
                read = self.layer.format.name in _STATIC and not self._is_one(local, name)
                if not read or twice:
                    gone.append(name)
                elif local == "scale_input":
                    moved[name] = f"{layer}.input_scale"
        return gone, moved

    def _is_one(self, local: str, name: str) -> bool:
        """Whether it is a scale of the old form that says nothing."""
        spec = self.clue.tensors[local]
        if local != "scale_input" or spec.numel != 1 or spec.dtype != "F32":
            return False
        return bool(struct.unpack("<f", self.draft.read_bytes(name)) == (1.0,))

    def _settings(self) -> dict[str, Any]:
        """What `cq quant` would say of the layer, and what its marker asks of the runtime."""
        plug, told = self.layer.format, dict(self.layer.settings)
        nested = told.pop("params", None)
        told = {**(nested if isinstance(nested, dict) else {}), **told}
        rotated = {**told, "convrot": True} if plug.rotation == "always" else told
        group = None if plug.rotation == "never" else convrot_group(rotated)
        matrix = self._matrix()
        found: dict[str, Any] = {"format": plug.name}
        if len(matrix.shape) == 2:
            found = plug.marker(matrix, self._scaling(), group)
        for key in found.keys() & told.keys() - {"format", "orig_shape"}:
            found[key] = told[key]
        if self._stacked:
            found["num_experts"] = self.layer.weight.shape[0]
        ours = catalog.origin("formats", plug.name).startswith("cq.core.")
        kept = {"full_precision_matrix_mult", "linear_dtype", "orig_dtype"} if ours else told.keys()
        for key in kept & told.keys() - found.keys():
            setting = SCHEMA.get(key)
            if told[key] is not False and (setting is None or setting.test(told[key])):
                found[key] = told[key]
        if self.full_precision and self.layer.evidence == SCALED_FP8:
            found["full_precision_matrix_mult"] = True
        return found


def _dtype(own: str, wanted: str) -> str:
    """The dtype that a tensor of dtype `own` gets where the format writes `wanted`."""
    if DTYPES[own].bits == DTYPES[wanted].bits == 8 or (wanted == "F32" and DTYPES[own].is_float):
        return wanted
    return own


@dataclass(frozen=True, slots=True)
class _Reshaped:
    """One tensor in another shape, or with its bytes under another name of a dtype, or in float32.

    Bytes that lie ready in a file are still copied unread.
    """

    source: Part
    spec: TensorSpec

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def _before(self) -> TensorSpec:
        return self.source.tensors[self.name]

    @property
    def _same_bytes(self) -> bool:
        same_bits = DTYPES[self._before.dtype].bits == DTYPES[self.spec.dtype].bits
        is_cast = self._before.dtype != self.spec.dtype and self.spec.dtype == "F32"
        return same_bits and not is_cast and self._before.numel == self.spec.numel

    def part(self) -> Part:
        if self._same_bytes and self._before.shape == self.spec.shape:
            peak, produce = self.source.nbytes_peak, self._retagged
        else:
            peak = self.source.nbytes_peak + 3 * (self._before.nbytes + self.spec.nbytes)
            produce = self._whole
        return Part(
            tensors={self.name: self.spec},
            nbytes_peak=peak,
            produce=produce,
            extent=self.source.extent if self._same_bytes else None,
        )

    def _retagged(self) -> Iterator[Piece]:
        for piece in self.source.produce():
            yield piece._replace(tensor=piece.tensor.view(torch_dtype(self.spec.dtype)))

    def _whole(self) -> Iterator[Piece]:
        import torch

        pieces = [piece.tensor for piece in self.source.produce()]
        dtype = torch_dtype(self.spec.dtype)
        if not pieces:
            return
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        whole = whole.view(dtype) if self._same_bytes else whole.to(dtype)
        if not self._same_bytes and not bool(torch.isfinite(whole).all()):
            raise InputError(
                f"scales in `{printable(self.name)}` are not finite in float32",
                where=self.name,
                hint="mend the checkpoint",
                code="input.nonfinite",
            )
        if whole.numel() != self.spec.numel:
            whole = whole.reshape(()).expand(self.spec.shape)
        whole = whole.reshape(self.spec.shape).contiguous()
        for start, stop in cuts(self.spec):
            yield Piece(self.name, start, whole[start:stop] if self.spec.shape else whole)
