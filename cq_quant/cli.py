"""`cq quant`: options to `quantize`, and its decisions as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cq.cli import options
from cq.cli.output import size
from cq.core.errors import UsageError

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint

_COLUMNS = ("layers>", "layer", "becomes", "rotation>", "saves>", "reason")


_Rotate = Annotated[
    str,
    typer.Option(
        "--rotate",
        metavar="auto|off|256|64|16",
        help="Largest ConvRot group; auto is as the optimizer works.",
    ),
]
_ScaleSearch = Annotated[
    bool,
    typer.Option(
        "--scale-search/--no-scale-search",
        help="Choose 4-bit scales of least error, or as the largest weight asks.",
    ),
]
_Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Round by what the layers' inputs are like, as `cq.calibration` recorded it.",
    ),
]
_CalibrationLora = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration-lora",
        metavar="FILE[:WEIGHT]",
        help="Count what this LoRA reads among the inputs; repeatable.",
    ),
]
_InputScales = Annotated[
    str | None,
    typer.Option(
        "--input-scales",
        metavar="absmax",
        help="Store by what a runtime divides inputs, for formats that take it.",
    ),
]
_BiasCorrection = Annotated[
    bool,
    typer.Option("--bias-correction", help="Make biases carry the mean error of the outputs."),
]
_SmoothQuant = Annotated[
    float | None,
    typer.Option(
        "--smoothquant",
        metavar="ALPHA",
        help="Move outliers from inputs to weights where a factor has a place.",
    ),
]
_Equalize = Annotated[
    bool,
    typer.Option(
        "--equalize", help="Even out inputs and weights by factors that fold away exactly."
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTIMIZER.NAME=NUMBER",
        help="Set a number of an optimizer, as in quip.damp=0.1; repeatable.",
    ),
]
_Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of what an optimizer draws.", min=0)
]
_Bf16 = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(
        "--bf16-compute",
        help="Products of rounding by a calibration in bfloat16; auto: if --device names a GPU.",
    ),
]
_NativeNames = Annotated[
    bool,
    typer.Option("--native-names", help="Give layers named as in diffusers the model's own names."),
]
_SaveQuantMetadata = Annotated[
    bool,
    typer.Option("--save-quant-metadata", help="Write the markers to the header as well."),
]
_AllowCustomLoader = Annotated[
    bool,
    typer.Option("--allow-custom-loader", help="Allow formats that no released ComfyUI loads."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "quant")
    def quant(
        model: Annotated[
            str | None,
            typer.Argument(
                metavar="[MODEL|-]", help="A checkpoint or manifest; left out, it is piped in."
            ),
        ] = None,
        format: Annotated[
            str,
            typer.Option(
                "--format", metavar="NAME", help="How weights are stored; `cq plugins` lists them."
            ),
        ] = "int8_tensorwise",
        scaling: Annotated[
            str | None,
            typer.Option(
                "--scaling", metavar="tensor|row|block", help="How far one scale reaches."
            ),
        ] = None,
        optimizer: Annotated[
            str | None,
            typer.Option(
                "--optimizer",
                metavar="NAME",
                help="How weights are rounded; default quip where the format can be rotated.",
            ),
        ] = None,
        rotate: _Rotate = "auto",
        scale_search: _ScaleSearch = True,
        family: Annotated[
            str,
            typer.Option(
                "--family", metavar="auto|none|NAME", help="The model; auto tells it by its header."
            ),
        ] = "auto",
        recipe: Annotated[
            str | None,
            typer.Option("--recipe", metavar="FILE", help="Rules for single layers, as JSON."),
        ] = None,
        only: Annotated[
            list[str] | None,
            typer.Option(
                "--only",
                metavar="PATTERN[=FORMAT]",
                help="Quantize these layers alone, in FORMAT if named; repeatable.",
            ),
        ] = None,
        skip: Annotated[
            list[str] | None,
            typer.Option("--skip", metavar="PATTERN", help="Keep these layers; repeatable."),
        ] = None,
        requantize: Annotated[
            bool,
            typer.Option("--requantize", help="Dequantize a quantized checkpoint first."),
        ] = False,
        allow_custom_loader: _AllowCustomLoader = False,
        save_quant_metadata: _SaveQuantMetadata = False,
        native_names: _NativeNames = False,
        calibration: _Calibration = None,
        calibration_lora: _CalibrationLora = None,
        settings: _Settings = None,
        seed: _Seed = 0,
        bf16_compute: _Bf16 = "auto",
        input_scales: _InputScales = None,
        bias_correction: _BiasCorrection = False,
        smoothquant: _SmoothQuant = None,
        equalize: _Equalize = False,
        output: options.Output = None,
        defer: Annotated[
            bool, typer.Option("--defer", help="Pass on a manifest instead of writing a file.")
        ] = False,
        force: options.Force = False,
        restart: options.Restart = False,
        max_shard_size: options.MaxShardSize = None,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
        engine: options.Engine = "local",
        device: options.Device = "cpu",
        streaming_mode: options.Streaming = "auto",
        quip_checkpointed: options.QuipCheckpointed = False,
        threshold: options.CheckpointedThreshold = None,
        segments: options.CheckpointedSegments = None,
        vram_limit: options.VramLimit = None,
    ) -> int:
        """Quantize the linear layers of a checkpoint so that ComfyUI loads it natively.

        Without -o it writes NAME-FORMAT.safetensors beside the source. PATTERN is a glob over layer
        names, or a regular expression after `re:`; layers that `--only` or a recipe names are
        quantized in spite of advice. The formats bf16, fp16 and fp32 are plain casts
        of all tensors; on a quantized checkpoint they undo the quantization.

        \b
          cq quant flux.safetensors
          cq merge flux.safetensors style.safetensors:0.8 | cq quant -o out.safetensors
          cq quant flux.safetensors --format nvfp4 --calibration flux.calib.safetensors
          cq quant flux.safetensors --only '*.img_mlp.*=nvfp4' --only 'single_blocks.*' --dry-run
        """
        from cq.cli.deliver import Delivery, deliver
        from cq.cli.placing import checkpointed
        from cq.core.knowledge import know
        from cq.core.native import NativeNames
        from cq_quant.guidance import parse_setting
        from cq_quant.stage import quantize
        from cq_quant.where import in_bf16

        if defer and output is not None:
            raise UsageError("`--defer` writes no file, so it takes no `-o`")
        source = options.open_input(model, beside=recipe)
        checkpoint = quantize(
            source,
            format=format,
            scaling=scaling,
            optimizer=optimizer,
            rotate=rotate,
            scale_search=scale_search,
            family=family,
            recipe=recipe or (),
            only=only or (),
            skip=skip or (),
            requantize=requantize,
            allow_custom_loader=allow_custom_loader,
            save_quant_metadata=save_quant_metadata,
            native_names=native_names,
            calibration=calibration,
            calibration_loras=calibration_lora or (),
            settings=dict(map(parse_setting, settings or ())),
            seed=seed,
            bf16=in_bf16(bf16_compute, device),
            input_scales=input_scales,
            bias_correction=bias_correction,
            smoothquant=smoothquant,
            equalize=equalize,
        )
        known = know((NativeNames().apply(source) if native_names else source).specs, family)
        return deliver(
            checkpoint,
            Delivery(
                output=default_output(checkpoint) if output is None and not defer else output,
                named=output is not None,
                force=force,
                restart=restart,
                max_shard_size=options.parse_size(max_shard_size),
                dry_run=dry_run,
                workers=workers,
                memory_limit=options.parse_size(memory_limit),
                engine=engine,
                device=device,
                streaming_mode=streaming_mode,
                quip_checkpointed=checkpointed(quip_checkpointed, threshold, segments),
                vram_limit=options.parse_size(vram_limit),
            ),
            command="quant",
            remarks=[known.remark(), *_remarks(checkpoint)],
            columns=_COLUMNS,
            rows=_rows(checkpoint.notes),
        )


def default_output(checkpoint: Checkpoint) -> str:
    """`<source stem>[-merged]-<format>.safetensors` beside the source; in the current directory for
    a pipe. The format is `mixed` if there are several."""
    source = checkpoint.sources[0]
    formats = {note["format"] for note in checkpoint.notes if note["action"] == "quantize"}
    what = formats.pop() if len(formats) == 1 else "mixed" if formats else "copy"
    merged = "-merged" if any(stage.name == "merge" for stage in checkpoint.stages) else ""
    name = f"{source.stem}{merged}-{what}.safetensors"
    return name if source.spooled else str(Path(source.path).with_name(name))


def _remarks(checkpoint: Checkpoint) -> list[str]:
    """What was decided, in a sentence, and what a user should know of how it was."""
    from cq.core import catalog
    from cq.core.formats import loaded_by
    from cq_quant.uses import told

    chosen = [n for n in checkpoint.notes if n["action"] == "quantize"]
    formats = Counter(n["format"] for n in chosen)
    notes = Counter(n["note"] for n in chosen if n["note"])
    kept = len(checkpoint.notes) - len(chosen)
    if not chosen:
        return [f"there is nothing to change: all {kept} tensors are as they are asked to be"]
    counts = ", ".join(f"{count} {name}" for name, count in formats.most_common())
    plugs = [catalog.load("formats", name) for name in formats]
    releases = [n["first_comfyui"] for n in chosen if n["first_comfyui"] is not None]
    guided = sum("calibration" in n for n in chosen)
    casts = all(plug.casts for plug in plugs)
    what = "tensors are cast" if casts else "layers are quantized"
    return [
        f"{len(chosen)} {what} ({counts}), {kept} are kept as they are;"
        f" {loaded_by(plugs, releases)} loads the result",
        *(f"{note} ({count} layers)" for note, count in notes.items()),
        *([_guidance(guided, len(chosen))] if guided else []),
        *told(chosen),
    ]


def _guidance(guided: int, chosen: int) -> str:
    if guided == chosen:
        return f"the calibration guides all {chosen} layers"
    others = "the others are rounded as without one"
    return f"the calibration guides {guided} of {chosen} layers; {others}"


def _rows(notes: Any) -> Iterator[tuple[str, ...]]:
    from cq.core.text import folded

    groups: dict[tuple[str, ...], list[Any]] = {}
    for note in notes:
        becomes = (
            " ".join(
                word
                for word in (note["format"], note["scaling"], note["optimizer"])
                if word not in {None, "none", "own"}
            )
            if note["action"] == "quantize"
            else f"kept as {note['dtype']}"
        )
        rotation = str(note.get("rotation") or "")
        key = (folded(note["layer"]), becomes, rotation, note["reason"])
        groups.setdefault(key, []).append(note)
    for (layer, becomes, rotation, reason), members in groups.items():
        saved = sum(n["nbytes"] - n["nbytes_after"] for n in members if "nbytes_after" in n)
        yield (
            str(len(members)),
            layer,
            becomes,
            rotation,
            size(saved) if saved else "",
            reason,
        )
