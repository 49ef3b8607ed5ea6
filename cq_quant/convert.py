"""`convert_to_int8`: the entry point of the system that cq succeeds, under its old words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import cq
from cq.core import catalog
from cq.core.errors import UsageError
from cq.core.manifest import open_checkpoint
from cq.core.write import Written
from cq_quant.stage import quantize

_Path = str | os.PathLike[str]


def convert_to_int8(
    *,
    input_file: _Path,
    output_file: _Path,
    comfy_quant: bool = True,
    merge_lora_path: _Path | None = None,
    merge_lora_paths: Sequence[_Path] = (),
    merge_lora_scale: float = 1.0,
    merge_lora_dampen: bool = True,
    optimizer: str = "quip",
    force: bool = False,
) -> Written:
    """Merge adapters if any are given, quantize to `int8_tensorwise`, write `output_file`.

    The same as `cq merge … | cq quant --optimizer … -o …`. Adapters are merged in the order given,
    `merge_lora_paths` before `merge_lora_path`. `comfy_quant` must be True: without markers no
    loader reads the file.

    Raises: UsageError for `comfy_quant=False`, else as `cq_quant.quantize` and `cq.write` do.
    """
    if not comfy_quant:
        raise UsageError(
            "`comfy_quant=False` would write a file that ComfyUI cannot load",
            hint="leave it out; markers are always written",
        )
    checkpoint = open_checkpoint(input_file)
    paths = [*merge_lora_paths, *([merge_lora_path] if merge_lora_path is not None else [])]
    if paths:
        arguments: dict[str, Any] = {
            "adapters": [{"path": os.fspath(path), "strength": 1.0} for path in paths],
            "scale": merge_lora_scale,
            "dampen": merge_lora_dampen and len(paths) > 1,
        }
        # By name: merging is another package's, found in the catalogue.
        checkpoint = catalog.load("stages", "merge").from_arguments(arguments).apply(checkpoint)
    return cq.write(quantize(checkpoint, optimizer=optimizer), output_file, force=force)
