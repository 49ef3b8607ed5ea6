"""The options that say what `cq quant` is to do, for the commands that ask what it would do."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL|-]", help="A checkpoint or manifest; left out, it is piped in."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="How weights would be stored; default int8_tensorwise."
    ),
]
Scaling = Annotated[
    str | None,
    typer.Option("--scaling", metavar="tensor|row|block", help="How far one scale reaches."),
]
Optimizer = Annotated[
    str | None, typer.Option("--optimizer", metavar="NAME", help="How weights are rounded.")
]
Rotate = Annotated[
    str | None,
    typer.Option(
        "--rotate", metavar="auto|off|256|64|16", help="Largest ConvRot group; default auto."
    ),
]
Family = Annotated[
    str,
    typer.Option(
        "--family", metavar="auto|none|NAME", help="The model; auto tells it by its header."
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Rules for single layers, as JSON."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="PATTERN[=FORMAT]",
        help="Quantize these layers alone, in FORMAT if named; repeatable.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="PATTERN", help="Keep these layers; repeatable."),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Plan to dequantize a quantized checkpoint first.")
]
AllowCustomLoader = Annotated[
    bool,
    typer.Option("--allow-custom-loader", help="Allow formats that no released ComfyUI loads."),
]
