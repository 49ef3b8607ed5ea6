"""The second moment of a layer's inputs, as a diagonal and a few directions.

Owns `Moment`, by which rounding and judging weigh errors, and `compressed`, which keeps the leading
directions of many rows. Pure functions on tensors; reads no file.

H = E[x xᵀ] is taken as diag(rest) + sketchᵀ sketch: the sketch holds the leading directions, each
scaled by the root of its eigenvalue, and the rest is what they leave of the exact diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core import rotation

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 22  # weights whose errors are judged together


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """H = diag(rest) + sketchᵀ sketch, estimated from `rows` inputs.

    Shapes: `rest` float32 `(N,)`, not negative; `sketch` float32 `(r, N)`.
    """

    rest: torch.Tensor
    sketch: torch.Tensor
    rows: int

    @classmethod
    def of(cls, diag: torch.Tensor, sketch: torch.Tensor, rows: int) -> Moment:
        """The moment with the diagonal `diag` `(N,)` and the directions `sketch` `(r, N)`."""
        wide = sketch.float()
        return cls(rest=(diag - wide.square().sum(0)).clamp_(min=0), sketch=wide, rows=rows)

    def to(self, device: torch.device) -> Moment:
        """The same on `device`."""
        return Moment(rest=self.rest.to(device), sketch=self.sketch.to(device), rows=self.rows)

    def diagonal(self) -> torch.Tensor:
        """The mean square of each input feature. Shapes: `(N,)`."""
        return self.rest + self.sketch.square().sum(0)

    def rotated(self, group: int) -> Moment:
        """The moment of inputs rotated by ConvRot in groups of `group` features.

        The directions rotate as rows of weights do. The rest does not stay diagonal; its diagonal
        is the mean of each group, for all entries of the rotation are equally large. So features
        whose rest stands out first become directions of their own, which lose nothing.
        """
        import torch

        rest, sketch = self.rest, self.sketch
        groups = rest.view(-1, group)
        usual = groups.median(1, keepdim=True).values
        (loud,) = (groups > _LOUD * usual).view(-1).nonzero(as_tuple=True)
        if 0 < loud.numel() <= max(1, sketch.shape[0] // 2):
            own = rest.new_zeros(loud.numel(), rest.shape[0])
            level = usual.expand(groups.shape).reshape(-1)[loud]
            own[torch.arange(loud.numel(), device=loud.device), loud] = (rest[loud] - level).sqrt()
            sketch, rest = torch.cat((sketch, own)), rest.clone()
            rest[loud] = level
        mean = rest.view(-1, group).mean(1, keepdim=True).expand(-1, group)
        return Moment(
            rest=mean.reshape(-1).contiguous(),
            sketch=rotation.rotate(sketch, group) if sketch.shape[0] else sketch,
            rows=self.rows,
        )

    def damped(self, share: float) -> Moment:
        """With `share` of the diagonal's mean added to the rest, so that H is positive; the
        identity for inputs that are all zero."""
        import torch

        mean = self.diagonal().double().mean()
        if not bool(mean > 0):
            return Moment(rest=torch.ones_like(self.rest), sketch=self.sketch[:0], rows=self.rows)
        return Moment(
            rest=(self.rest + share * mean).float().clamp_(min=torch.finfo(torch.float32).tiny),
            sketch=self.sketch,
            rows=self.rows,
        )

    def scaled(self, factors: torch.Tensor) -> Moment:
        """The moment of inputs whose features are multiplied by `factors` `(N,)`."""
        return Moment(
            rest=self.rest * factors.square(), sketch=self.sketch * factors, rows=self.rows
        )

    def with_directions(self, directions: torch.Tensor) -> Moment:
        """With more directions `(k, N)`, which count beside what was recorded."""
        import torch

        return Moment(
            rest=self.rest, sketch=torch.cat((self.sketch, directions.float())), rows=self.rows
        )

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """eᵀ H e of each row of errors: the mean square of what it does to the layer's output.

        Shapes: float32 `(rows, N)` to `(rows,)`.
        """
        import torch

        step = max(1, _CHUNK // max(1, error.shape[1]))
        found = [
            (part.square() @ self.rest).add_((part @ self.sketch.T).square_().sum(1))
            for part in torch.split(error, step)
        ]
        return torch.cat(found) if found else error.new_empty(0)


_LOUD = 4.0  # times the median of its group


def output_error(moment: Moment, error: torch.Tensor, weight: torch.Tensor) -> float:
    """The error of a layer's output by its inputs' moment, in shares of the output:
    tr(E H Eᵀ) / tr(W H Wᵀ), of whole matrices or summed over rows; 0 of nothing."""
    lost = float(moment.loss(error).double().sum())
    whole = float(moment.loss(weight).double().sum())
    return lost / whole if whole > 0 else 0.0


def compressed(rows: torch.Tensor, rank: int, *, exact: bool = True) -> torch.Tensor:
    """The leading `rank` directions of `rowsᵀ rows`, each scaled by the root of its eigenvalue,
    the strongest first; fewer if there are fewer rows.

    By the Gram matrix of the rows, so that nothing is N x N. Not `exact`, its eigenvectors are
    those of float32, in half the time: good enough for what is compressed again. Shapes: float32
    `(m, N)` to `(at most rank, N)`.
    """
    import torch

    if rows.shape[0] == 0:
        return rows
    gram = rows @ rows.T
    # Devices but these two have no eigenvectors, and some no float64.
    place = gram if gram.device.type in {"cpu", "cuda"} else gram.cpu()
    _, vectors = torch.linalg.eigh(place.double() if exact else place)
    leading = vectors.flip(1)[:, : min(rank, rows.shape[0])]
    return torch.mm(leading.T.to(rows.dtype).to(rows.device), rows)
