"""Recording calibrations: what the inputs of a model's linear layers are like while it runs.

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
>>> with Recorder(model) as recorder:
...     _ = model(torch.randn(64, 8))
>>> recorder.rows["2"]
64
>>> recorder.save("calibration.safetensors")  # doctest: +SKIP

Works inside anything that runs a `torch.nn.Module`: its hooks only look. For each layer input it
holds O(rank x features) numbers on the layer's device, however long the model runs.
`cq.core.calibration` reads and merges the files.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from cq.core.calibration import Calibration, Statistics, merge, save
from cq.core.errors import PlanError, UsageError
from cq.core.moment import compressed

if TYPE_CHECKING:
    import torch

__all__ = ["Calibration", "Recorder", "merge"]

HELD_EVERY = 8  # rows, of which one is held back
_ROOM = 2  # new rows for each direction before they are compressed


class Recorder:
    """Records the inputs of all `torch.nn.Linear` layers of `model`, quantized ones as well, while
    its block runs; blocks may follow one another.

    `rank` and `held_rank` are the directions that are kept, `rows_per_call` the rows of one call
    that are looked at, spread evenly; None looks at all, as the largest inputs are always looked
    for. Names are those of the model's modules.
    Layers that are always called with the same tensor, one after the other, are recorded once.
    Rows with values that are not finite are left out. Equal runs give equal files.

    Raises: UsageError for a model without linear layers, or a number that is not positive.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        rank: int = 256,
        held_rank: int = 128,
        rows_per_call: int | None = 1024,
    ) -> None:
        import torch

        for name, value in (("rank", rank), ("held_rank", held_rank), ("rows", rows_per_call)):
            if value is not None and value < 1:
                raise UsageError(f"the recorder's `{name}` must be positive, not {value}")
        self._rank, self._held_rank, self._rows_per_call = rank, held_rank, rows_per_call
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        if not self._modules:
            raise UsageError(
                f"`{type(model).__name__}` has no linear layers to record",
                hint="give the model itself, not a wrapper that does not list it as a module",
            )
        self._layers: dict[str, _Layer] = {}
        self._leaders: dict[str, str] = {}  # the layer whose inputs a layer shares, perhaps itself
        self._seen: _Seen | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self._modules.items():
            # A class of hooks rather than closures: each knows its layer's name.
            hook = _Hook(self, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen = None

    @property
    def rows(self) -> Mapping[str, int]:
        """The rows that were recorded of each layer so far, those that are held back included."""
        return {name: self._layers[leader].rows for name, leader in self._leaders.items()}

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write what was recorded; layers that were never called are not in the file.

        Raises: PlanError if nothing was recorded, or the file exists and not `force`.
        """
        if not any(self.rows.values()):
            raise PlanError(
                "nothing was recorded",
                hint="run the model between `with Recorder(model) as recorder:` and its end",
                code="plan.calibration",
            )
        kept = {name: layer for name, layer in self._layers.items() if layer.rows}
        same_as = {n: one for n, one in self._leaders.items() if n != one and one in kept}
        save(path, {n: layer.statistics() for n, layer in kept.items()}, same_as, force=force)

    def _look(self, name: str, value: torch.Tensor) -> None:
        version = _version(value)
        seen = self._seen
        again = seen is not None and seen.tensor() is value and seen.version == version
        leader = self._leaders.get(name)
        if leader is None:
            leader = seen.name if seen is not None and again else name
            self._leaders[name] = leader
        elif leader != name and not (again and seen is not None and seen.name == leader):
            # The layers part here: until now both have seen the same.
            self._layers[name] = copy.deepcopy(self._layers[leader])
            self._leaders[name] = leader = name
        if leader != name:
            return
        self._seen = _Seen(weakref.ref(value), version, name)
        if name not in self._layers:
            self._layers[name] = _Layer(value, self._rank, self._held_rank)
        self._layers[name].add(value, self._rows_per_call)


class _Seen(NamedTuple):
    """The input that was recorded last."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    name: str


class _Hook:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        value = args[0] if args else kwargs.get("input")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            with torch.no_grad():
                self._recorder._look(self._name, value)


def _reach(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each feature over the rows that are finite. Shapes: `(N,)`."""
    import torch

    low, high = torch.aminmax(rows, dim=0)
    reach = torch.maximum(high, -low)
    if bool(torch.isfinite(reach).all()):
        return reach
    finite = rows[torch.isfinite(rows).all(1)]
    return finite.abs().amax(0) if finite.shape[0] else torch.zeros_like(reach)


def _version(value: torch.Tensor) -> int:
    """Counts changes in place; tensors of inference mode do not."""
    return -1 if value.is_inference() else value._version


class _Layer:
    """The running statistics of one input."""

    def __init__(self, like: torch.Tensor, rank: int, held_rank: int) -> None:
        import torch

        columns = like.shape[-1]
        self.mean = torch.zeros(columns, device=like.device)
        self.absmax = torch.zeros(columns, device=like.device)
        self.rows = 0
        self._taken = _Sketch(columns, rank, like.device)
        self._held = _Sketch(columns, held_rank, like.device)

    def add(self, value: torch.Tensor, limit: int | None) -> None:
        """Take the rows of a call into account."""
        import torch

        rows = value.detach().reshape(-1, value.shape[-1])
        # Of all rows: what was left out of a maximum would be clipped.
        reach = _reach(rows).to(self.absmax.device, torch.float32)
        self.absmax = torch.maximum(self.absmax, reach)
        if limit is not None and rows.shape[0] > limit:
            spread = torch.arange(limit, device=rows.device) * rows.shape[0] // limit
            rows = rows[spread]
        rows = rows.to(self.mean.device, torch.float32)
        rows = rows[torch.isfinite(rows).all(1)]
        if rows.shape[0] == 0:
            return
        place = torch.arange(self.rows, self.rows + rows.shape[0], device=rows.device)
        self.rows += rows.shape[0]
        self.mean += (rows.mean(0) - self.mean) * (rows.shape[0] / self.rows)
        held = place % HELD_EVERY == HELD_EVERY - 1
        self._taken.add(rows[~held])
        self._held.add(rows[held])

    def statistics(self) -> Statistics:
        """What a file holds of it, on the CPU."""
        diag, sketch, rows = self._taken.result()
        held_diag, held_sketch, held_rows = self._held.result()
        return Statistics(
            diag=diag,
            sketch=sketch,
            mean=self.mean.cpu(),
            absmax=self.absmax.cpu(),
            rows=rows,
            held_diag=held_diag,
            held_sketch=held_sketch,
            held_rows=held_rows,
        )


class _Sketch:
    """The exact mean of squares and the leading directions of many rows: a buffer of directions and
    new rows, compressed to `rank` directions whenever it is full; or the second moment itself, if
    that is no larger than the buffer.

    Source: Frequent Directions, Liberty 2013; what is cut off is not subtracted, since the exact
    diagonal counts it.
    """

    def __init__(self, columns: int, rank: int, device: torch.device) -> None:
        import torch

        self._rank, self._rows, self._used = rank, 0, 0
        self._diag = torch.zeros(columns, device=device)
        self._room = (1 + _ROOM) * rank
        self._whole = columns <= self._room
        self._buffer = torch.zeros(columns if self._whole else 0, columns, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Take `(count, N)` float32 rows into account."""
        import torch

        count = rows.shape[0]
        if not count:
            return
        self._rows += count
        self._diag += (rows.square().mean(0) - self._diag) * (count / self._rows)
        if self._whole:
            self._buffer.addmm_(rows.T, rows)
            return
        room = self._room
        while rows.shape[0]:
            if self._used == room:
                self._compress()
            taken = min(room - self._used, rows.shape[0])
            part, rows = rows[:taken], rows[taken:]
            needed = self._used + part.shape[0]
            if needed > self._buffer.shape[0]:  # grows to what is needed, at most to the room
                longer = min(room, max(needed, 2 * self._buffer.shape[0]))
                more = self._buffer.new_zeros(longer - self._buffer.shape[0], rows.shape[1])
                self._buffer = torch.cat((self._buffer, more))
            self._buffer[self._used : needed] = part
            self._used = needed

    def _compress(self) -> None:
        kept = compressed(self._buffer[: self._used], self._rank, exact=False)
        self._used = kept.shape[0]
        self._buffer[: self._used] = kept

    def result(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The mean of squares, the directions of the second moment, and the rows; on the CPU."""
        import torch

        if self._whole:
            values, vectors = torch.linalg.eigh(self._buffer.cpu().double())
            scaled = (vectors * values.clamp_(min=0).sqrt_()).T.flip(0).float()
            directions = scaled[: min(self._rank, self._rows)]
        else:
            directions = compressed(self._buffer[: self._used].cpu(), self._rank)
        return self._diag.cpu(), directions / max(1, self._rows) ** 0.5, self._rows
