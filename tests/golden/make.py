"""Writes the golden files `tests/golden/*.json` anew, from comfy-kitchen's own quantizers.

    .venv/bin/python -m tests.golden.make

Run it when a format is added, and read the difference before committing it: a file that changes
says that files which cq wrote until now mean something else. A new format gets a case in `CASES`.

Weights are chosen so that the codes can be checked by eye: multiples of a step that is a power of
two. Rotated formats get weights whose rotated form is so; it stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cq.core.rotation import hadamard
from tests.golden import kitchen, text

FOLDER = Path(__file__).resolve().parent
ZERO_ROWS = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A weight, the marker of its layer, and what cq is to be told to store it so.

    `by_hand` makes the stored tensors and their weight where no quantizer of kitchen does.
    `padded` cases have the weight's shape in the marker, which is cq's own addition.
    """

    name: str
    marker: Mapping[str, Any]
    weight: Callable[[], torch.Tensor]
    note: str
    quantize: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None

    @property
    def format(self) -> str:
        """The storage format."""
        found: str = self.marker["format"]
        return found

    def document(self) -> dict[str, Any]:
        """The golden file."""
        weight = self.weight()
        group = self.marker.get("convrot_groupsize")
        rotated = None if group is None else _rotated(weight, group)
        if self.by_hand is None:
            scaling = self.quantize.get("scaling")
            stored = kitchen.quantize(self.format, weight, self.marker, scaling=scaling)
        else:
            stored = self.by_hand(weight)
        decoded = self._decoded(stored, tuple(weight.shape))
        exact = torch.equal(decoded, weight)
        return {
            "format": self.format,
            "made_by": self._made_by(),
            "note": self.note,
            "quantize": dict(self.quantize),
            "shape": list(weight.shape),
            "weight": text.numbers(weight),
            **({} if rotated is None else {"rotated": text.numbers(rotated)}),
            "marker": dict(self.marker),
            "tensors": {key: text.stored(tensor) for key, tensor in stored.items()},
            "decoded": "weight" if exact else text.numbers(decoded),
        }

    def _made_by(self) -> str:
        layout = kitchen.LAYOUTS.get(self.format)
        if layout is None:
            return "hand, decoded by hand"
        reader = f"comfy-kitchen {kitchen.VERSION} {layout}"
        return reader if self.by_hand is None else f"hand, decoded by {reader}"

    def _decoded(self, stored: dict[str, torch.Tensor], shape: Any) -> torch.Tensor:
        if self.format in kitchen.LAYOUTS:
            return kitchen.dequantize(self.format, stored, self.marker, shape)
        # int8_blockwise, which kitchen does not know: a scale for each square of the codes
        codes, scale = stored["weight"].float(), stored["weight_scale"]
        side = self.marker["group_size"]
        return codes * scale.repeat_interleave(side, 0).repeat_interleave(side, 1)


def _rotated(weight: torch.Tensor, group: int) -> torch.Tensor:
    return (weight.view(-1, group) @ hadamard(group)).view(weight.shape)


def _steps(rows: list[list[float]], steps: list[float]) -> torch.Tensor:
    return torch.tensor(rows) * torch.tensor(steps)[:, None]


def _int8() -> torch.Tensor:
    return _steps(
        [
            [-127, -64, -32, -16, -8, -4, -2, -1, 0, 1, 3, 7, 15, 31, 63, 127],
            [127, 126, 125, 124, 123, 122, 121, 120, 5, 4, 3, 2, 1, 0, -1, -2],
            [127, 0.5, 1.5, 2.5, 3.5, 4.5, -0.5, -1.5, -2.5, -3.5, -4.5, 0.25, 0.75, -0.25, 0, 0],
            [0] * 16,
        ],
        [2**-7, 2**-9, 2**-8, 0],
    )


def _int8_tensor() -> torch.Tensor:
    return _int8()[:3] * torch.tensor([[1.0], [4.0], [2.0]])


def _int8_rotated() -> torch.Tensor:
    rows: list[list[float]] = [[*range(-127, 128, 17), 127], [127, *range(7, -8, -1)]]
    return _rotated(_steps(rows, [2**-7, 2**-8]), 16)


def _int4_rotated() -> torch.Tensor:
    counting = [*range(-7, 8), 0]
    rows: list[list[float]] = [counting * 4, [7, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, -0.5] * 8, [0] * 64]
    return _rotated(_steps(rows, [2**-3, 2**-5, 0]), 64)


def _grouped_rotated() -> torch.Tensor:
    # Half of the codebook's levels in 128ths, so that rotating them is exact.
    half: list[float] = [7, 20, 34, 49, 64, 82, 102, 126]
    levels = [-x for x in half[::-1]] + half
    rows = [levels + levels[::-1], [x / 2 for x in levels] + levels]
    return _rotated(_steps(rows, [2**-7, 2**-9]), 16)


def _float8_e4m3() -> torch.Tensor:
    return _steps(
        [
            [448, 416, 384, 352, 320, 288, 256, 240],
            [-1, -1.125, -1.25, -1.375, -1.5, -1.625, -1.75, -1.875],
            [17, 19, 21, 23, 16.5, -17, -19, 0],
            [2**-9, 2**-8, 3 * 2**-9, 2**-7, 2**-6, 2**-10, 3 * 2**-10, 0],
        ],
        [2**-8] * 4,
    )


def _float8_e5m2() -> torch.Tensor:
    return _steps(
        [
            [57344, 49152, 40960, 32768, 28672, 24576, 20480, 16384],
            [-4, -5, -6, -7, -8, -10, -12, -14],
            [9, 11, 13, 15, 8.5, -9, -11, 0],
            [2**-16, 2**-15, 3 * 2**-16, 2**-14, 5 * 2**-16, 2**-17, 3 * 2**-17, 0],
        ],
        [2**-15] * 4,
    )


def _with_zero_rows(first: list[float], others: list[list[float]]) -> torch.Tensor:
    return torch.tensor([first, *([[0.0] * len(first)] * ZERO_ROWS), *others])


def _mxfp8() -> torch.Tensor:
    # The 32 largest numbers of E4M3, whose codes count down from 7e; then a block of 8.
    large = [(8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(0x7E, 0x5E, -1)]
    ties = [448.0, 17, 19, 21, 23, 16.5] + [0.0] * 26
    return _with_zero_rows(
        [x * 2**-8 for x in large] + [x * 2**-12 for x in large[:8]],
        [
            [-x * 2**-6 for x in large] + [0.0] * 8,
            [x * 2**-8 for x in ties] + [x * 2**-10 for x in (449, 1, 2, 3, 4, 5, 6, 7)],
        ],
    )


def _nvfp4() -> torch.Tensor:
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    down = [-x for x in levels[::-1]]
    return _with_zero_rows(
        [x * 448 * 2**-10 for x in levels + down] + [x * 64 * 2**-10 for x in levels],
        [
            [x * 32 * 2**-10 for x in levels + levels] + [0.0] * 8,
            [x * 256 * 2**-10 for x in ties + down] + [x * 96 * 2**-10 for x in ties],
        ],
    )


AWQ_SCALE = ((2**-4, 2**-6), (2**-5, 2**-7))  # [group of columns][row], as they are stored
AWQ_ZERO = ((0.5, 0.0), (-0.25, 0.125))


def _awq_codes() -> torch.Tensor:
    counting = list(range(16))
    return torch.tensor([counting * 8, counting[::-1] * 8], dtype=torch.uint8)


def _awq() -> torch.Tensor:
    scale, zero = (torch.tensor(v).T.repeat_interleave(64, 1) for v in (AWQ_SCALE, AWQ_ZERO))
    return (_awq_codes().float() - 8) * scale + zero


def _awq_stored(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = _awq_codes()
    return {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8),
        "weight_scale": torch.tensor(AWQ_SCALE).bfloat16(),
        "weight_zeros": torch.tensor(AWQ_ZERO).bfloat16(),
    }


BLOCK_STEPS = torch.tensor([[2**-7, 2**-9]])


def _blockwise_codes() -> torch.Tensor:
    codes = torch.zeros(128, 256)
    codes[0, :8] = torch.tensor([127, 64, 32, 16, 8, 4, 2, 1])
    codes[127, 120:128] = torch.tensor([-127, -64, -32, -16, -8, -4, -2, -1])
    codes[1, 128:136] = torch.tensor([-127, 1, 2, 3, 4, 5, 6, 7])
    return codes


def _blockwise() -> torch.Tensor:
    return _blockwise_codes() * BLOCK_STEPS.repeat_interleave(128, 1)


def _blockwise_stored(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": _blockwise_codes().to(torch.int8), "weight_scale": BLOCK_STEPS}


CASES = (
    Case(
        name="int8_tensorwise",
        marker={"format": "int8_tensorwise"},
        weight=_int8,
        quantize={"scaling": "row", "optimizer": "rtn"},
        note="each row in multiples of 1/128, 1/512, 1/256: these are the codes; the third row has"
        " ties, which go to the even neighbour; a row of zeros has the scale 1e-30",
    ),
    Case(
        name="int8_tensorwise-tensor",
        marker={"format": "int8_tensorwise"},
        weight=_int8_tensor,
        quantize={"scaling": "tensor", "optimizer": "rtn"},
        note="all rows in multiples of 1/128, which is the one scale",
    ),
    Case(
        name="int8_tensorwise-convrot",
        marker={"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
        weight=_int8_rotated,
        quantize={"scaling": "row", "rotate": "16"},
        note="the codes are the rotated rows in multiples of 1/128 and 1/256",
    ),
    Case(
        name="float8_e4m3fn",
        marker={"format": "float8_e4m3fn"},
        weight=_float8_e4m3,
        note="the codes are the weight x 256: 448 is 7e, 416 is 7d, and so on; the third row has"
        " ties, the fourth numbers below the least normal one",
    ),
    Case(
        name="float8_e5m2",
        marker={"format": "float8_e5m2"},
        weight=_float8_e5m2,
        note="the codes are the weight x 32768: 57344 is 7b, 49152 is 7a, and so on; the third row"
        " has ties, the fourth numbers below the least normal one",
    ),
    Case(
        name="mxfp8",
        marker={"format": "mxfp8", "orig_shape": [34, 40]},
        weight=_mxfp8,
        note="rows 0, 32 and 33 are not zero; padded to 64x64. The block scale of row r and block c"
        " is the byte 4 (r mod 32) + r div 32, c: 77 is 2^(0x77 - 127) = 1/256; what kitchen has as"
        " F8_E8M0 is stored as U8. orig_shape is cq's own, ComfyUI ignores it",
    ),
    Case(
        name="nvfp4",
        marker={"format": "nvfp4", "orig_shape": [34, 24]},
        weight=_nvfp4,
        note="rows 0, 32 and 33 are not zero; padded to 48x32. The even column is the high nibble."
        " The block scale of row r and block c is the byte 4 (r mod 32) + r div 32, c: 7e is 448,"
        " 68 is 64; weight_scale_2 is 1/1024. Row 33 has ties. orig_shape is cq's own, ComfyUI"
        " ignores it",
    ),
    Case(
        name="convrot_w4a4",
        marker={"format": "convrot_w4a4", "convrot_groupsize": 64},
        weight=_int4_rotated,
        note="the codes are the rotated rows in multiples of 1/8 and 1/32, the even column in the"
        " low nibble; the second row has ties; a row of zeros has the scale 1e-10 / 7",
    ),
    Case(
        name="asym_w4a8_int8",
        marker={"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16},
        weight=_grouped_rotated,
        note="the rotated rows are the 16 levels of the codebook, rounded to 128ths, up or down: so"
        " the codes count, the even column in the low nibble. Scales are fitted, not exact",
    ),
    Case(
        name="awq_w4a16",
        marker={"format": "awq_w4a16", "group_size": 64},
        weight=_awq,
        by_hand=_awq_stored,
        note="(code - 8) x scale + zero, the codes counting up and down, the even column in the low"
        " nibble; scale and zero as [group of columns][row]. kitchen has no quantizer for it",
    ),
    Case(
        name="int8_blockwise",
        marker={"format": "int8_blockwise", "group_size": 128},
        weight=_blockwise,
        by_hand=_blockwise_stored,
        note="multiples of 1/128 in the left block and of 1/512 in the right one. No release of"
        " ComfyUI or kitchen reads it; the layout is that of silveroxides' fork",
    ),
)


def main() -> None:
    """Write every file."""
    for case in CASES:
        path = FOLDER / f"{case.name}.json"
        path.write_text(text.dump(case.document()), encoding="utf-8")


if __name__ == "__main__":
    main()
