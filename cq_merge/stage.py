"""The merge stage: which adapters, how strongly, and the parts that add them to the weights.

Owns dampening and the check that base and adapters agree. Plans from headers and scalars
alone; torch only inside parts. Knows nothing of adapter kinds (`cq_merge.adapters`), of names
(`cq_merge.keys`) or of quantization.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from cq.core import comfy, select
from cq.core.checkpoint import Checkpoint, Part, Piece, Stage, narrowed
from cq.core.dtypes import DTYPES, torch_dtype
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.source import Source, largest_cut
from cq.core.text import printable
from cq_merge import adapters as kinds
from cq_merge import factors, inputs
from cq_merge.keys import Layers

DAMPENING = 0.9  # of each adapter against the one before it
_STAGE_KEYS = ("adapters", "scale", "dampen", "allow_unmatched")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStage:
    """Adds adapters to the weights of a checkpoint. See `merge` for the fields."""

    name: ClassVar[str] = "merge"

    adapters: tuple[inputs.AdapterFile, ...]
    scale: float = 1.0
    dampen: bool = False
    allow_unmatched: bool = False

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON; paths are absolute."""
        return {
            "adapters": [
                {"path": a.path, "strength": a.strength, **a.fingerprint} for a in self.adapters
            ],
            "scale": self.scale,
            "dampen": self.dampen,
            "allow_unmatched": self.allow_unmatched,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest.

        Raises: InputError for an unknown or ill-typed argument or an adapter that cannot be read,
        PlanError if an adapter has changed since the manifest was made.
        """
        select.refuse_unknown(arguments, _STAGE_KEYS, "the merge stage")
        entries = arguments.get("adapters")
        if not isinstance(entries, list) or not entries:
            raise inputs.ill_typed("adapters", entries)
        files = tuple(inputs.from_manifest(entry) for entry in entries)
        return cls(
            adapters=files,
            scale=inputs.number(arguments, "scale"),
            dampen=_flag(arguments, "dampen", len(files) > 1),
            allow_unmatched=_flag(arguments, "allow_unmatched", False),
        )

    def effective_strengths(self) -> tuple[float, ...]:
        """Each adapter's strength after scale and dampening, in the order given."""
        return tuple(
            adapter.strength * self.scale * (DAMPENING**n if self.dampen else 1.0)
            for n, adapter in enumerate(self.adapters)
        )

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The merged checkpoint. Raises: PlanError if an adapter does not fit, InputError if it is
        not sound."""
        layers = Layers(source.specs)
        # What a dtype alone tells is asked of each weight: whether it is floating point.
        quantized = {
            found.layer: found.evidence
            for found in comfy.find_quantized(source)
            if found.evidence != "dtype"
        }
        changes: dict[str, list[_Weighted]] = {}
        notes = []
        for adapter, strength in zip(self.adapters, self.effective_strengths(), strict=True):
            plan = self._match(adapter.source, layers, source)
            for layer, change in plan.matched:
                _check_fit(adapter.source, change, source, layer, quantized)
                # A strength of 0 leaves a weight as it is, to the byte.
                if strength:
                    changes.setdefault(layer + comfy.WEIGHT, []).append(_Weighted(change, strength))
            notes.append(_note(adapter, strength, plan))
        return source.after(
            self,
            parts=tuple(_parts(source, changes)),
            inputs=(*source.inputs, *(file for a in self.adapters for file in a.source.files)),
            notes=tuple(notes),
        )

    def _match(self, adapter: Source, layers: Layers, source: Checkpoint) -> _Plan:
        matched: list[tuple[str, kinds.Change]] = []
        unmatched: list[str] = []
        claims = kinds.claim_all(adapter)
        for _, change in claims:
            found = layers.find(change.key)
            if len(found) > 1:
                raise PlanError(
                    f"the key `{printable(change.key)}` of `{adapter.shown}` names several layers"
                    f" of {_shown(source)}: " + " and ".join(f"`{name}`" for name in found[:2]),
                    where=adapter.shown,
                    code="plan.adapter_ambiguous",
                )
            if found:
                matched.append((found[0], change))
            else:
                unmatched.append(change.key)
        if unmatched and not (matched and self.allow_unmatched):
            raise _unmatched(adapter, layers, source, unmatched, len(claims))
        return _Plan(tuple(sorted({kind for kind, _ in claims})), matched, unmatched)


class _Plan(NamedTuple):
    """What one adapter file does: kinds, changes by layer, and keys for which there is no layer."""

    kinds: tuple[str, ...]
    matched: list[tuple[str, kinds.Change]]
    unmatched: list[str]


class _Weighted(NamedTuple):
    """A change and the strength that it is added with."""

    change: kinds.Change
    strength: float


@dataclass(frozen=True, slots=True)
class _Merged:
    """One weight with all its changes."""

    source: Checkpoint
    name: str
    changes: tuple[_Weighted, ...]

    def part(self) -> Part:
        """The merged weight, of the same dtype and shape."""
        spec = self.source.specs[self.name]
        # Weights of double precision keep it; a float32 holds all others exactly.
        itemsize = 8 if spec.dtype == "F64" else 4
        numel = largest_cut(spec)
        # Two stored segments each of the source and of the result: while the next one is made, the
        # one before is still in the hands of whoever asked for it.
        nbytes_segments = numel * itemsize + 3 * numel * DTYPES[spec.dtype].bits // 8
        rows = numel // max(1, spec.row_numel)
        return Part(
            tensors={self.name: spec},
            nbytes_peak=self.source.part(self.name).nbytes_peak
            + nbytes_segments
            + sum(change.nbytes_peak(rows, itemsize) for change, _ in self.changes),
            produce=self.produce,
        )

    def produce(self) -> Iterator[Piece]:
        """Merge row segment by row segment, each rounded once."""
        import torch

        spec = self.source.specs[self.name]
        stored = torch_dtype(spec.dtype)
        computed = torch.float64 if spec.dtype == "F64" else torch.float32
        loaded = [(change.load(computed), strength) for change, strength in self.changes]
        for piece in self.source.pieces(self.name):
            # A copy even if the dtype is the same: the segment may belong to the stage before.
            rows = piece.tensor.to(computed, copy=True)
            flat = rows.view(len(rows), spec.row_numel)
            for apply, strength in loaded:
                apply(flat, piece.start, strength)
            if not factors.all_finite(flat, stored_as=stored):
                raise self._not_finite(piece)
            yield Piece(self.name, piece.start, rows.to(stored))

    def _not_finite(self, piece: Piece) -> InputError:
        if factors.all_finite(piece.tensor):
            spec = self.source.specs[self.name]
            what = f"overflows {spec.dtype} when the adapters are added"
            hint = "lower the strengths"
        else:
            what = "holds NaN or infinite values before anything is added to it"
            hint = "mend the checkpoint"
        return InputError(
            f"tensor `{self.name}` of {_shown(self.source)} {what}",
            where=self.name,
            hint=hint,
            code="input.nonfinite",
        )


def merge(
    base: Checkpoint,
    adapters: Sequence[inputs.AdapterWord | tuple[inputs.AdapterWord, float]],
    *,
    scale: float = 1.0,
    dampen: bool | None = None,
    allow_unmatched: bool = False,
) -> Checkpoint:
    """A checkpoint with `adapters` added to its weights; nothing is computed yet.

    An adapter is a path, `path:strength` as one string, or a pair of path and strength; without a
    strength it is 1. Strengths may be negative. `scale` multiplies all of them. With `dampen` the
    n-th adapter counts 0.9^(n-1); None dampens several adapters. With `allow_unmatched` keys that
    name no layer of `base` are left out, as long as others do.

    Raises: UsageError for a strength that is not a finite number, InputError for a file that cannot
    be read, PlanError if base and adapter disagree.
    """
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    wanted = [inputs.wanted(adapter) for adapter in adapters]
    if not wanted:
        raise UsageError("there is no adapter to merge", hint="give at least one adapter file")
    inputs.finite(scale, "the scale")
    stage = MergeStage(
        adapters=tuple(inputs.opened(path, strength) for path, strength in wanted),
        scale=float(scale),
        dampen=len(wanted) > 1 if dampen is None else dampen,
        allow_unmatched=allow_unmatched,
    )
    return stage.apply(base)


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise inputs.ill_typed(key, value)
    return value


def _shown(source: Checkpoint) -> str:
    return " and ".join(f"`{s.shown}`" for s in source.sources)


def _unmatched(
    adapter: Source, layers: Layers, source: Checkpoint, unmatched: Sequence[str], total: int
) -> PlanError:
    first = unmatched[0]
    matched = total - len(unmatched)
    hints = [layers.near(first)]
    if matched:
        hints.append("add `--allow-unmatched` to leave such keys out")
    elif all(key.startswith("lora_te") for key in unmatched):
        hints = ["all its keys are for a text encoder, and this is the diffusion model"]
    else:
        hints.append("was it trained for another model?")
    return PlanError(
        f"the key `{printable(first)}` of `{adapter.shown}` names no layer of {_shown(source)};"
        f" {matched} of {total} keys do",
        where=adapter.shown,
        hint=" ".join(hint for hint in hints if hint),
        code="plan.adapter_unmatched",
    )


def _check_fit(
    adapter: Source,
    change: kinds.Change,
    source: Checkpoint,
    layer: str,
    quantized: Mapping[str, str],
) -> None:
    """Raises: PlanError if the layer's weight cannot take the change."""
    name = layer + comfy.WEIGHT
    spec = source.specs[name]
    if layer in quantized or not spec.is_float:
        evidence = quantized.get(layer)
        why = f"quantized, by its {evidence}" if evidence else "not a 16, 32 or 64 bit float"
        raise PlanError(
            f"tensor `{name}` of {_shown(source)} is {spec} ({why}), so nothing can be added to it",
            where=name,
            hint="merge into the unquantized checkpoint, then quantize the result",
            code="plan.merge_quantized",
        )
    refusal = change.refuse(spec)
    if refusal is not None:
        raise PlanError(
            f"`{adapter.shown}` does not fit: {refusal},"
            f" and `{name}` of {_shown(source)} is {spec}",
            where=name,
            hint="was it trained for another model?",
            code="plan.adapter_shape",
        )


def _note(adapter: inputs.AdapterFile, strength: float, plan: _Plan) -> dict[str, Any]:
    changes = [change for _, change in plan.matched]
    return {
        "path": adapter.path,
        "strength": adapter.strength,
        "effective_strength": strength,
        "kind": "+".join(plan.kinds),
        "ranks": sorted({c.rank for c in changes if c.rank is not None}),
        "alphas": sorted({c.alpha for c in changes if c.alpha is not None}),
        "matched": len(changes),
        "unmatched": plan.unmatched,
        "layers": sorted({layer for layer, _ in plan.matched}),
    }


def _parts(source: Checkpoint, changes: Mapping[str, Sequence[_Weighted]]) -> Iterator[Part]:
    for part in source.parts:
        touched = [name for name in part.tensors if name in changes]
        if not touched:
            yield part
            continue
        for name in touched:
            yield _Merged(source, name, tuple(changes[name])).part()
        rest = [name for name in part.tensors if name not in changes]
        if rest:
            yield narrowed(part, rest)
