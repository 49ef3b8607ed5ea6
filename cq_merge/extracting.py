"""Extracting: the difference between two models as a LoRA that ComfyUI loads.

Owns the low-rank approximation and what it leaves. The base may be quantized: then the difference
is what the quantization lost, and the LoRA gives part of it back at run time.

Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1 (randomized range finder
with power iterations, and the SVD of what is projected onto it).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import comfy, select
from cq.core.checkpoint import Checkpoint, Part, Piece, Stage, from_source
from cq.core.components import components
from cq.core.dequantize import Dequantize
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.source import cuts, largest_cut
from cq_merge import inputs
from cq_merge.changes import NBYTES_RUN, squared
from cq_merge.contents import all_finite

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_PREFIX = "diffusion_model."  # under which ComfyUI knows every model's layers
_UP, _DOWN, _DIFF, _DIFF_BIAS = ".lora_up.weight", ".lora_down.weight", ".diff", ".diff_b"
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


class Losses:
    """What the low rank leaves out, tensor by tensor, as far as they have been computed: an
    `Outcome` of the LoRA."""

    def __init__(self, rank: int, expected: int) -> None:
        self._rank, self._expected = rank, expected
        self._lock = threading.Lock()
        self._found: dict[str, tuple[float, float]] = {}

    def note(self, tensor: str, lost: float, difference: float) -> None:
        """Remember the squared norms of what is left out and of the difference."""
        with self._lock:
            self._found[tensor] = (lost, difference)

    def to_dict(self) -> dict[str, Any]:
        """Tensors computed, how many of them do not differ, the relative error over all, and the
        tensor where it is largest."""
        with self._lock:
            found = dict(sorted(self._found.items()))
        errors = {name: math.sqrt(lost / whole) for name, (lost, whole) in found.items() if whole}
        lost = sum(lost for lost, _ in found.values())
        whole = sum(whole for _, whole in found.values())
        worst = max(errors, key=lambda name: errors[name], default=None)
        return {
            "kind": "extraction",
            "expected": self._expected,
            "tensors": len(found),
            "equal": len(found) - len(errors),
            "relative_error": math.sqrt(lost / whole) if whole else 0.0,
            "worst": worst,
            "worst_relative_error": None if worst is None else errors[worst],
        }

    def remarks(self) -> list[str]:
        """What a user is told of it."""
        found = self.to_dict()
        if not found["tensors"]:
            return []
        told = f"rank {self._rank} leaves out {found['relative_error']:.2%} of the difference"
        if found["worst"] is not None:
            told += f", most of `{found['worst']}`: {found['worst_relative_error']:.2%}"
        if found["equal"]:
            told += f"; {found['equal']} of {found['tensors']} tensors do not differ"
        if found["tensors"] < self._expected:
            told += f"; {found['tensors']} of {self._expected} were computed in this run"
        return [told]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractStage:
    """Turns a checkpoint into the LoRA that leads to it from `base`. See `extract`."""

    name: ClassVar[str] = "extract"

    base: inputs.Origin
    rank: int = 32
    dtype: str = "fp16"
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON; the path is absolute."""
        return {
            "base": self.base.to_manifest(),
            "rank": self.rank,
            "dtype": self.dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError, or PlanError if the base has changed."""
        select.refuse_unknown(arguments, ("base", "rank", "dtype", "seed"), "the extract stage")
        found: dict[str, Any] = {"rank": 32, "dtype": "fp16", "seed": 0, **arguments}
        for key, sound in (
            ("rank", type(found["rank"]) is int and found["rank"] > 0),
            ("seed", type(found["seed"]) is int and 0 <= found["seed"] < 2**63),
            ("dtype", found["dtype"] in DTYPES),
        ):
            if not sound:
                raise InputError(
                    f"the extract stage's argument `{key}` cannot be `{found[key]!r}`",
                    code="input.manifest",
                )
        base = inputs.origin_from_manifest(found.get("base"))
        return cls(base=base, rank=found["rank"], dtype=found["dtype"], seed=found["seed"])

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The LoRA. Raises: PlanError if the two models are not of one shape."""
        base = from_source(self.base.source)
        quantized = {found.layer for found in comfy.find_quantized(base)}
        base = _plain(base)
        tuned = _plain(source)
        wanted: list[_Extracted] = []
        for name, key in _layers(tuned):
            self._check(tuned, base, name)
            layer = name.removesuffix(comfy.WEIGHT)
            # What a quantization leaves as it is does not differ.
            if not quantized or layer in quantized:
                wanted.append(_Extracted(self, tuned, base, name, key))
        if not wanted:
            raise PlanError(
                f"`{source.sources[0].shown}` holds no layer of a diffusion model to extract",
                code="plan.nothing",
            )
        losses = Losses(self.rank, len(wanted))
        return source.after(
            self,
            parts=tuple(found.part(losses) for found in wanted),
            metadata={},
            inputs=(*source.inputs, *base.inputs),
            outcomes=(*source.outcomes, losses),
        )

    def _check(self, tuned: Checkpoint, base: Checkpoint, name: str) -> None:
        spec, other = tuned.specs[name], base.specs.get(name)
        if other is not None and spec.shape == other.shape and other.is_float:
            return
        what = "is not there" if other is None else f"is {other}"
        raise PlanError(
            f"tensor `{name}` is {spec} in `{tuned.sources[0].shown}`, and {what} in"
            f" `{self.base.source.shown}`",
            where=name,
            hint="a difference needs two versions of one model, with the same names and shapes",
            code="plan.extract",
        )


def extract(
    tuned: Checkpoint,
    base: str | Any,
    *,
    rank: int = 32,
    dtype: str = "fp16",
    seed: int = 0,
) -> Checkpoint:
    """The difference of `tuned` from the checkpoint at the path `base` as a LoRA of `rank`.
    What the low rank leaves out is among its `outcomes` once it has been written.

    Linear layers and convolutions become pairs of factors of `dtype` (`fp16`, `bf16`, `fp32`), one
    dimensional tensors are stored whole. Of a quantized `base`, only quantized layers are looked
    at. Only the diffusion model of an all-in-one checkpoint is.

    Raises: UsageError for a rank below 1 or an unknown dtype; InputError for a file that cannot be
    read; PlanError if the two are not of one shape.
    """
    if rank < 1:
        raise UsageError(f"the rank cannot be {rank}", hint="it is 1 or more")
    if dtype not in DTYPES:
        raise UsageError(
            f"`{dtype}` is no dtype of factors", hint="choose from " + ", ".join(DTYPES)
        )
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed cannot be {seed}", hint="it is a whole number from 0 on")
    stage = ExtractStage(base=inputs.opened_origin(base), rank=rank, dtype=dtype, seed=seed)
    return stage.apply(tuned)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    if comfy.find_quantized(checkpoint):
        return Dequantize().apply(checkpoint)
    return checkpoint


def _layers(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The floating tensors of the diffusion model, each with the key of its layer in a LoRA."""
    found = [c for c in components(checkpoint.specs) if c.kind == "diffusion model"]
    prefixes = [c.prefix for c in found] or [""]
    for name, spec in checkpoint.specs.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None or not spec.is_float or not spec.shape:
            continue
        own = name.removeprefix(prefix)
        if own.endswith((".weight", ".bias")):
            yield name, _PREFIX + own.rpartition(".")[0]
        elif len(spec.shape) == 1:
            yield name, _PREFIX + own


@dataclass(frozen=True, slots=True)
class _Extracted:
    """One tensor's difference."""

    stage: ExtractStage
    tuned: Checkpoint
    base: Checkpoint
    name: str
    key: str

    def part(self, losses: Losses) -> Part:
        tensors, held = self._promise()
        peaks = self.tuned.part(self.name).nbytes_peak + self.base.part(self.name).nbytes_peak
        return Part(
            tensors=tensors, nbytes_peak=peaks + held, produce=lambda: self._produce(losses)
        )

    def _promise(self) -> tuple[dict[str, TensorSpec], int]:
        """The specs of what is made, and the memory that it takes beside both models."""
        spec = self.tuned.specs[self.name]
        if len(spec.shape) == 1:
            ending = _DIFF_BIAS if self.name.endswith(".bias") else _DIFF
            tensors = {self.key + ending: TensorSpec("F32", spec.shape)}
            held = 4 * 4 * spec.numel
        else:
            rank = min(self.stage.rank, spec.shape[0], spec.row_numel)
            dtype = DTYPES[self.stage.dtype]
            ones = (1,) * (len(spec.shape) - 2)
            tensors = {
                self.key + _UP: TensorSpec(dtype, (spec.shape[0], rank, *ones)),
                self.key + _DOWN: TensorSpec(dtype, (rank, *spec.shape[1:])),
            }
            # The difference, segments of both models and of what lies between them, and the thin
            # matrices of the iteration.
            wide = min(rank + _OVERSAMPLING, spec.shape[0], spec.row_numel)
            held = 4 * (spec.numel + 8 * wide * (spec.shape[0] + spec.row_numel))
            held += 4 * 5 * largest_cut(spec) + NBYTES_RUN
        return tensors, held

    def _produce(self, losses: Losses) -> Iterator[Piece]:
        import torch

        spec = self.tuned.specs[self.name]
        delta = torch.empty(spec.shape[0], spec.row_numel, dtype=torch.float32)
        pairs = zip(self.tuned.pieces(self.name), self.base.pieces(self.name), strict=True)
        for mine, other in pairs:
            rows = mine.tensor.float() - other.tensor.float()
            delta[mine.start : mine.start + len(rows)] = rows.view(len(rows), -1)
        if not all_finite(delta):
            raise InputError(
                f"tensor `{self.name}` holds NaN or infinite values in one of the two models",
                where=self.name,
                hint="mend the checkpoint",
                code="input.nonfinite",
            )
        whole = squared(delta)
        specs, _ = self._promise()
        if len(spec.shape) == 1:
            (name,) = specs
            losses.note(self.name, 0.0, whole)
            yield Piece(name, 0, delta.view(-1))
            return
        (up_name, up_spec), (down_name, down_spec) = specs.items()
        stored = torch_dtype(up_spec.dtype)
        up, down = _factors(delta, down_spec.shape[0], self._generator())
        up, down = up.to(stored), down.to(stored)
        delta.addmm_(up.float(), down.float(), alpha=-1)
        losses.note(self.name, squared(delta), whole)
        del delta
        for name, factor, own in ((up_name, up, up_spec), (down_name, down, down_spec)):
            shaped = factor.reshape(own.shape)
            for start, stop in cuts(own):
                yield Piece(name, start, shaped[start:stop])

    def _generator(self) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self.stage.seed} {self.key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _factors(
    delta: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `(N, rank)` and `(rank, K)` whose product is nearest to `delta` `(N, K)`, nearly; the
    singular values are shared out evenly."""
    import torch

    rows, columns = delta.shape
    wide = min(rank + _OVERSAMPLING, rows, columns)
    basis = torch.linalg.qr(delta @ torch.randn(columns, wide, generator=generator)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    root = values[:rank].sqrt()
    return (basis @ left[:, :rank]) * root, root[:, None] * right[:rank]
