"""`float8_e4m3fn`: 8-bit floats, 4 exponent and 3 mantissa bits, with one float32 scale. Owns what
both float8 formats share.

Stored: `weight` in the native float8 dtype `(N, K)`; `weight_scale` F32 `()`. In a U8 container
ComfyUI would convert the bytes' values, not view them. A scale per row or block would be taken for
a single one by the GPU's matrix product; other tools write such scales under names of their own
(`aliases`), which no released ComfyUI knows.

Source: ComfyUI `comfy/quant_ops.py` (QUANT_ALGOS), comfy-kitchen `tensor/fp8.py`
(TensorCoreFP8Layout) and `backends/eager/quantization.py` (`quantize_per_tensor_fp8`,
`dequantize_per_tensor_fp8`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.formats import Fault, Format, plain_shape
from cq.core.grid import Scales, Steps
from cq.core.packing import spread

if TYPE_CHECKING:
    import torch

# The smallest normal float32: its inverse is finite, and no device flushes it to zero. Weights of
# a magnitude that needs less do not occur; comfy-kitchen divides by zero for an all-zero weight.
SMALLEST_SCALE = 2.0**-126
CONTAINERS = frozenset({"U8", "I8"})  # bytes that some tools view as float8
# Bits of mantissa, and the smallest normal number
_NORMAL = {"F8_E4M3": (3, 2.0**-6), "F8_E5M2": (2, 2.0**-14)}
_CHUNK = 1 << 16  # weights whose float32 copy stays in a core's cache


@dataclass(frozen=True, slots=True)
class Float8Grid:
    """A float8 dtype's numbers up to `largest`, times a scale of the whole weight."""

    dtype: str
    largest: float
    scaling: ClassVar[str] = "tensor"
    surveys: ClassVar[bool] = True
    searches: ClassVar[bool] = False
    nbytes_work: ClassVar[int] = 4 + 1  # the scaled copy, if the segment is one chunk, and codes

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """absmax / largest over all segments, at least 2**-126. Shapes: `()`."""
        return {"scale": tensor_scale(segments, self.largest)}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """None beside the shared one."""
        return {}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """The plain rule: a float's steps grow with the number, so that clipping gains nothing."""
        return self.scales(weight, shared)

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes in the float8 dtype; a product with the inverse scale, as comfy-kitchen has it."""
        codes = weight.new_empty(weight.shape, dtype=torch_dtype(self.dtype))
        inverse = 1.0 / scales["scale"]
        for rows, part in in_chunks(_CHUNK, weight, codes):
            part.copy_((rows * inverse).clamp_(-self.largest, self.largest))
        return codes

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """codes x scale in float32."""
        return widen(codes).mul_(scales["scale"])

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The same step everywhere."""
        mantissa, least = _NORMAL[self.dtype]
        snap = snap_floats(mantissa, least, self.largest)
        return Steps(step=scales["scale"].reshape(1, 1), snap=snap)


def snap_floats(
    mantissa: int, least: float, largest: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds ratios in place to floats of so many bits of mantissa, ties to even: numbers from
    `least`, the smallest normal one, to `largest`, and multiples of the smallest step below.

    Added to 1.5 x 2**(23 - mantissa) times its own power of two, whose last bit is worth a step, a
    float32 is rounded by the addition itself, of either sign. That takes fewer passes than a
    conversion there and back.
    """
    import torch

    exponents = torch.tensor(0x7F800000, dtype=torch.int32)  # of a float32
    rounding = 1.5 * 2.0 ** (23 - mantissa)

    def snap(ratio: torch.Tensor) -> torch.Tensor:
        single = ratio.float().clamp_(-largest, largest)
        power = single.abs().clamp_(min=least)
        power.view(torch.int32).bitwise_and_(exponents)
        single.add_(power, alpha=rounding).sub_(power, alpha=rounding)
        return single if single.dtype == ratio.dtype else ratio.copy_(single)

    return snap


def tensor_scale(segments: Iterable[torch.Tensor], levels: float) -> torch.Tensor:
    """absmax / `levels` of a whole weight, at least 2**-126. Shapes: `(rows, K)` each to `()`."""
    import torch

    # Two reductions rather than magnitudes, which would be another copy of the weight.
    largest = torch.stack([torch.maximum(s.amax(), -s.amin()) for s in segments]).amax()
    return (largest / levels).clamp_(min=SMALLEST_SCALE)


def in_chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equal row ranges of all `tensors`, of about `size` elements of the first one; all at once on
    a device, which has no core's cache to keep to and pays for every step."""
    rows = max(1, tensors[0].shape[0])
    on_cpu = tensors[0].device.type == "cpu"
    step = max(1, size // max(1, tensors[0][:1].numel())) if on_cpu else rows
    for start in range(0, tensors[0].shape[0], step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def widen(codes: torch.Tensor) -> torch.Tensor:
    """The float32 values of float8 numbers, bit-equal to torch's conversion and faster.

    Float16 has at least as many exponent and mantissa bits: moved into their places there, the bits
    of E5M2 are the same number and those of E4M3 one 2**8 times smaller, subnormal or not.
    """
    import torch

    raw = codes.contiguous().view(torch.int8)
    if codes.dtype == torch.float8_e5m2:
        return (raw.to(torch.int16) << 8).view(torch.float16).float()
    if codes.dtype != torch.float8_e4m3fn or codes.numel() == 0:
        return codes.float()
    if bool((raw & 0x7F).amax() == 0x7F):  # NaN, which would become 480
        return codes.float()
    # What the sign's extension left in the exponent's highest bit is cleared.
    bits = raw.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(2.0**8)


def per_expert(stored: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    """The specs of one expert if weights are stacked `(E, …)` with all that lies beside them;
    otherwise `stored` as it is."""
    weight = stored.get("weight")
    if weight is None or len(weight.shape) != 3:
        return stored
    experts = weight.shape[0]
    return {
        name: TensorSpec(spec.dtype, spec.shape[1:]) if spec.shape[:1] == (experts,) else spec
        for name, spec in stored.items()
    }


class Float8(Format):
    """A float8 dtype with a scale per tensor as a format."""

    scalings = ("tensor",)
    first_comfyui = "0.3.68"
    keeps_shape = True
    embeddings = True
    experts = True

    def __init__(
        self, name: str, dtype: str, *, largest: float, aliases: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.aliases = aliases
        self.largest_input = largest
        self._grid = Float8Grid(dtype, largest)

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Any 2-D weight can be stored, in its original basis."""
        return refusal(weight, group)

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` in the float8 dtype and `weight_scale` F32."""
        return {
            "weight": TensorSpec(self.dtype, weight.shape),
            "weight_scale": TensorSpec("F32", ()),
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name alone."""
        return {"format": self.name}

    def grid(self, weight: TensorSpec, scaling: str) -> Float8Grid:
        """The dtype's numbers."""
        return self._grid

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are stored as they are."""
        return codes

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """The scale is stored as it is."""
        return {"weight_scale": scales["scale"]}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Label, the native dtype, and a single F32 scale."""
        stored = per_expert(stored)
        weight, scale = stored.get("weight"), stored.get("weight_scale")
        label = marker.get("format", self.name)
        faults = []
        if label in self.aliases:
            faults.append(
                Fault("marker.format", f"is labelled `{label}`, which no released ComfyUI knows")
            )
        if weight is None:
            return [*faults, Fault("weight.missing", "has no `weight`")]
        if weight.dtype in CONTAINERS:
            faults.append(container_fault(weight))
        elif weight.dtype != self.dtype:
            faults.append(
                Fault("weight.dtype", f"stores its weight as {weight}, not as {self.dtype}")
            )
        if len(weight.shape) != 2:
            faults.append(Fault("weight.shape", f"stores its weight as {weight}, which is not 2-D"))
        if scale is None:
            return [*faults, Fault("scale.missing", "has no `weight_scale`")]
        if scale.dtype != "F32":
            faults.append(Fault("scale.dtype", f"has a {scale.dtype} scale; ComfyUI needs F32"))
        if scale.shape not in {(), (1,)}:
            faults.append(
                Fault(
                    "scale.shape",
                    f"has a scale of shape {list(scale.shape)}; ComfyUI takes one number for the"
                    " whole weight",
                )
            )
        return faults

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """Codes of the native dtype beside a scale that is a float of 16 bits or more."""
        scale = stored.get("weight_scale")
        return stored["weight"].dtype == self.dtype and scale is not None and scale.is_float

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The stored weight's own. Raises: InputError if the scale does not fit it."""
        columns = stored["weight"].shape[-1] if stored["weight"].shape else 0
        scale = stored.get("weight_scale")
        block = None if scale is None else _block(scale.shape, columns, marker)
        return plain_shape(stored, block=block)

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """codes x scale; bytes in a container of integers are viewed as float8."""
        import torch

        if rows.dtype in {torch.uint8, torch.int8}:
            rows = rows.view(torch_dtype(self.dtype))
        scale = beside["weight_scale"]
        count, columns = rows.shape
        block = _block(scale.shape, columns, marker)
        return widen(rows).mul_(spread(scale, start, count, columns, block))


def refusal(weight: TensorSpec, group: int | None) -> str | None:
    """Why a format of 2-D weights in their original basis cannot store `weight`, or None."""
    if len(weight.shape) != 2:
        return f"its weight is {len(weight.shape)}-D"
    if 0 in weight.shape:
        return "its weight is empty"
    return None if group is None else "the format does not store rotated weights"


def container_fault(weight: TensorSpec) -> Fault:
    """Of float8 numbers in a container of integers."""
    return Fault(
        "fp8.container",
        f"stores float8 numbers as {weight}: ComfyUI would convert the bytes' values",
    )


def _block(scale: Sequence[int], columns: int, marker: Mapping[str, Any]) -> int | None:
    """The side of the blocks that a scale of that shape has; None for one per row or tensor."""
    per_row = len(scale) == 2 and scale[1] == 1 and marker.get("format") != _BLOCKWISE
    if len(scale) < 2 or per_row:
        return None
    size = marker.get("group_size")
    if type(size) is int and size > 0:
        return size
    return max(1, columns // max(1, scale[1]))


_BLOCKWISE = "float8_e4m3fn_blockwise"

PLUG = Float8(
    "float8_e4m3fn",
    "F8_E4M3",
    largest=448.0,
    aliases=("float8_e4m3fn_rowwise", _BLOCKWISE, "float8_e4m3fn_block3d"),
)
