"""What adapter files hold: names, scalars read without torch while planning, and factors.

Owns the promise that no non-finite number of an adapter reaches a weight, and what a file's
metadata says of alphas.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.source import Source
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

_SCALAR_CODES = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
# Small adapters are also published in plain 8-bit floats, which convert without a scale.
_FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_CONFIG_KEYS = ("lora_alpha", "r", "use_rslora", "alpha_pattern")
_HEADER_KEY = "lora_adapter_metadata"  # diffusers `utils/peft_utils.py`, JSON of PEFT's config
_KOHYA_ALPHA = "ss_network_alpha"
_PLAIN = re.compile(r"\^?[\w.-]+\$?")


@dataclass(frozen=True)  # no slots: what follows from the fields is found once
class Contents:
    """An adapter file under the names that its kinds are told by.

    `names` gives the stored name of each; most files need no other names than their own. `config`
    is what a PEFT `adapter_config.json` beside the file says of alphas. `added` are small integer
    lists that a whole-file layout implies without storing them.
    """

    source: Source = field(repr=False)
    names: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The file as a person knows it."""
        return self.source.shown

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.source.spec(self.names[name])

    def is_floating(self, name: str) -> bool:
        """Whether the tensor is of a dtype that a factor may have."""
        return self.spec(name).dtype in _FACTOR_DTYPES

    def floating(self, name: str) -> TensorSpec:
        """The spec of a factor. Raises: PlanError if it is not made of floating-point numbers."""
        spec = self.spec(name)
        if spec.dtype not in _FACTOR_DTYPES:
            raise PlanError(
                f"tensor `{printable(name)}` of `{self.shown}` is {spec}, not floating point",
                where=self.shown,
                code="plan.adapter_dtype",
            )
        return spec

    def scalar(self, name: str) -> float:
        """The one number that the tensor `name` holds, read without torch.

        Raises: InputError if it holds more than one, is of a dtype that no scalar has, or not
        finite.
        """
        spec = self.spec(name)
        if spec.numel != 1:
            raise self._bad(name, f"is {spec}, not one number", "input.adapter_scalar")
        return self.numbers(name)[0]

    def numbers(self, name: str) -> list[float]:
        """The numbers of a small tensor, read without torch. Raises: InputError as `scalar`."""
        stored = self.names[name]
        file = self.source.owner[stored]
        entry = file.header.entries[stored]
        spec = entry.spec
        if spec.numel > 64 or (spec.dtype != "BF16" and spec.dtype not in _SCALAR_CODES):
            raise self._bad(name, f"is {spec}, not a few numbers", "input.adapter_scalar")
        raw = bytearray(spec.nbytes)
        file.read_into(memoryview(raw), file.header.data_start + entry.start, tensor=stored)
        if spec.dtype == "BF16":  # the upper half of a float32
            pairs = (bytes(raw[i : i + 2]) for i in range(0, len(raw), 2))
            values = [struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs]
        else:
            values = [v for (v,) in struct.iter_unpack(_SCALAR_CODES[spec.dtype], bytes(raw))]
        if not all(math.isfinite(value) for value in values):
            raise self._nonfinite(name)
        return [float(value) for value in values]

    def matrix(
        self, name: str, dtype: torch.dtype, *, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows `start` to `stop` of a factor in `dtype`.

        Shapes: `(N, a, b, ...)` comes as `(stop - start, a * b * ...)`, a 0-d tensor as `(1, 1)`.

        Raises: InputError naming file and tensor if a value is not finite.
        """
        stored = self.names[name]
        spec = self.source.spec(stored)
        last = (spec.shape[0] if spec.shape else 1) if stop is None else stop
        rows = self.source.owner[stored].rows(stored, start, last).to(dtype)
        if not all_finite(rows):
            raise self._nonfinite(name)
        return rows.view(last - start, spec.row_numel)

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole factor in `dtype` and in its own shape. Raises: as `matrix`."""
        return self.matrix(name, dtype).view(self.spec(name).shape)

    def nbytes_whole(self, name: str, itemsize: int) -> int:
        """Bytes that reading the whole factor holds: as stored and as computed."""
        return self.nbytes_rows(name, self.spec(name).numel, itemsize)

    def nbytes_rows(self, name: str, numel: int, itemsize: int) -> int:
        """Bytes that reading `numel` numbers of the factor holds: as stored and as computed."""
        return numel * itemsize + numel * DTYPES[self.spec(name).dtype].bits // 8

    def metadata_alpha(self, key: str, rank: int) -> float | None:
        """The alpha that the header or `adapter_config.json` states for the layer `key`.

        Where PEFT's `use_rslora` divides by the root of the rank, the alpha that gives the same
        when divided by the rank.
        """
        settings = self._settings
        patterns = settings.get("alpha_pattern")
        alpha = settings.get("lora_alpha")
        if isinstance(patterns, Mapping):
            for pattern, value in patterns.items():
                if _fits(self._plain(pattern), key):
                    alpha = value
                    break
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            return None
        if not math.isfinite(alpha):
            return None
        return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)

    @property
    def metadata_shown(self) -> str:
        """Where `metadata_alpha` has it from, in words."""
        return "in `adapter_config.json`" if self.config else "in the header"

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        if self.config:
            return self.config
        metadata = self.source.metadata
        if _HEADER_KEY in metadata:
            found = _json_object(metadata[_HEADER_KEY])
            # One file may describe several models, each under its component's name.
            bare: dict[str, Any] = {}
            for name, value in found.items():
                own = name.rpartition(".")[2]
                if own in _CONFIG_KEYS:
                    bare.setdefault(own, value)
            return bare
        try:
            return {"lora_alpha": float(metadata[_KOHYA_ALPHA])}
        except (KeyError, ValueError):
            return {}

    def _plain(self, pattern: Any) -> str:
        plain = str(pattern).replace("\\.", ".")
        if not _PLAIN.fullmatch(plain):  # an expression of a stranger could run for ever
            raise InputError(
                f"the `alpha_pattern` of `{self.shown}` holds `{printable(str(pattern))}`,"
                " which is not the plain name of a layer",
                where=self.shown,
                hint="give the alpha yourself with `--alpha`",
                code="input.adapter_config",
            )
        return plain

    def _nonfinite(self, name: str) -> InputError:
        return self._bad(
            name,
            "holds NaN or infinite values",
            "input.nonfinite",
            hint="the adapter is damaged, or its training diverged",
        )

    def _bad(self, name: str, what: str, code: str, hint: str | None = None) -> InputError:
        return InputError(
            f"tensor `{printable(name)}` of `{self.shown}` {what}",
            where=self.shown,
            hint=hint,
            code=code,
        )


def peft_config(text: str) -> dict[str, Any]:
    """What a PEFT `adapter_config.json` says of alphas; empty if it is no JSON object."""
    return {key: value for key, value in _json_object(text).items() if key in _CONFIG_KEYS}


def all_finite(tensor: torch.Tensor, *, stored_as: torch.dtype | None = None) -> bool:
    """Whether every value is finite, also after a cast to `stored_as`.

    One reduction without a temporary: the extremes carry any NaN, and as rounding is monotonic, the
    cast overflows exactly if it overflows for one of them.
    """
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    if stored_as is not None:
        low, high = low.to(stored_as), high.to(stored_as)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fits(pattern: str, key: str) -> bool:
    """PEFT's rule for plain names: a pattern names layers by the end of their names."""
    if pattern.startswith("^"):
        return key.endswith(pattern.strip("^$"))
    return f".{key}".endswith("." + pattern.rstrip("$"))
