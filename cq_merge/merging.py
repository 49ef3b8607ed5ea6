"""`merge`: adapters into a checkpoint, in a Python user's words.

Owns what stands around the merge stage: a quantized base is dequantized where an adapter changes
it, and stored in its formats again if that is asked for. The stages that do so are found in the
catalogue.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cq.core import catalog, comfy
from cq.core.checkpoint import Checkpoint, Stage
from cq.core.dequantize import Dequantize
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import Format
from cq.core.names import parse_map
from cq.core.source import unreadable
from cq.core.stored import Stored, stored_layers
from cq_merge import inputs
from cq_merge.stage import DTYPES, MergeStage

_GROUPS = (256, 64, 16, None)
_LARGEST_MAP = 16 << 20


def merge(
    base: Checkpoint,
    adapters: Sequence[inputs.AdapterWord | tuple[inputs.AdapterWord, float]],
    *,
    scale: float = 1.0,
    dampen: bool | None = None,
    allow_unmatched: bool = False,
    alpha: float | Literal["tensors"] | None = None,
    as_comfyui: bool = False,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
    names: str | os.PathLike[str] | Mapping[str, str] | None = None,
    origin: str | os.PathLike[str] | None = None,
    keep_format: bool = False,
) -> Checkpoint:
    """A checkpoint with `adapters` added to its weights; nothing is computed yet.

    An adapter is a path, `path:strength` as one string, or a pair of path and strength; without a
    strength it is 1. Strengths may be negative. A whole model counts as an adapter that leads from
    the base to it, at strength 1 all the way; with `origin` it adds its difference from that
    checkpoint instead. `scale` multiplies all strengths. With `dampen` the n-th adapter counts
    0.9^(n-1); None dampens several adapters.

    With `allow_unmatched` keys that name no layer of `base` are left out, as long as others do;
    `names`, a JSON file or a mapping, says what unusual keys mean. `alpha` is for LoRA-like layers
    without an alpha tensor: None takes that of the file's metadata, `tensors` scale 1, a number is
    it. `as_comfyui` reproduces ComfyUI also where it drops or errs.

    `method` says how several adapters become one; `density` and `seed` are its settings. `dtype` is
    that of the tensors that change (`bf16`, `fp16`, `fp32`), None their own. Of a quantized base
    the layers that change are dequantized (to the dtype that they had, bf16 where the file does not
    say), and with `keep_format` stored again as they were.

    Raises: UsageError for a strength that is not a finite number or an unknown word, InputError for
    a file that cannot be read, PlanError if base and adapter disagree.
    """
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    wanted = [inputs.wanted(adapter) for adapter in adapters]
    if not wanted:
        raise UsageError("there is no adapter to merge", hint="give at least one adapter file")
    inputs.finite(scale, "the scale")
    _check_words(alpha, method, density, seed, dtype, as_comfyui)
    stage = MergeStage(
        adapters=tuple(inputs.opened(path, strength) for path, strength in wanted),
        origin=None if origin is None else inputs.opened_origin(origin),
        scale=float(scale),
        dampen=len(wanted) > 1 if dampen is None else dampen,
        allow_unmatched=allow_unmatched,
        alpha=float(alpha) if isinstance(alpha, int | float) else alpha,
        as_comfyui=as_comfyui,
        method=method,
        density=density,
        seed=seed,
        dtype=dtype,
        names=_map(names),
    )
    if comfy.find_quantized(base) or any(s.dtype.startswith("F8_") for s in base.specs.values()):
        return _into_quantized(base, stage, keep_format=keep_format)
    if keep_format:
        raise PlanError(
            f"`{base.sources[0].shown}` is not quantized, so there is no format to keep",
            hint="leave `--keep-format` out, or quantize the result with `cq quant`",
            code="plan.not_quantized",
        )
    return stage.apply(base)


def _into_quantized(base: Checkpoint, stage: MergeStage, *, keep_format: bool) -> Checkpoint:
    stored = stored_layers(base)
    decoded = Dequantize().apply(base) if stored else base
    plan = stage.plan(decoded)
    touched = {name.removesuffix(comfy.WEIGHT) for name in plan.touched}
    layers = tuple(layer for layer in stored if layer in touched)
    if not layers:
        return stage.apply(base)
    # What is stored again is not rounded to 16 bits on the way.
    plain = Dequantize(dtype="F32" if keep_format else "source", layers=layers).apply(base)
    merged = stage.apply(plain)
    if not keep_format:
        return merged
    again = _as_stored({layer: stored[layer] for layer in layers}).apply(merged)
    return replace(again, notes=merged.notes)


def _as_stored(layers: Mapping[str, Stored]) -> Stage:
    """The stage that stores `layers` as they were stored."""
    how = {layer: _words(stored) for layer, stored in layers.items()}
    most = Counter(words["format"] for words in how.values()).most_common(1)[0][0]
    plug: type[Stage] = catalog.load("stages", "quant")
    return plug.from_arguments(
        {
            "format": most,
            "family": "none",
            "rules": [{"layers": "re:" + _literal(layer), **words} for layer, words in how.items()],
            "only": ["re:" + _literal(layer) for layer in how],
            "requantize": True,
            "allow_custom_loader": True,
        }
    )


def _words(stored: Stored) -> dict[str, str]:
    """Format, scaling and rotation by which the layer would be stored as it is.

    Raises: PlanError if the format stores nothing so, as for other tools' variants of it.
    """
    plug: Format = stored.format
    if plug.casts:
        return {"format": plug.name}
    matrix = TensorSpec("F32", stored.shape[-2:] if len(stored.shape) == 3 else stored.shape)
    shapes = {own: spec.shape[-2:] for own, spec in stored.tensors.items()}
    for scaling in plug.scalings:
        made = plug.tensors(matrix, scaling)
        if any(math.prod(shapes.get(own, ())) != math.prod(s.shape) for own, s in made.items()):
            continue
        for group in _GROUPS:
            if plug.refuse(matrix, scaling, group) is not None:
                continue
            marker = plug.marker(matrix, scaling, group)
            if all(stored.settings.get(k) == v for k, v in marker.items() if k != "format") and (
                group is not None or not stored.settings.get("convrot")
            ):
                rotate = "off" if group is None else str(group)
                return {
                    "format": plug.name,
                    "scaling": scaling,
                    "optimizer": "rtn",
                    "rotate": rotate,
                }
    raise PlanError(
        f"layer `{stored.layer}` is stored in a variant of {plug.name} that cq does not write",
        where=stored.layer,
        hint="leave `--keep-format` out, and quantize the result with `cq quant --requantize`",
        code="plan.keep_format",
    )


def _literal(layer: str) -> str:
    return re.escape(layer)


def _check_words(
    alpha: object,
    method: str,
    density: float | None,
    seed: int,
    dtype: str | None,
    as_comfyui: bool,
) -> None:
    plug = catalog.load("methods", method)
    if alpha is not None and alpha != "tensors":
        inputs.finite(alpha, "the alpha")  # type: ignore[arg-type]
    if as_comfyui and alpha not in {None, "tensors"}:
        raise UsageError(
            "ComfyUI reads alphas from tensors alone", hint="use `--as-comfyui` or `--alpha`"
        )
    if as_comfyui and not plug.additive:
        raise UsageError("ComfyUI knows no merge methods", hint="use `--as-comfyui` or `--method`")
    if density is not None and plug.density is None:
        raise UsageError(f"the method `{method}` has no density", hint="leave `--density` out")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"the density cannot be {density:g}", hint="it is above 0, and 1 at most")
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed cannot be {seed}", hint="it is a whole number from 0 on")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"`{dtype}` is no dtype of a merged weight", hint="choose from " + ", ".join(DTYPES)
        )


def _map(names: str | os.PathLike[str] | Mapping[str, str] | None) -> Mapping[str, str]:
    if names is None:
        return {}
    if isinstance(names, Mapping):
        return dict(names)
    shown = os.fspath(names)
    try:
        if Path(names).stat().st_size > _LARGEST_MAP:
            raise InputError(f"`{shown}` is too large for a map of names", where=shown)
        text = Path(names).read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(shown, error) from error
    except ValueError as error:
        raise InputError(f"`{shown}` is not text", where=shown, code="input.map") from error
    return parse_map(text, shown)
