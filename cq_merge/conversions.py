"""Adapter files that name their tensors in a way of their own, as the names that kinds know.

Owns the three whole-file layouts that ComfyUI tells by their names and rewrites before it reads
them. Knows no kind, and nothing of the layers of a model.

Source: ComfyUI `comfy/lora_convert.py:convert_lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cq.core.errors import InputError
from cq.core.source import Source
from cq.core.text import printable
from cq_merge.contents import Contents

_PREFIX = "diffusion_model."
_USO = (
    (".down.weight", ".lora_down.weight"),
    (".up.weight", ".lora_up.weight"),
    (".qkv_lora2.", ".txt_attn.qkv."),
    (".qkv_lora1.", ".img_attn.qkv."),
    (".proj_lora1.", ".img_attn.proj."),
    (".proj_lora2.", ".txt_attn.proj."),
    (".qkv_lora.", ".linear1_qkv."),
    (".proj_lora.", ".linear2."),
    (".processor.", "."),
)


def _bfl_control(name: str) -> str:
    """FLUX.1 Canny, Depth and other control adapters by Black Forest Labs."""
    new = name.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
    return _PREFIX + new


def _wan_fun(name: str) -> str:
    """Reward adapters of Wan Fun, with one underscore too many."""
    wrong = "lora_unet__"
    return "lora_unet_" + name.removeprefix(wrong) if name.startswith(wrong) else name


def _uso(name: str) -> str:
    """USO, with the names of attention processors."""
    for old, new in _USO:
        name = name.replace(old, new)
    return _PREFIX + name


# The names by which a layout is told, and how it renames.
_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[str], str]], ...] = (
    (("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"), _bfl_control),
    (("lora_unet__blocks_0_cross_attn_k.lora_down.weight",), _wan_fun),
    (
        (
            "single_blocks.37.processor.qkv_lora.up.weight",
            "double_blocks.18.processor.qkv_lora2.up.weight",
        ),
        _uso,
    ),
)


def contents(source: Source, config: Mapping[str, Any]) -> Contents:
    """What an adapter file holds, under the names that its kinds are told by.

    `config` is what an `adapter_config.json` beside it says of alphas.

    Raises: InputError if two tensors come to have one name.
    """
    stored = source.owner
    rename = next((rename for told, rename in _LAYOUTS if all(n in stored for n in told)), None)
    if rename is None:
        return Contents(source=source, names={name: name for name in stored}, config=config)
    names: dict[str, str] = {}
    for name in stored:
        new = rename(name)
        if new in names:
            raise InputError(
                f"`{source.shown}` holds `{printable(name)}` and `{printable(names[new])}`,"
                f" which both stand for `{printable(new)}`",
                where=source.shown,
                code="input.adapter_twice",
            )
        names[new] = name
    added: dict[str, tuple[int, ...]] = {}
    up, down = "img_in.lora_B.weight", "img_in.lora_A.weight"
    if rename is _bfl_control and up in stored:
        # The control image comes in more channels than the layer has columns, so it grows.
        shape = (*source.spec(up).shape[:1], *source.spec(down).shape[1:2])
        added[f"{_PREFIX}img_in.reshape_weight"] = shape
    return Contents(source=source, names=names, config=config, added=added)
