"""`cq edit`: options to `edit`, and its changes as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cq.cli import options
from cq.cli.output import size
from cq.core.errors import PlanError, UsageError

if TYPE_CHECKING:
    from cq.cli.deliver import Delivery
    from cq.core.checkpoint import Checkpoint

_COLUMNS = ("count>", "change", "what", "before", "after", "bytes>", "reason")
_WORDS = {
    "remove": "removed",
    "add": "added",
    "replace": "replaced",
    "rename": "renamed",
    "cast": "cast",
    "reshape": "reshaped",
    "marker": "markers written",
    "header": "header entries changed",
    "metadata": "metadata entries changed",
}
_SHORT = 60
_Strings = list[str] | None


class _Command(TyperCommand):
    """`--set-quant` takes two values, which Typer has no type for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.name == "set_quant":
                parameter.nargs = 2

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises: UsageError for a `--set-quant` whose second value is something else, which would
        go unseen: the words that follow it would be taken for what they are not."""
        completes = bool(ctx.resilient_parsing)
        for i, word in enumerate(
            [] if completes else args[: args.index("--") if "--" in args else None]
        ):
            flag, equals, _ = word.partition("=")
            if flag != "--set-quant" or (i and args[i - 1] == "--set-quant" and not equals):
                continue
            values = args[i + 1 :][: 1 if equals else 2]
            if len(values) < (1 if equals else 2) or not values[-1].lstrip().startswith(("{", "[")):
                raise UsageError(
                    "`--set-quant` needs 2 values, a pattern and a JSON object",
                    hint="""such as `--set-quant '*' '{"full_precision_matrix_mult": true}'`""",
                )
        return super().parse_args(ctx, args)


def _many(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=f"{text}; repeatable.")


_Replace = Annotated[
    bool, typer.Option("--replace", help="Added tensors replace those of their names.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "edit", cls=_Command)
    def edit(
        model: Annotated[
            str | None,
            typer.Argument(
                metavar="[MODEL|-]", help="A checkpoint or manifest; left out, it is piped in."
            ),
        ] = None,
        remove_keys: Annotated[
            _Strings,
            _many("--remove-keys", "PATTERN", "Remove tensors; with a weight go its scales"),
        ] = None,
        keep_keys: Annotated[
            _Strings, _many("--keep-keys", "PATTERN", "Remove all other tensors")
        ] = None,
        add_keys: Annotated[
            _Strings, _many("--add-keys", "FILE[:PATTERN]", "Add tensors of another file")
        ] = None,
        replace: _Replace = False,
        rename: Annotated[
            _Strings,
            _many("--rename", "[re:]OLD=NEW", "Rename layers, tensors or a prefix"),
        ] = None,
        set_quant: Annotated[
            _Strings,
            _many("--set-quant", "PATTERN JSON", "Patch markers, lost ones too; null removes"),
        ] = None,
        quant_filter: Annotated[
            _Strings,
            _many("--quant-filter", "FORMAT|PATTERN", "Patch only markers of these layers"),
        ] = None,
        cast: Annotated[
            _Strings, _many("--cast", "PATTERN=DTYPE", "Cast plain tensors to bf16, fp16 or fp32")
        ] = None,
        migrate: Annotated[
            str | None,
            typer.Option(
                "--migrate", metavar="comfy_quant", help="Write older forms as ComfyUI has them."
            ),
        ] = None,
        prefer: Annotated[
            str | None,
            typer.Option(
                "--prefer", metavar="markers|header", help="Which is right where they disagree."
            ),
        ] = None,
        save_quant_metadata: Annotated[
            bool,
            typer.Option("--save-quant-metadata", help="Write all markers to the header as well."),
        ] = False,
        drop_quant_metadata: Annotated[
            bool,
            typer.Option("--drop-quant-metadata", help="Keep markers as tensors alone."),
        ] = False,
        set_meta: Annotated[
            _Strings, _many("--set-meta", "KEY=VALUE", "Set an entry of the file's metadata")
        ] = None,
        remove_meta: Annotated[
            _Strings, _many("--remove-meta", "KEY", "Remove entries of it, by name or pattern")
        ] = None,
        extract_component: Annotated[
            str | None,
            typer.Option(
                "--extract-component",
                metavar="NAME",
                help="Keep one model of several, without its prefix.",
            ),
        ] = None,
        split_components: Annotated[
            bool,
            typer.Option("--split-components", help="Write each model to a file in directory -o."),
        ] = False,
        max_shard_size: options.MaxShardSize = None,
        unshard: Annotated[
            bool, typer.Option("--unshard", help="Make one file of several.")
        ] = False,
        in_place: Annotated[
            bool, typer.Option("--in-place", help="Replace MODEL when the new file is complete.")
        ] = False,
        allow_broken: Annotated[
            bool,
            typer.Option("--allow-broken", help="Allow what `cq verify` will call broken."),
        ] = False,
        output: options.Output = None,
        force: options.Force = False,
        restart: options.Restart = False,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
        engine: options.Engine = "local",
    ) -> int:
        """Change names, markers, metadata and single tensors of a checkpoint.

        What is not changed is copied unread. Without -o it passes a manifest on; at a terminal it
        shows the changes. PATTERN is a glob over tensors and layers, or a regular expression after
        `re:`; patterns speak of the names in MODEL.

        \b
          cq edit old-fp8.safetensors --migrate comfy_quant -o new.safetensors
          cq edit m.safetensors --set-quant '*' '{"full_precision_matrix_mult": true}' --in-place
          cq edit sdxl.safetensors --split-components -o parts/
        """
        from cq.cli.deliver import Delivery, deliver

        asked = Delivery(
            output=output,
            force=force,
            restart=restart,
            in_place=in_place,
            max_shard_size=options.parse_size(max_shard_size),
            dry_run=dry_run,
            workers=workers,
            memory_limit=options.parse_size(memory_limit),
            engine=engine,
        )
        _check_usage(asked, split=split_components, unshard=unshard)
        source = options.open_input(model)
        changes = {
            "prefer": prefer,
            "migrate": migrate,
            "keep_keys": keep_keys or (),
            "remove_keys": remove_keys or (),
            "add_keys": add_keys or (),
            "replace": replace,
            "rename": rename or (),
            "set_quant": set_quant or (),
            "quant_filter": quant_filter or (),
            "cast": cast or (),
            "extract_component": extract_component,
            "set_meta": set_meta or (),
            "remove_meta": remove_meta or (),
            "save_quant_metadata": save_quant_metadata,
            "drop_quant_metadata": drop_quant_metadata,
            "allow_broken": allow_broken,
        }
        given = {name: value for name, value in changes.items() if value}
        if split_components:
            return _split(source, given, asked)
        if unshard and len(source.inputs) == 1:
            raise PlanError(
                f"`{source.sources[0].shown}` is one file already",
                hint="leave `--unshard` out",
                code="plan.not_sharded",
            )
        checkpoint = _edited(source, given, reshaped=unshard or max_shard_size is not None)
        edited = checkpoint is not source
        return deliver(
            checkpoint,
            _named(asked, source),
            command="edit",
            remarks=[*_remarks(checkpoint), *(_renamed(source, checkpoint) if rename else ())],
            columns=_COLUMNS if edited and checkpoint.notes else (),
            rows=_rows(checkpoint.notes if edited else ()),
        )


def _check_usage(asked: Delivery, *, split: bool, unshard: bool) -> None:
    """Raises: UsageError for outputs that exclude each other."""
    sharded = asked.max_shard_size is not None
    for told, given in (
        ("`--in-place` and `-o`", asked.in_place and asked.output is not None),
        ("`--in-place` and `--split-components`", asked.in_place and split),
        ("`--in-place` and `--max-shard-size`", asked.in_place and sharded),
        ("`--in-place` and `--unshard`", asked.in_place and unshard),
        ("`--split-components` and `--max-shard-size`", split and sharded),
        ("`--unshard` and `--max-shard-size`", unshard and sharded),
    ):
        if given:
            raise UsageError(f"{told} exclude each other", hint="use one of them")
    if split and (asked.output == "-" or (asked.output is None and not asked.dry_run)):
        raise UsageError(
            "`--split-components` writes several files", hint="add `-o DIR`, a directory for them"
        )


def _edited(source: Checkpoint, given: Mapping[str, Any], *, reshaped: bool) -> Checkpoint:
    from cq_edit.stage import edit

    return source if reshaped and not given else edit(source, **given)


def _named(asked: Delivery, source: Checkpoint) -> Delivery:
    """Where the result goes. Raises: UsageError if `--in-place` has no file to replace."""
    from dataclasses import replace

    if not asked.in_place:
        return asked
    sources = source.sources
    if source.stages or len(sources) != 1 or sources[0].spooled or len(sources[0].files) != 1:
        raise UsageError(
            "`--in-place` replaces a single file, and the input is none",
            hint="name the file, or write the result with `-o FILE`",
            code="usage.in_place",
        )
    return replace(asked, output=str(sources[0].files[0].path))


def _split(source: Checkpoint, given: Mapping[str, Any], asked: Delivery) -> int:
    """Write each component to a file of its own."""
    from dataclasses import replace

    from cq.cli.deliver import check, plan_document, written_file
    from cq_edit.extracting import split_components

    here = options.terminal()
    directory = Path(asked.output or ".")
    found = split_components(source, **given)
    stem = source.sources[0].stem
    files = {n: directory / f"{stem}-{n.replace('/', '_')}.safetensors" for n in found}
    if asked.output is not None and not asked.dry_run:
        _make_directory(directory)
    for name, checkpoint in found.items():
        if asked.output is not None and directory.is_dir():
            check(checkpoint, replace(asked, output=str(files[name])))
    documents = [
        {**plan_document(model, "edit"), "component": name} for name, model in found.items()
    ]
    if not asked.dry_run:
        for document, (name, checkpoint) in zip(documents, found.items(), strict=True):
            written = written_file(checkpoint, asked, str(files[name]), "edit")
            document["written"] = written.to_dict()
    if here.json:
        here.document({"cq": 1, "kind": "split", "command": "edit", "components": documents})
    elif asked.dry_run:
        rows = [
            (name, str(len(model.specs)), size(document["nbytes"]), str(files[name]))
            for (name, model), document in zip(found.items(), documents, strict=True)
        ]
        here.table(("component", "tensors>", "size>", "file"), rows)
        here.say("nothing was written")
    return 0


def _make_directory(directory: Path) -> None:
    from cq.core.errors import ResourceError

    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot make the directory `{directory}`: {(error.strerror or str(error)).lower()}",
            where=str(directory),
            code="resource.directory",
        ) from error


def _remarks(checkpoint: Checkpoint) -> Iterator[str]:
    edited = bool(checkpoint.stages) and checkpoint.stages[-1].name == "edit"
    counts = Counter(note["change"] for note in checkpoint.notes) if edited else Counter()
    if counts:
        yield ", ".join(f"{count} {_WORDS[what]}" for what, count in counts.items())
    elif edited:
        yield "there is nothing to change: all is as it is asked to be"


def _renamed(source: Checkpoint, checkpoint: Checkpoint) -> Iterator[str]:
    """A remark if ComfyUI would not take the model for what it was: names may be meant for another
    program, so that is no error."""
    from cq.core.knowledge import know

    before, after = know(source.specs), know(checkpoint.specs)
    now = {match.family.name for match in after.matches}
    gone = [match.family.title for match in before.matches if match.family.name not in now]
    if gone:
        told = f"is {after.described()}" if after.matches else "is of no family that cq knows"
        yield (
            f"by its new names the model {told}, and was {' and '.join(gone)} before: ComfyUI tells"
            " models by names"
        )


def _rows(notes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The changes, equal ones of several blocks together."""
    from cq.core.text import folded, printable

    def short(text: str | None) -> str:
        return "" if text is None else printable(text, _SHORT)

    groups: dict[tuple[str, ...], list[int]] = {}
    for note in notes:
        after = note["after"] if note["to"] is None else folded(note["to"])
        key = (
            note["change"],
            folded(note["name"]),
            short(note["before"]),
            short(after),
            note["reason"],
        )
        groups.setdefault(key, []).append(note["nbytes_after"] - note["nbytes"])
    for (change, name, before, after, reason), deltas in groups.items():
        told = f"{'+' if sum(deltas) > 0 else ''}{size(sum(deltas))}" if sum(deltas) else ""
        yield (str(len(deltas)), change, name, before, after, told, reason)
