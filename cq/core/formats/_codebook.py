"""The grid of `asym_w4a8_int8`: 4-bit codes that stand for int8 numbers. No plug of its own.

A code names one of 16 levels between -1 and 1; times the scale of its group of 16 columns it is
rounded to an int8 number, which a scale per row multiplies.

The codebook is always comfy-kitchen's frozen one. Its quantizer fits another where the groups'
excess kurtosis is over -0.1; after a ConvRot rotation of 16, 64 or 256 columns that was never so
for normal, Laplace, Student (1 to 4 degrees of freedom) and outlier weights (-0.4 to -1.4), only
for weights that are nearly all zero, and its fast kernel reads no other codebook.

Source: comfy-kitchen `tensor/w4a8_packed.py` (`_FIXED_LUT`), `backends/eager/w4a8_int8.py`
(`_quantize_rotated_w4a8_int8_weight`, `_assign_grid`). The search is our own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from cq.core import tables
from cq.core.formats.float8_e4m3fn import in_chunks
from cq.core.formats.mxfp8 import block_absmax
from cq.core.grid import RoundColumn, Scales

if TYPE_CHECKING:
    import torch

CODEBOOK = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
GROUP = 16
_LEVELS = 127
_SIGN = -(1 << 31)  # of a float32's bits
_SMALLEST = 1e-8  # comfy-kitchen's floor of every scale and divisor
_REFITS = 2
_CHUNK = 1 << 18  # weights that are worked on together, so that they stay in a core's cache
_HALF = 1 << 15  # bins of a unit interval; few weights fall in one that holds a threshold
_CELLS = 640  # half-open intervals of half an int8 step, from -160 to 160
_LARGEST_CODE = 126  # of the positive finite float8 numbers
_STEPS = range(-3, 5)  # float8 neighbours of a group scale; four more on each side gain 0.01 dB
# The sums of a search round to about 2^-20 of themselves: a gain under this share is no gain.
_MARGIN = 2.0**-18


@dataclass(frozen=True, slots=True)
class CodebookGrid:
    """round(level x group scale) as int8, times a scale per row."""

    scaling: ClassVar[str] = "block"
    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    # A search, if the segment is one chunk: the rows in one piece, weights in steps, cells, errors
    # of 8 candidates for each 16 weights thrice, importance spread over them; and what belongs to
    # groups
    nbytes_work: ClassVar[int] = 4 + 4 + 4 + 3 * 2 + 4 + 3

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """Nothing: the codebook is the same for all weights."""
        return {}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """Group scales fitted by alternating least squares, the row scale so that 127 is the row's
        largest number. Equal to comfy-kitchen's to the last bit.

        Shapes: `s_rel` `(rows, K/16)` F8_E4M3, `s_channel` `(rows,)`.
        """
        import torch

        relative = weight.new_empty(_per_group(weight), dtype=torch.float8_e4m3fn)
        channel = weight.new_empty(weight.shape[0])
        for part, *out in in_chunks(_CHUNK, weight, relative, channel):
            for found, place in zip(_plain(part.contiguous()), out, strict=True):
                place.copy_(found)
        return {"s_rel": relative, "s_channel": channel}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """Group scales of least error among the float8 neighbours of the one that clips nothing;
        the row scale so that 127 is the largest number of those.

        Better than the plain rule's fit over a layer, and in half its time, not in every group.

        Which numbers a group scale decodes to, and which of them is nearest, is a function of the
        scale's code and of the half int8 step that a weight lies in. So tables give the exact error
        of every neighbour, as the sums of level^2 and of level x weight over the group.
        """
        import torch

        chosen = weight.new_empty(_per_group(weight), dtype=torch.float8_e4m3fn)
        channel = weight.new_empty(weight.shape[0])
        for part, out, row in in_chunks(_CHUNK, weight, chosen, channel):
            whole = part.contiguous()
            whole_scale, largest = unclipped(whole)
            row.copy_(largest)
            out.copy_(_search(whole, whole_scale, largest, importance))
        return {"s_rel": chosen, "s_channel": channel}

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes 0 to 15 as int8; the lower of two equally near levels, as comfy-kitchen has it."""
        import torch

        relative, channel = scales["s_rel"], scales["s_channel"]
        codes = weight.new_empty(weight.shape, dtype=torch.int8)
        table = tables.on(weight.device, _code_table)
        for part, own, row, out in in_chunks(_CHUNK, weight, relative, channel, codes):
            index = _cells(part.contiguous(), own, row, bounded=False)[1].view(-1)
            torch.index_select(table, 0, index, out=out.view(-1))
        return codes

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The int8 numbers x `s_channel` in float32."""
        levels = tables.on(codes.device, codebook)[codes.long()]
        return decoded(levels, scales["s_rel"]).mul_(scales["s_channel"][:, None])

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> CodebookColumns:
        """The numbers of each column's group."""
        import torch

        own = scales["s_rel"].view(torch.uint8).T.index_select(0, chosen // GROUP)
        return CodebookColumns(relative=own, channel=scales["s_channel"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookColumns:
    """Columns under group scales, `relative` U8 `(columns, rows)`, and row scales `(rows,)`."""

    relative: torch.Tensor
    channel: torch.Tensor

    def rounder(self, dtype: torch.dtype) -> RoundColumn:
        """See `Columns`: the cell that a weight lies in tells its number by table."""
        import torch

        half = _CELLS // 2
        first = (self.relative.int() * _CELLS).add_(half).unbind(0)
        half_step, channel = (self.channel / 2).to(dtype), self.channel.to(dtype)
        numbers = tables.on(self.relative.device, _nearest_numbers).to(dtype)

        def round_column(place: int, weight: torch.Tensor, out: torch.Tensor) -> None:
            cells = torch.div(weight, half_step, out=out).ceil_().clamp_(-half, half - 1)
            index = cells.to(torch.int32).add_(first[place])
            torch.index_select(numbers, 0, index, out=out).mul_(channel)

        return round_column


def _per_group(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1] // GROUP


def decoded(levels: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    """round(level x group scale), at most 127 in size, as float32.

    Shapes: `(rows, K)`, `(rows, groups)` to `(rows, K)`.
    """
    groups = levels.view(*relative.shape, -1) * relative.float()[..., None]
    return groups.round_().clamp_(-_LEVELS, _LEVELS).view(levels.shape)


def unclipped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The group scales under which the outermost level is a group's largest weight, and the row
    scales. Shapes: `(rows, K/16)`, `(rows,)`."""
    import torch

    scale = block_absmax(weight.view(*_per_group(weight), GROUP)).clamp_(min=_SMALLEST)
    channel = scale.amax(1).mul_(CODEBOOK[-1] / _LEVELS).clamp_(min=_SMALLEST)
    return (scale / channel[:, None]).to(torch.float8_e4m3fn), channel


# The plain rule ---------------------------------------------------------------------------------


def _plain(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    groups = weight.view(-1, GROUP)
    highest, lowest = _extremes(groups)
    scale = torch.maximum(highest, -lowest).clamp_(min=_SMALLEST)
    for _ in range(_REFITS):
        scale = _refit(groups, scale)
    # The largest level of a group is that of one of its extremes.
    ends = torch.stack((highest, lowest))
    levels = _levels(ends, scale)
    (spoilt,) = levels[0].add(levels[1]).isnan().nonzero(as_tuple=True)
    levels[:, spoilt] = _exact_levels(ends[:, spoilt], scale[spoilt])
    high, low = levels.abs_().mul_(scale)
    largest = torch.maximum(high, low).view(weight.shape[0], -1).amax(1)
    channel = (largest / _LEVELS).clamp_(min=_SMALLEST)
    relative = scale.view(weight.shape[0], -1) / channel[:, None]
    return relative.to(torch.float8_e4m3fn), channel


def _extremes(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and smallest element of each group. Shapes: `(G, 16)` to `(G,)`, twice."""
    import torch

    # The bits of floats are ordered as floats from 0 on, and torch reduces integers faster. What
    # comes out below 0 was no such order: those groups have elements of one sign only.
    bits = groups.view(torch.int32)
    highest = bits.amax(-1)
    lowest = (bits ^ _SIGN).amax(-1)
    (uniform,) = torch.minimum(highest, lowest).lt_(0).nonzero(as_tuple=True)
    highest, lowest = highest.view(torch.float32), lowest.view(torch.float32).neg_()
    if uniform.numel():
        some = groups[uniform]
        highest[uniform], lowest[uniform] = some.amax(-1), some.amin(-1)
    return highest, lowest


def _refit(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The least-squares scale under the codes that `scale` gives.

    Shapes: `(G, 16)`, `(G,)` to `(G,)`.
    """
    fitted = _fitted(groups, _levels(groups, scale[:, None]))
    # An element on a threshold has no tabled level and spoils its group: those are done again.
    (spoilt,) = fitted.isnan().nonzero(as_tuple=True)
    if spoilt.numel():
        some = groups[spoilt]
        fitted[spoilt] = _fitted(some, _exact_levels(some, scale[spoilt, None]))
    return fitted


def _fitted(groups: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    product = (groups * levels).sum(-1)
    return product.div_(levels.square_().sum(-1).clamp_(min=_SMALLEST)).clamp_(min=_SMALLEST)


def _levels(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest level of each element, NaN where a threshold is too near to tell."""
    import torch

    bins = (groups * (_HALF / scale)).clamp_(-_HALF, _HALF).add_(_HALF)
    table = tables.on(groups.device, _level_table)
    return table.index_select(0, bins.to(torch.int32).view(-1)).view(groups.shape)


def _exact_levels(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest level of each element, the lower of two equally near ones."""
    import torch

    levels = tables.on(groups.device, codebook)
    normalized = groups / scale
    above = torch.searchsorted(levels, normalized).clamp_(max=levels.numel() - 1)
    higher, lower = levels[above], levels[(above - 1).clamp_(min=0)]
    return torch.where((higher - normalized).abs_() < (normalized - lower).abs_(), higher, lower)


@cache
def codebook() -> torch.Tensor:
    """`CODEBOOK` as float32 `(16,)`."""
    import torch

    return torch.tensor(CODEBOOK)


@cache
def _level_table() -> torch.Tensor:
    """The level of each bin of [-1, 1]; NaN for bins with a threshold in them, or so near that
    float32 arithmetic may be mistaken about the bin."""
    import torch

    exact = codebook().double()
    thresholds = (exact[1:] + exact[:-1]) / 2
    start = torch.arange(2 * _HALF + 1, dtype=torch.float64) - _HALF
    slack = 0.01  # bins; the arithmetic is mistaken by 0.008 at most
    below = torch.searchsorted(thresholds, (start - slack) / _HALF)
    above = torch.searchsorted(thresholds, (start + 1 + slack) / _HALF)
    return torch.where(below == above, codebook()[below], torch.nan)


# The numbers that a group scale decodes to --------------------------------------------------------


@cache
def _code_table() -> torch.Tensor:
    """The code of the nearest number for each float8 code of a group scale and each cell.

    A cell `(c-1, c]` of half int8 steps holds no border in its inside: the numbers are whole, so
    borders are whole or half. Shapes: int8 `((_LARGEST_CODE + 1) * _CELLS,)`.
    """
    import torch

    decoded = _numbers().double()
    ends = (torch.arange(_CELLS, dtype=torch.float64) - _CELLS // 2) / 2
    inside = (ends - 0.25).expand(decoded.shape[0], -1).contiguous()
    above = torch.searchsorted(decoded, inside).clamp_(max=15)
    below = (above - 1).clamp_(min=0)
    nearer = decoded.gather(1, above) - inside < inside - decoded.gather(1, below)
    return torch.where(nearer, above, below).to(torch.int8).view(-1)


@cache
def _neighbours() -> torch.Tensor:
    """For each row of `_code_table`, the nearest number of every float8 neighbour.

    Shapes: float32 `((_LARGEST_CODE + 1) * _CELLS, len(_STEPS))`.
    """
    import torch

    nearest = _nearest_numbers().view(-1, _CELLS)
    codes = torch.arange(_LARGEST_CODE + 1)
    neighbours = [nearest[(codes + step).clamp(0, _LARGEST_CODE)].view(-1) for step in _STEPS]
    return torch.stack(neighbours, 1).contiguous()


@cache
def _squares() -> torch.Tensor:
    """The squares of `_neighbours`."""
    return _neighbours().square()


@cache
def _nearest_numbers() -> torch.Tensor:
    """The nearest number of each entry of `_code_table`, float32 of its shape."""
    return _numbers().gather(1, _code_table().view(-1, _CELLS).long()).view(-1)


def _numbers() -> torch.Tensor:
    """The 16 numbers that each float8 code of a group scale decodes to. Shapes: `(127, 16)`."""
    import torch

    codes = torch.arange(_LARGEST_CODE + 1, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return decoded(codebook().repeat(codes.numel(), 1), codes[:, None])


def _cells(
    weight: torch.Tensor, relative: torch.Tensor, channel: torch.Tensor, *, bounded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights in half int8 steps, and the rows of the tables that they fall in. `bounded` says
    that the row scales clip nothing, so that all weights lie within the tables.

    Shapes: `(rows, K)` to float32 `(rows, K)` and int32 `(rows, K/16, 16)`.
    """
    import torch

    steps = weight / (channel / 2)[:, None]  # exactly twice the quotient by `channel`
    half = _CELLS // 2
    cells = torch.ceil(steps)
    if not bounded:
        cells.clamp_(-half, half - 1)
    first = relative.view(torch.uint8).float().mul_(_CELLS).add_(half)
    return steps, cells.view(*relative.shape, GROUP).add_(first[..., None]).to(torch.int32)


def _search(
    weight: torch.Tensor,
    relative: torch.Tensor,
    channel: torch.Tensor,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """The float8 group scales of least error."""
    import torch

    steps, index = _cells(weight, relative, channel, bounded=True)
    numbers, squares = (tables.on(weight.device, table) for table in (_neighbours, _squares))
    bags = index.view(-1, GROUP)
    share = None
    if importance is not None:
        share = importance.expand(weight.shape).reshape(bags.shape)
        steps.mul_(importance)
    sum_bags = torch.nn.functional.embedding_bag
    energy = sum_bags(bags, squares, mode="sum", per_sample_weights=share)
    product = sum_bags(bags, numbers, mode="sum", per_sample_weights=steps.view(bags.shape))
    first = -_STEPS.start
    margin = energy[:, first] * _MARGIN
    # By how much errors are less than the weights' own squares; products are of twice the weights.
    gains = product.sub_(energy)
    del steps, index, bags, energy
    most, step = _first_greatest(gains)
    step = torch.where(most.sub_(gains[:, first]) > margin, step - first, 0)
    codes = step.add_(relative.view(torch.uint8).view(-1))
    return codes.clamp_(0, _LARGEST_CODE).to(torch.uint8).view(relative.shape).view(relative.dtype)


def _first_greatest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest value of each row and its first place, as `max(1)` has them.

    Shapes: float32 `(rows, 8)` to float32 and int64 `(rows,)`.
    """
    import torch

    # Wider floats have room for the place in their last bits, and nonnegative ones are ordered as
    # their bits are: one maximum of integers finds both, in half of the time.
    wide = values.double()
    places = torch.arange(len(_STEPS) - 1, -1, -1, device=values.device)
    keys = wide.view(torch.int64).bitwise_or_(places).amax(1)
    if bool((keys < 0).any()):  # a row of nothing but losses
        return values.max(1)
    step = (len(_STEPS) - 1) - (keys & (len(_STEPS) - 1))
    return keys.bitwise_and_(-len(_STEPS)).view(torch.float64).float(), step
