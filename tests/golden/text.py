"""Tensors as text that a person can read, and back: the form of the golden files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cq.core.dtypes import spec_of, torch_dtype

_SHORT = 8  # runs of at least so many zeros are counted
_READABLE = ("F32", "BF16")


def numbers(matrix: torch.Tensor) -> list[Any]:
    """The rows of a float32 matrix, numbers as short as they can be. Where many zeros follow each
    other, in a row or as whole rows, `{"zeros": how many}` stands for them."""
    return _shortened(matrix, lambda row: _counted([_number(x) for x in row]))


def matrix(rows: Iterable[Any], columns: int) -> torch.Tensor:
    """The float32 matrix that `numbers` told."""
    found: list[list[float]] = []
    for row in rows:
        if isinstance(row, Mapping):
            found += [[0.0] * columns] * row["zeros"]
            continue
        found.append([])
        for item in row:
            found[-1] += [0.0] * item["zeros"] if isinstance(item, Mapping) else [item]
    return torch.tensor(found, dtype=torch.float32)


def stored(tensor: torch.Tensor) -> dict[str, Any]:
    """A stored tensor: dtype, shape, and its bytes in hexadecimal, a text for each row. `00*15` is
    15 zero bytes, `{"zeros": n}` n rows of them. Values stand beside where bytes do not show them.
    """
    spec = spec_of(tensor)
    rows = tensor.reshape(spec.shape[0] if len(spec.shape) > 1 else 1, -1)
    told: dict[str, Any] = {"dtype": spec.dtype, "shape": list(spec.shape)}
    if spec.dtype in _READABLE:
        told["values"] = numbers(rows.float())
    told["hex"] = _shortened(rows.contiguous().view(torch.uint8), _hex)
    return told


def tensor(told: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that `stored` told."""
    raw = bytearray()
    dtype = torch_dtype(told["dtype"])
    row_bytes = dtype.itemsize * (told["shape"][-1] if told["shape"] else 1)
    for row in told["hex"]:
        if isinstance(row, Mapping):
            raw += bytes(row["zeros"] * row_bytes)
            continue
        raw += bytes.fromhex(re.sub(r"00\*(\d+)", lambda m: "00" * int(m[1]), row))
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(told["shape"])


def dump(document: Mapping[str, Any]) -> str:
    """The document as JSON, each row on a line of its own."""
    lines = (f' "{key}": {_indented(value, 1)}' for key, value in document.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _shortened(rows: torch.Tensor, tell: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = []
    for row in rows:
        if rows.shape[0] < _SHORT or any(row.contiguous().view(torch.uint8)):
            found.append(tell(row))
        elif found and isinstance(found[-1], dict):
            found[-1]["zeros"] += 1
        else:
            found.append({"zeros": 1})
    return found


def _counted(row: list[float]) -> list[Any]:
    found: list[Any] = []
    start = 0
    while start < len(row):
        stop = start
        while stop < len(row) and str(row[stop]) == "0":
            stop += 1
        if stop - start >= _SHORT:
            found.append({"zeros": stop - start})
        else:
            found += row[start:stop]
        if stop < len(row):
            found.append(row[stop])
        start = stop + 1
    return found


def _hex(row: torch.Tensor) -> str:
    text = row.numpy().tobytes().hex(" ")
    return re.sub(rf"\b00( 00){{{_SHORT - 1},}}", lambda m: f"00*{(len(m[0]) + 1) // 3}", text)


def _number(value: torch.Tensor) -> float:
    exact = float(value)
    if exact.is_integer() and abs(exact) < 1e6 and str(exact) != "-0.0":
        return int(exact)
    # Powers of two have few digits; else NumPy knows the shortest text that is this float32 again.
    return exact if len(str(exact)) <= 13 else float(str(value.numpy()))


def _indented(value: Any, depth: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(flat) <= 100 - depth or not any(isinstance(v, list | dict | str) for v in nested):
        return flat
    if isinstance(value, list) and not any(isinstance(v, list | str) for v in value):
        return flat  # a row of numbers, with counted zeros
    items = (
        [f'"{key}": {_indented(v, depth + 1)}' for key, v in value.items()]
        if isinstance(value, dict)
        else [_indented(v, depth + 1) for v in value]
    )
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * depth
    return f"{opening}{space} " + f",{space} ".join(items) + f"{space}{closing}"
