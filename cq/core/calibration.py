"""Calibration files: what the inputs of a model's layers are like, as it was recorded while the
model ran.

Owns the file format: safetensors, in which each layer has `<layer>.diag` F32 `(N,)`, the mean of
the squares; `<layer>.sketch` BF16 `(r, N)`, the leading directions of the second moment, scaled by
the roots of their eigenvalues; `<layer>.mean` and `<layer>.absmax` F32 `(N,)`; and `held_diag` and
`held_sketch`, the same of rows that were held back to judge by. The metadata entry `cq.calibration`
is JSON: the format's version, the rows of each layer, and which layers share another's inputs.

Opening reads the header alone and imports no torch. `cq.calibration` records such files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cq.core import select
from cq.core.checkpoint import Checkpoint, Part, Piece, from_source
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError, PlanError
from cq.core.moment import Moment, compressed
from cq.core.source import Source, open_source
from cq.core.text import printable
from cq.core.write import Written, write

if TYPE_CHECKING:
    import torch

KEY = "cq.calibration"
VERSION = 1
_VECTORS = ("diag", "mean", "absmax")
_HELD = ("held_diag", "held_sketch")
_HINT = "record it again with `cq.calibration.Recorder`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a file holds of a layer, from its header: the layer whose tensors these are, the input
    features, the directions, and the rows that were recorded and held back."""

    stored_as: str
    columns: int
    rank: int
    rows: int
    held_rank: int
    held_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was recorded of a layer's inputs: float32 `diag`, `mean`, `absmax` `(N,)` and `sketch`
    `(r, N)` of `rows` rows; `held_diag` and `held_sketch` of `held_rows` others, which
    `mean` and `absmax` count as well."""

    diag: torch.Tensor
    sketch: torch.Tensor
    mean: torch.Tensor
    absmax: torch.Tensor
    rows: int
    held_diag: torch.Tensor
    held_sketch: torch.Tensor
    held_rows: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a file stores them, by local name."""
        import torch

        found = {name: getattr(self, name).float().contiguous() for name in _VECTORS}
        found["sketch"] = self.sketch.to(torch.bfloat16)
        if self.held_rows:
            found["held_diag"] = self.held_diag.float().contiguous()
            found["held_sketch"] = self.held_sketch.to(torch.bfloat16)
        return found

    def merged(self, other: Statistics) -> Statistics:
        """Both together, each weighted by its rows; as many directions as the longer sketch has.

        Raises: PlanError if they have not the same number of features.
        """
        if self.diag.shape != other.diag.shape:
            raise PlanError(
                f"one calibration has {self.diag.shape[0]} input features, the other"
                f" {other.diag.shape[0]}",
                code="plan.calibration",
            )
        import torch

        share = _share(self.rows, other.rows)
        held = _share(self.held_rows, other.held_rows)
        every = _share(self.rows + self.held_rows, other.rows + other.held_rows)
        return Statistics(
            diag=torch.lerp(other.diag, self.diag, share),
            sketch=_joined(self.sketch, other.sketch, share),
            mean=torch.lerp(other.mean, self.mean, every),
            absmax=torch.maximum(self.absmax, other.absmax),
            rows=self.rows + other.rows,
            held_diag=torch.lerp(other.held_diag, self.held_diag, held),
            held_sketch=_joined(self.held_sketch, other.held_sketch, held),
            held_rows=self.held_rows + other.held_rows,
        )


def _share(rows: int, others: int) -> float:
    return rows / (rows + others) if rows + others else 0.0


def _joined(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    import torch

    rank = max(first.shape[0], second.shape[0])
    return compressed(torch.cat((first * share**0.5, second * (1 - share) ** 0.5)), rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """An open calibration file: its layers by name, from the header alone."""

    source: Source
    layers: Mapping[str, Recorded]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Calibration:
        """The calibration at `path`. Raises: InputError if it is none, or damaged."""
        return cls.of(open_source(path))

    @classmethod
    def of(cls, source: Source) -> Calibration:
        """The calibration that an open file is. Raises: InputError if it is none, or damaged."""
        said = _said(source)
        layers = {
            name: _recorded(source, name, name, rows) for name, rows in said["layers"].items()
        }
        for name, other in said["same_as"].items():
            if other not in layers or name in layers:
                raise _damaged(source, f"`{printable(name)}` shares inputs with no layer of it")
            layers[name] = layers[other]
        known = {f"{name}.{own}" for name in said["layers"] for own in _owned(layers[name])}
        for name in source.owner:
            if name not in known:
                raise _damaged(source, f"it has a tensor `{printable(name)}` of no layer")
        return cls(source=source, layers=dict(sorted(layers.items())))

    def moment(self, layer: str) -> Moment:
        """The second moment of the layer's inputs. Raises: InputError for values that are none."""
        found = self.layers[layer]
        own = self._read(found, ("diag", "sketch"))
        return Moment.of(own["diag"], own["sketch"], found.rows)

    def held(self, layer: str) -> Moment | None:
        """The same of the rows that were held back, None if there are none. Raises: as `moment`."""
        found = self.layers[layer]
        if not found.held_rows:
            return None
        own = self._read(found, _HELD)
        return Moment.of(own["held_diag"], own["held_sketch"], found.held_rows)

    def vectors(self, layer: str) -> dict[str, torch.Tensor]:
        """`diag`, `mean` and `absmax` of the layer's inputs, `(N,)`. Raises: as `moment`."""
        return self._read(self.layers[layer], _VECTORS)

    def statistics(self, layer: str) -> Statistics:
        """All that is recorded of the layer. Raises: as `moment`."""
        import torch

        found = self.layers[layer]
        own = self._read(found, _owned(found))
        nothing = torch.zeros(found.columns), torch.zeros(0, found.columns)
        return Statistics(
            diag=own["diag"],
            sketch=own["sketch"],
            mean=own["mean"],
            absmax=own["absmax"],
            rows=found.rows,
            held_diag=own.get("held_diag", nothing[0]),
            held_sketch=own.get("held_sketch", nothing[1]),
            held_rows=found.held_rows,
        )

    def matched(self, layers: Iterable[str]) -> dict[str, str]:
        """The recorded layer for each layer of a checkpoint that has one.

        Names are equal but for one prefix, which either side may have and which fits most layers.

        >>> from cq.core.source import Source
        >>> recorded = dict.fromkeys(["blocks.0.q", "blocks.0.k"])
        >>> _matched(recorded, ["model.diffusion_model.blocks.0.q", "vae.conv"])
        {'model.diffusion_model.blocks.0.q': 'blocks.0.q'}
        """
        return _matched(self.layers, layers)

    def _read(self, found: Recorded, names: Iterable[str]) -> dict[str, torch.Tensor]:
        import torch

        checkpoint = from_source(self.source)
        full = {name: f"{found.stored_as}.{name}" for name in names}
        tensors = checkpoint.read_many(full.values())
        values = {name: tensors[stored].float() for name, stored in full.items()}
        for name, value in values.items():
            squares = name.endswith("diag") or name == "absmax"
            if not bool(torch.isfinite(value).all()) or (squares and bool((value < 0).any())):
                raise _damaged(self.source, f"`{printable(full[name])}` holds impossible values")
        return values


def merge(
    first: Calibration, second: Calibration, path: str | os.PathLike[str], *, force: bool = False
) -> Written:
    """Write a calibration of the layers of both: what was recorded in both is weighted by rows.

    Raises: PlanError if a layer has not as many input features in both, or the file exists and not
    `force`; InputError for damaged files.
    """
    names = sorted({*first.layers, *second.layers})
    groups: dict[tuple[str | None, str | None], list[str]] = {}
    for name in names:
        key = tuple(c.layers[name].stored_as if name in c.layers else None for c in (first, second))
        groups.setdefault((key[0], key[1]), []).append(name)
    found: dict[str, Statistics] = {}
    for members in groups.values():
        given = [c.statistics(members[0]) for c in (first, second) if members[0] in c.layers]
        found[members[0]] = given[0] if len(given) == 1 else given[0].merged(given[1])
    same_as = {name: members[0] for members in groups.values() for name in members[1:]}
    return save(path, found, same_as, force=force)


def save(
    path: str | os.PathLike[str],
    layers: Mapping[str, Statistics],
    same_as: Mapping[str, str] | None = None,
    *,
    force: bool = False,
) -> Written:
    """Write the statistics of layers; those of `same_as` share another layer's inputs.

    Raises: PlanError if the file exists and not `force`, ResourceError as `cq.write`.
    """
    said = {
        "version": VERSION,
        "layers": {n: {"rows": s.rows, "held_rows": s.held_rows} for n, s in layers.items()},
        "same_as": dict(same_as or {}),
    }
    checkpoint = Checkpoint(
        parts=tuple(_part(name, layers[name]) for name in sorted(layers)),
        metadata={KEY: orjson.dumps(said, option=orjson.OPT_SORT_KEYS).decode()},
        sources=(),
    )
    return write(checkpoint, path, force=force, restart=True)


def _part(layer: str, found: Statistics) -> Part:
    tensors = {f"{layer}.{name}": tensor for name, tensor in found.tensors().items()}

    def produce() -> Iterator[Piece]:
        return (Piece(name, 0, tensor) for name, tensor in tensors.items())

    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    return Part(tensors=specs, nbytes_peak=sum(s.nbytes for s in specs.values()), produce=produce)


def _owned(found: Recorded) -> tuple[str, ...]:
    return (*_VECTORS, "sketch", *(_HELD if found.held_rows else ()))


def is_calibration(metadata: Mapping[str, str]) -> bool:
    """Whether a file with that metadata is, or claims to be, a calibration."""
    return KEY in metadata


def _said(source: Source) -> dict[str, Any]:
    """What the metadata says, well typed."""
    if KEY not in source.metadata:
        raise InputError(
            f"`{source.shown}` is not a calibration: its metadata has no `{KEY}`",
            where=source.shown,
            hint="`cq.calibration.Recorder` records one while a model runs",
            code="input.calibration",
        )
    try:
        said = orjson.loads(source.metadata[KEY])
    except orjson.JSONDecodeError as error:
        raise _damaged(source, "its metadata is not JSON") from error
    if not isinstance(said, dict) or said.get("version") != VERSION:
        version = printable(str(said.get("version") if isinstance(said, dict) else said))
        raise InputError(
            f"`{source.shown}` is a calibration of version `{version}`; this cq reads {VERSION}",
            where=source.shown,
            hint="install the cq that recorded it, or record it again",
            code="input.calibration",
        )
    layers, same_as = said.get("layers"), said.get("same_as", {})
    counts = layers.values() if isinstance(layers, dict) else [None]
    if not all(
        isinstance(c, dict)
        and all(type(c.get(k)) is int and c[k] >= 0 for k in ("rows", "held_rows"))
        for c in counts
    ):
        raise _damaged(source, "its metadata does not say the rows of each layer")
    if not isinstance(same_as, dict) or not all(isinstance(v, str) for v in same_as.values()):
        raise _damaged(source, "its metadata does not say which layers share inputs")
    return {"layers": layers, "same_as": same_as}


def _recorded(source: Source, layer: str, stored_as: str, rows: Mapping[str, int]) -> Recorded:
    held = bool(rows["held_rows"])
    specs: dict[str, TensorSpec] = {}
    for own in (*_VECTORS, "sketch", *(_HELD if held else ())):
        if f"{stored_as}.{own}" not in source.owner:
            raise _damaged(source, f"the tensor `{printable(layer)}.{own}` is missing")
        specs[own] = source.spec(f"{stored_as}.{own}")
    columns = specs["diag"].shape[0] if len(specs["diag"].shape) == 1 else 0
    for own, spec in specs.items():
        sketch = own.endswith("sketch")
        fits = spec.dtype == ("BF16" if sketch else "F32") and spec.shape[-1:] == (columns,)
        if not fits or len(spec.shape) != 1 + sketch or not columns:
            raise _damaged(source, f"the tensor `{printable(layer)}.{own}` is {spec}")
    return Recorded(
        stored_as=stored_as,
        columns=columns,
        rank=specs["sketch"].shape[0],
        rows=rows["rows"],
        held_rank=specs["held_sketch"].shape[0] if held else 0,
        held_rows=rows["held_rows"],
    )


def _damaged(source: Source, why: str) -> InputError:
    return InputError(
        f"the calibration `{source.shown}` is damaged: {why}",
        where=source.shown,
        hint=_HINT,
        code="input.calibration",
    )


def _matched(recorded: Mapping[str, object], layers: Iterable[str]) -> dict[str, str]:
    named = list(layers)
    ends: dict[str, list[str]] = {}
    for name in recorded:
        ends.setdefault(_end(name), []).append(name)
    votes: dict[tuple[str, str], int] = {}
    for layer in named:
        for name in ends.get(_end(layer), ()):
            if layer == name or layer.endswith(f".{name}"):
                pair = (layer[: len(layer) - len(name)], "")
            elif name.endswith(f".{layer}"):
                pair = ("", name[: -len(layer)])
            else:
                continue
            votes[pair] = votes.get(pair, 0) + 1
    if not votes:
        return {}
    # Of equally many, that which takes names as they are.
    theirs, ours = max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])))
    return {
        layer: ours + layer.removeprefix(theirs)
        for layer in named
        if layer.startswith(theirs) and ours + layer.removeprefix(theirs) in recorded
    }


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def nearest(calibration: Calibration, layers: Iterable[str]) -> str | None:
    """A hint with layers of a checkpoint that a calibration's names may mean."""
    first = next(iter(calibration.layers), "")
    return select.nearest(first, layers)
