"""`cq merge`: options to `merge`, and what each adapter does as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from cq.cli import options
from cq.core.errors import UsageError

_COLUMNS = ("adapter", "kind", "rank>", "alpha>", "strength>", "layers>", "unmatched>")
_NAMED = 5  # layers in a warning


Scale = Annotated[float, typer.Option("--scale", metavar="X", help="Multiplies every strength.")]
Dampen = Annotated[
    bool | None,
    typer.Option(
        "--dampen/--no-dampen",
        help="The n-th adapter at 0.9^(n-1); on for several adapters.",
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="How several adapters become one: sum, ties, dare, orthogonal.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option("--density", metavar="X", help="The share that ties and dare keep."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of what dare drops at random.")]
Origin = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Whole models add their difference from this one, not from BASE; with"
        " --extract, the base of the LoRA.",
    ),
]
Extract = Annotated[
    str | None,
    typer.Option(
        "--extract",
        metavar="TUNED",
        help="Make a LoRA of the difference between TUNED and the base that --from names.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="N", help="Of the extracted LoRA; 32.")]
Alpha = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        metavar="tensors|X",
        help="For layers without an alpha tensor: scale 1, or X / rank; left out, what the"
        " file's metadata says.",
    ),
]
AsComfyui = Annotated[
    bool,
    typer.Option("--as-comfyui", help="As ComfyUI does, also where it drops or errs."),
]
Map = Annotated[
    str | None,
    typer.Option("--map", metavar="FILE", help="JSON: what unusual keys mean, key to layer."),
]
AllowUnmatched = Annotated[
    bool,
    typer.Option("--allow-unmatched", help="Leave out adapter keys that fit no layer."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="bf16|fp16|fp32", help="Of the tensors that change; their own."
    ),
]
KeepFormat = Annotated[
    bool,
    typer.Option(
        "--keep-format", help="Store the changed layers of a quantized BASE as they were."
    ),
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Measure how much each adapter changes; reads weights."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "merge")
    def merge(
        base: Annotated[
            str | None,
            typer.Argument(metavar="BASE|-", help="A checkpoint, a manifest, or `-`."),
        ] = None,
        adapters: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="ADAPTER[:STRENGTH]…",
                help="LoRA files and the like, or whole models; the order is that of --dampen.",
            ),
        ] = None,
        scale: Scale = 1.0,
        dampen: Dampen = None,
        method: MethodName = "sum",
        density: Density = None,
        seed: Seed = 0,
        origin: Origin = None,
        extract: Extract = None,
        rank: Rank = None,
        alpha: Alpha = None,
        as_comfyui: AsComfyui = False,
        names: Map = None,
        allow_unmatched: AllowUnmatched = False,
        dtype: Dtype = None,
        keep_format: KeepFormat = False,
        explain: Explain = False,
        output: options.Output = None,
        force: options.Force = False,
        restart: options.Restart = False,
        max_shard_size: options.MaxShardSize = None,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
        engine: options.Engine = "local",
    ) -> int:
        """Merge LoRA adapters into a checkpoint, in float32, layer by layer.

        Without -o it passes the result on as a manifest: nothing is computed until a later step
        asks. At a terminal it shows the plan.

        \b
          cq merge flux.safetensors style.safetensors:0.8 -o merged.safetensors
          cq merge flux.safetensors style.safetensors hero.safetensors:0.6 | cq quant
          cq merge flux.safetensors other-flux.safetensors:0.3 -o mixed.safetensors
          cq merge --extract tuned.safetensors --from flux.safetensors -o lora.safetensors
        """
        from cq.cli.deliver import Delivery, deliver
        from cq_merge import merge as merge_adapters

        asked = Delivery(
            output=output,
            force=force,
            restart=restart,
            max_shard_size=options.parse_size(max_shard_size),
            dry_run=dry_run,
            workers=workers,
            memory_limit=options.parse_size(memory_limit),
            engine=engine,
        )
        if extract is not None:
            _refuse_beside_extract(
                {
                    "--scale": scale != 1.0,
                    "--dampen": dampen is not None,
                    "--method": method != "sum",
                    "--density": density is not None,
                    "--alpha": alpha is not None,
                    "--as-comfyui": as_comfyui,
                    "--map": names is not None,
                    "--allow-unmatched": allow_unmatched,
                    "--keep-format": keep_format,
                    "--explain": explain,
                }
            )
            return _extract(
                _Extraction(extract, origin, 32 if rank is None else rank, dtype or "fp16", seed),
                [word for word in (base, *(adapters or ())) if word is not None],
                asked,
            )
        if rank is not None:
            raise UsageError("`--rank` is that of an extracted LoRA", hint="add `--extract TUNED`")
        if not adapters:
            raise UsageError(
                "there is no adapter to merge",
                hint="give BASE and at least one adapter, as in `cq merge BASE ADAPTER:0.8`",
            )
        opened = options.open_input(base, what="BASE", beside=names)
        checkpoint = merge_adapters(
            opened,
            adapters,
            scale=scale,
            dampen=dampen,
            allow_unmatched=allow_unmatched,
            alpha=_alpha(alpha),
            as_comfyui=as_comfyui,
            method=method,
            density=density,
            seed=seed,
            dtype=dtype,
            names=names,
            origin=origin,
            keep_format=keep_format,
        )
        remarks = [text for note in checkpoint.notes for text in _remarks(note)]
        if explain:
            effects = _explained(checkpoint, opened, asked)
            notes = tuple(
                {**n, "effect": e} for n, e in zip(checkpoint.notes, effects, strict=True)
            )
            checkpoint = replace(checkpoint, notes=notes)
            remarks += [text for note in notes for text in _effect(note)]
        return deliver(
            checkpoint,
            asked,
            command="merge",
            remarks=remarks,
            columns=_COLUMNS,
            rows=_rows(checkpoint.notes),
        )


class _Extraction(NamedTuple):
    """What `--extract` was asked for."""

    tuned: str
    origin: str | None
    rank: int
    dtype: str
    seed: int


def _refuse_beside_extract(given: Mapping[str, bool]) -> None:
    """Raises: UsageError if there is an option for merging."""
    stray = next((option for option, is_given in given.items() if is_given), None)
    if stray is not None:
        raise UsageError(
            f"`--extract` merges nothing, so `{stray}` has no meaning beside it",
            hint=f"leave `{stray}` out",
        )


def _extract(wanted: _Extraction, words: Sequence[str], asked: Any) -> int:
    from cq.cli.deliver import deliver
    from cq_merge import extract

    if wanted.origin is None:
        raise UsageError(
            "`--extract` needs the base of the LoRA",
            hint=f"add it with `--from`, as in `cq merge --extract {wanted.tuned} --from BASE`",
        )
    if words:
        raise UsageError(
            f"`--extract` merges nothing, so `{words[0]}` has no place",
            hint="name two checkpoints: `--extract TUNED --from BASE`",
        )
    tuned = options.open_input(wanted.tuned, what="TUNED")
    lora = extract(tuned, wanted.origin, rank=wanted.rank, dtype=wanted.dtype, seed=wanted.seed)
    return deliver(lora, asked, command="extract")


def _alpha(word: str | None) -> float | Literal["tensors"] | None:
    if word is None or word == "tensors":
        return word  # type: ignore[return-value]
    try:
        return float(word)
    except ValueError:
        raise UsageError(
            f"`{word}` is no alpha", hint="write `tensors`, or a number such as `--alpha 16`"
        ) from None


def _explained(checkpoint: Any, base: Any, asked: Any) -> list[dict[str, Any]]:
    from cq_merge import explain

    with options.terminal().progress("explain") as progress:
        found = explain(
            checkpoint,
            base,
            workers=asked.workers,
            memory_limit=asked.memory_limit,
            on_progress=progress.on_progress,
        )
    return [found.of(number) for number in range(found.adapters)]


def _remarks(note: Any) -> Iterator[str]:
    name = Path(note["path"]).name
    text = f"`{name}` changes {_layers(len(note['layers']))}"
    asked, counts = note["strength"], note["effective_strength"]
    if counts != asked:
        text += (
            f", at {counts:g} instead of {asked:g}: by `--scale`, and since of several adapters"
            " each counts 0.9 of the one before it unless `--no-dampen`"
        )
    if note["unmatched"]:
        text += (
            f"; {len(note['unmatched'])} of its keys fit no layer and are left out,"
            f" such as `{note['unmatched'][0]}`"
        )
    yield text
    for remark in note["remarks"]:
        yield f"`{name}`: {remark}"


def _effect(note: Any) -> Iterator[str]:
    name, effect = Path(note["path"]).name, note["effect"]
    if effect["largest_layer"] is None:
        yield f"`{name}` changes nothing at this strength"
        return
    yield (
        f"`{name}` changes its layers by {_share(effect['relative'])} of their size, most of all"
        f" `{effect['largest_layer']}` by {_share(effect['largest'])}"
    )
    saturated: Sequence[str] = effect["saturated"]
    if saturated:
        shown = ", ".join(f"`{layer}`" for layer in saturated[:_NAMED])
        more = f" and {len(saturated) - _NAMED} more" if len(saturated) > _NAMED else ""
        yield (
            f"warning: `{name}` is larger than the weights of {_layers(len(saturated))}: {shown}"
            f"{more}; lower its strength, or check its alpha"
        )


def _share(value: float | None) -> str:
    return "more than all" if value is None else f"{value:.2%}"


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _rows(notes: Any) -> Iterator[tuple[str, ...]]:
    for note in notes:
        yield (
            Path(note["path"]).name,
            note["kind"],
            ",".join(map(str, note["ranks"])),
            ",".join(f"{a:g}" for a in note["alphas"]) or "none",
            f"{note['effective_strength']:g}",
            str(len(note["layers"])),
            str(len(note["unmatched"])),
        )
