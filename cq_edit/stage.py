"""The edit stage: which changes, in which order, and that no layer is worse off for them.

Owns the order: forms (`--prefer`, `--migrate` by what `--set-quant` says of lost markers), tensors
(keep, remove, add), markers, dtypes, names, the component, metadata, the header form. Patterns
therefore speak of the names in the source. Each change is a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import orjson

from cq.core import select
from cq.core.checkpoint import Checkpoint, Stage
from cq.core.errors import InputError, UsageError
from cq.core.text import printable
from cq_edit import adding, casting, choosing, extracting, headers, migrating, renaming, settings
from cq_edit.draft import Draft
from cq_edit.soundness import refuse_worse

_CHOICES = {"prefer": headers.SIDES, "migrate": migrating.FORMS}


@dataclass(frozen=True, slots=True, kw_only=True)
class EditStage:
    """Changes to a checkpoint. See `edit` for the fields."""

    name: ClassVar[str] = "edit"

    prefer: str | None = None
    migrate: str | None = None
    keep_keys: tuple[str, ...] = ()
    remove_keys: tuple[str, ...] = ()
    add_keys: tuple[adding.Addition, ...] = ()
    replace: bool = False
    rename: tuple[renaming.Renaming, ...] = ()
    set_quant: tuple[settings.Patch, ...] = ()
    quant_filter: tuple[str, ...] = ()
    cast: tuple[casting.Casting, ...] = ()
    extract_component: str | None = None
    set_meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    remove_meta: tuple[str, ...] = ()
    save_quant_metadata: bool = False
    drop_quant_metadata: bool = False
    allow_broken: bool = False

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value is not None and value not in choices:
                raise UsageError(
                    f"`--{key}` cannot be `{printable(str(value))}`",
                    hint="choose from " + ", ".join(choices),
                    code="usage.choice",
                )
        if self.save_quant_metadata and self.drop_quant_metadata:
            raise UsageError("`--save-quant-metadata` and `--drop-quant-metadata` exclude another")
        for needed, told, given in (
            ("set_quant", "--quant-filter", self.quant_filter),
            ("add_keys", "--replace", self.replace),
        ):
            if given and not getattr(self, needed):
                raise UsageError(f"`{told}` means nothing without `--{needed.replace('_', '-')}`")
        for key, value in self.set_meta.items():
            headers.see_settable(key, value)
        try:
            orjson.dumps([v for k, v in self.arguments().items() if k != "add_keys"])
        except TypeError as error:
            raise UsageError("an argument is not UTF-8 text", code="usage.text") from error

    def arguments(self) -> dict[str, Any]:
        """The fields that ask for something, as plain JSON; paths are absolute."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {
            "add_keys": [addition.to_dict() for addition in self.add_keys],
            "rename": [rule.text for rule in self.rename],
            "set_quant": [[patch.pattern, dict(patch.settings)] for patch in self.set_quant],
            "cast": [f"{rule.pattern}={rule.format}" for rule in self.cast],
            "set_meta": [f"{key}={value}" for key, value in self.set_meta.items()],
        }
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
        return {key: value for key, value in plain.items() if value}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest.

        Raises: InputError for an unknown or ill-typed argument or a file that cannot be read,
        PlanError if one has changed since the manifest was made.
        """
        select.refuse_unknown(arguments, [f.name for f in fields(cls)], "the edit stage")
        try:
            return cls(**{key: _typed(key, value) for key, value in arguments.items()})
        except UsageError as error:
            raise InputError(error.message, hint=error.hint, code="input.manifest") from error

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The edited checkpoint. Raises: PlanError if a change cannot be, InputError for what
        cannot be read."""
        draft = Draft.of(source, without_header=self.drop_quant_metadata)
        headers.settle(draft, self.prefer)
        if self.drop_quant_metadata:
            headers.require_header(draft)
        if self.migrate is not None:
            settings.declare(draft, self.set_quant, self.quant_filter)
            migrating.migrate(draft)
        if self.keep_keys:
            choosing.keep(draft, self.keep_keys)
        if self.remove_keys:
            choosing.remove(draft, self.remove_keys, allow_broken=self.allow_broken)
        for addition in self.add_keys:
            adding.add(draft, addition, replace=self.replace, allow_broken=self.allow_broken)
        if self.set_quant:
            settings.set_quant(
                draft, self.set_quant, self.quant_filter, allow_broken=self.allow_broken
            )
        for rule in self.cast:
            casting.cast(draft, rule)
        for renamed in self.rename:
            renaming.rename(draft, renamed, allow_broken=self.allow_broken)
        if self.extract_component is not None:
            extracting.extract(draft, self.extract_component)
        headers.set_meta(draft, self.set_meta, self.remove_meta)
        if self.save_quant_metadata:
            headers.save(draft)
        elif self.drop_quant_metadata:
            headers.drop(draft, "`--drop-quant-metadata`")
        return self._finished(source, draft)

    def _finished(self, source: Checkpoint, draft: Draft) -> Checkpoint:
        made = draft.checkpoint()
        result = source.after(
            self,
            parts=made.parts,
            metadata=made.metadata,
            inputs=made.inputs,
            notes=tuple(change.to_dict() for change in draft.changes),
        )
        if not self.allow_broken:
            refuse_worse(source, result, draft.moved)
        return result


def edit(
    checkpoint: Checkpoint,
    *,
    prefer: str | None = None,
    migrate: str | None = None,
    keep_keys: Sequence[str] = (),
    remove_keys: Sequence[str] = (),
    add_keys: Sequence[str] = (),
    replace: bool = False,
    rename: Sequence[str] | Mapping[str, str] = (),
    set_quant: Sequence[tuple[str, Mapping[str, Any] | str]] | Mapping[str, Any] = (),
    quant_filter: Sequence[str] = (),
    cast: Sequence[str] | Mapping[str, str] = (),
    extract_component: str | None = None,
    set_meta: Sequence[str] | Mapping[str, str] = (),
    remove_meta: Sequence[str] = (),
    save_quant_metadata: bool = False,
    drop_quant_metadata: bool = False,
    allow_broken: bool = False,
) -> Checkpoint:
    """A checkpoint with changes; what they do not touch is handed on unread.

    Patterns are globs, or regular expressions after `re:`, over full names of tensors and over
    layers. The changes are made in this order: where the header form and the markers of a
    checkpoint disagree, `prefer` (`header` or `markers`) says which is right. `migrate`
    (`comfy_quant`) writes layers of every older form as ComfyUI stores them today. `keep_keys` and
    `remove_keys` choose tensors; a quantized weight takes its scales and its marker along.
    `add_keys` are files, `FILE` or `FILE:PATTERN`, whose tensors are added, in the place of others
    of their names with `replace`. `set_quant` are pairs of a pattern over quantized layers and
    settings for their markers, None to remove one; one with a `format` may name layers that have
    lost their marker, also for `migrate` to go by. `quant_filter` leaves of them those of a format
    or a pattern. `cast` are rules `PATTERN=bf16`, `fp16` or `fp32` for tensors that are not
    quantized. `rename` are rules `OLD=NEW` or `re:OLD=NEW`. `extract_component` keeps one model of
    several, without its prefix. `set_meta` and `remove_meta` change the file's metadata,
    `save_quant_metadata` and `drop_quant_metadata` the markers' form in it. No edit may leave a
    quantized layer broken that was not, except with `allow_broken`.

    Raises: UsageError for a change that is worded wrongly, PlanError for one that cannot be made,
    InputError for what cannot be read.
    """
    stage = EditStage(
        prefer=prefer,
        migrate=migrate,
        keep_keys=_texts(keep_keys),
        remove_keys=_texts(remove_keys),
        add_keys=tuple(map(adding.Addition.parse, _texts(add_keys))),
        replace=replace,
        rename=tuple(map(renaming.Renaming.parse, _rules(rename))),
        set_quant=tuple(
            settings.Patch.parse(pattern, value)
            for pattern, value in (
                set_quant.items() if isinstance(set_quant, Mapping) else set_quant
            )
        ),
        quant_filter=_texts(quant_filter),
        cast=tuple(map(casting.Casting.parse, _rules(cast))),
        extract_component=extract_component,
        set_meta=dict(set_meta)
        if isinstance(set_meta, Mapping)
        else dict(map(headers.parse_meta, _texts(set_meta))),
        remove_meta=_texts(remove_meta),
        save_quant_metadata=save_quant_metadata,
        drop_quant_metadata=drop_quant_metadata,
        allow_broken=allow_broken,
    )
    if not stage.arguments().keys() - {"allow_broken"}:
        raise UsageError(
            "there is nothing to edit",
            hint="say what to change; `cq edit --help` lists the changes",
            code="usage.nothing",
        )
    return stage.apply(checkpoint)


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    """Words; a single one need not stand in a list."""
    return (value,) if isinstance(value, str) else tuple(value)


def _rules(value: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(f"{old}={new}" for old, new in value.items())
    return _texts(value)


def _typed(key: str, value: Any) -> Any:
    """An argument of a manifest as the field has it."""
    default = next(f.default for f in fields(EditStage) if f.name == key)
    if key == "set_meta":
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return dict(map(headers.parse_meta, value))
    elif isinstance(default, tuple) and isinstance(value, list):
        if key == "add_keys":
            return tuple(map(adding.Addition.from_manifest, value))
        if key == "set_quant":
            return tuple(map(settings.typed_settings, value))
        if all(isinstance(v, str) for v in value):
            parse: Any = {"rename": renaming.Renaming.parse, "cast": casting.Casting.parse}.get(key)
            return tuple(map(parse, value)) if parse else tuple(value)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif default is None and isinstance(value, str):
        return value
    raise InputError(
        f"the edit stage's argument `{key}` cannot be `{printable(repr(value))}`",
        code="input.manifest",
    )
