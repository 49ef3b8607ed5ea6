"""From the name that an adapter file gives a layer to rows of tensors of a checkpoint.

Owns the spellings of whole models: prefixes, dots written as underscores, and the numbers of text
encoders. Every name is looked up in a table made from the checkpoint's own names and from what its
families' files list (`cq.core.dialects`); nothing is guessed. Never imports torch.

Source: ComfyUI `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`). More is accepted
here than ComfyUI maps, as exact names cannot match the wrong layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import orjson

from cq.core import recipe, select
from cq.core.components import Component, component_of, components
from cq.core.dialects import Dialect, Target
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.families import Match
from cq.core.knowledge import AUTO, NONE, know
from cq.core.native import recognize
from cq.core.text import printable

__all__ = ["Names", "Place", "Target", "parse_map"]

Place = tuple[Target, ...]
Parameter = Literal["weight", "bias"]
_PARAMETERS: tuple[Parameter, ...] = ("weight", "bias")
_ENDS: Mapping[str, tuple[str, ...]] = {"weight": (".weight", ".scale", ""), "bias": (".bias",)}
_DIFFUSION, _TEXT = "diffusion model", "text encoder"


class _Spelling(NamedTuple):
    """A prefix of adapter keys: what it says of the component (`of`, None if nothing), which text
    encoder it counts, and whether dots are underscores behind it."""

    prefix: str
    of: str | None
    number: str | None = None
    underscored: bool = False


# A prefix stands before those that begin with less of it.
_SPELLINGS = (
    _Spelling("lora_unet__", _DIFFUSION, underscored=True),  # Wan Fun
    _Spelling("lora_unet_", _DIFFUSION, underscored=True),
    _Spelling("oft_unet_", _DIFFUSION, underscored=True),  # sd-scripts' OFT
    _Spelling("lora_prior_unet_", _DIFFUSION, underscored=True),
    _Spelling("lora_transformer_", _DIFFUSION, underscored=True),
    _Spelling("lycoris_", _DIFFUSION, underscored=True),
    _Spelling("lora_prior_te_", _TEXT, "prior", underscored=True),
    _Spelling("lora_te1_", _TEXT, "1", underscored=True),
    _Spelling("lora_te2_", _TEXT, "2", underscored=True),
    _Spelling("lora_te3_", _TEXT, "3", underscored=True),
    _Spelling("lora_te_", _TEXT, "", underscored=True),
    _Spelling("model.diffusion_model.", _DIFFUSION),
    _Spelling("diffusion_model.", _DIFFUSION),
    _Spelling("transformer.", _DIFFUSION),
    _Spelling("unet.", _DIFFUSION),
    _Spelling("text_encoders.clip_l.transformer.", _TEXT, "clip_l"),
    _Spelling("text_encoders.clip_h.transformer.", _TEXT, "clip_h"),
    _Spelling("text_encoders.clip_g.transformer.", _TEXT, "clip_g"),
    _Spelling("text_encoders.", _TEXT),
    _Spelling("text_encoder_2.", _TEXT, "2"),
    _Spelling("text_encoder_3.", _TEXT, "3"),
    _Spelling("text_encoder.", _TEXT, "1"),
    _Spelling("base_model.model.", None),
)
_CLIPS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
_CLIP_NORMS = ("text_model.final_layer_norm.weight", "ln_final.weight")
# ComfyUI's own names of other text encoders: `qwen3_4b.transformer.model.layers…`
_WRAPPED = re.compile(r"(?:\w+\.)?transformer\.(?P<rest>.+)")
# OpenCLIP stores its projection transposed, so that its rows are not those of an adapter.
_TRANSPOSED = "text_projection"
_ROWS = re.compile(r"(?P<name>.+?)(?:\[(?P<start>[0-9]+):(?P<stop>[0-9]+)\])?")


@dataclass(frozen=True, slots=True)
class _Model:
    """One component: its names, all of them dotted, and the places that they name."""

    kind: str
    role: str | None
    bare: dict[str, None] = field(default_factory=dict)
    places: dict[str, dict[Place, None]] = field(default_factory=dict)
    underscored: dict[str, dict[Place, None]] = field(default_factory=dict)

    def add(self, name: str, place: Place) -> None:
        if place:
            self.places.setdefault(name, {})[place] = None
            self.underscored.setdefault(name.replace(".", "_"), {})[place] = None


class Names:
    """A checkpoint's tensors, found by any name that an adapter may have for them.

    >>> names = Names({"model.diffusion_model.blocks.0.q.weight": TensorSpec("BF16", (64, 32))})
    >>> names.find("lora_unet_blocks_0_q")
    ((Target(tensor='model.diffusion_model.blocks.0.q.weight', start=0, count=64, first=0),),)
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        *,
        family: str = AUTO,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """`specs` are the checkpoint's, of quantized layers the decoded ones. `family` is `auto`,
        `none`, or a family's name, `extra` what `parse_map` gave.

        Raises: PlanError for an unknown family, and if `extra` names what the checkpoint does not
        hold.
        """
        self._specs = specs
        self._models = []
        for component, match in _known(specs, family):
            model = _Model(component.kind, _role(specs, match))
            _fill(model, specs, component, match)
            self._models.append(model)
        self._roles = {model.role for model in self._models}
        self._extra: dict[str, dict[Parameter, tuple[Place, ...]]] = {}
        self._extra = {key: self._told(key, value) for key, value in (extra or {}).items()}

    def find(self, key: str, parameter: Parameter = "weight") -> tuple[Place, ...]:
        """The places that `key` names: one (of one target, or of several where rows are cut up or
        swapped), none, or several between which nothing decides.

        `weight` is the layer's `.weight`, else `.scale`, else the tensor of that very name; `bias`
        is `.bias`, in the same rows.
        """
        if key in self._extra:
            return self._extra[key].get(parameter, ())
        for spelled, rest in _spellings(key):
            for name in _variants(rest, spelled):
                for end in _ENDS[parameter]:
                    found = self._look_up(spelled, name, end)
                    if found:
                        return found
        return ()

    def near(self, key: str) -> str | None:
        """A hint with the names nearest to `key`, spelled as the adapter does; None if none is."""
        *_, (spelled, rest) = _spellings(key)
        prefix = key.removesuffix(rest)
        names = {
            re.sub(r"\.(weight|bias|scale)$", "", name): None
            for model in self._models
            if self._speaks_of(spelled, model)
            for name in model.bare
        }
        spell = str if spelled is None or not spelled.underscored else _underscored
        return select.nearest(key, [prefix + spell(name) for name in names])

    def holds(self, kind: str) -> bool:
        """Whether a component of that kind is known here. What is of no known kind may be a
        diffusion model."""
        kinds = {model.kind for model in self._models}
        return kind in kinds or (kind == _DIFFUSION and "other" in kinds)

    def component_of(self, key: str) -> str | None:
        """The kind of component that `key` is for, whether the checkpoint holds one or not
        (`diffusion model` or `text encoder`); None if the key does not tell."""
        told = [spelled.of for spelled, _ in _spellings(key) if spelled and spelled.of]
        *_, (_, rest) = _spellings(key)
        if not told and rest.startswith(("text_model.", "encoder.block.", "clip_")):
            return _TEXT
        return told[-1] if told else component_of(key + ".").kind

    def _look_up(self, spelled: _Spelling | None, name: str, end: str) -> tuple[Place, ...]:
        found: dict[Place, None] = {}
        for model in self._models:
            if not self._speaks_of(spelled, model):
                continue
            if spelled is not None and spelled.underscored:
                found |= model.underscored.get(name + end.replace(".", "_"), {})
            else:
                found |= model.places.get(name + end, {})
        return tuple(found)

    def _speaks_of(self, spelled: _Spelling | None, model: _Model) -> bool:
        if spelled is None or spelled.of is None:
            return True
        if spelled.of == _DIFFUSION:
            return model.kind in {_DIFFUSION, "other"}
        return model.kind == _TEXT and self._is_number(spelled.number, model.role)

    def _is_number(self, number: str | None, role: str | None) -> bool:
        """Whether a text encoder of that role is counted by that number."""
        if number is None or role is None:
            return True  # the layers' names alone tell T5 and language models from CLIP
        if role in {"clip_l", "clip_h"}:
            return number in {"", "1", role}
        if number.startswith("clip_"):
            return number == role
        # SDXL's refiner and Stable Cascade have CLIP-G alone
        return number == "2" or (number in {"", "1", "prior"} and "clip_l" not in self._roles)

    def _told(self, key: str, value: str) -> dict[Parameter, tuple[Place, ...]]:
        """The places of an entry of a map, by parameter."""
        match = _ROWS.fullmatch(value)
        if match is None:
            raise _no_such(key, value, self.near(value))
        places = {end: self.find(match["name"], end) for end in _PARAMETERS}
        if not places["weight"] and match["name"] in self._specs:
            places["weight"] = (_whole(match["name"], self._specs[match["name"]]),)
        if not places["weight"]:
            raise _no_such(key, match["name"], self.near(match["name"]))
        if match["start"] is None:
            return places
        rows = int(match["start"]), int(match["stop"])
        cut = {}
        for end, found in places.items():
            if len(found) > 1:
                raise PlanError(
                    f"the map's `{printable(match['name'])}` for `{printable(key)}` is several"
                    " layers",
                    hint="give the layer's full name",
                    code="plan.map",
                )
            have = sum(target.count for place in found for target in place)
            if found and not rows[0] < rows[1] <= have:
                raise PlanError(
                    f"the map gives `{printable(key)}` rows {rows[0]}:{rows[1]} of"
                    f" `{printable(match['name'])}`, which has {have}",
                    code="plan.map",
                )
            cut[end] = tuple(_cut(place, *rows) for place in found)
        return cut


def parse_map(text: str | bytes, shown: str) -> dict[str, str]:
    """A user's map: a JSON object from adapter keys, without the parameter's suffix, to names of
    layers or tensors, perhaps with rows (`img_attn.qkv[0:3072]`). `shown` names the file.

    Raises: InputError if it is none.
    """
    try:
        found: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"`{shown}` is not JSON: {printable(str(error))}", where=shown, code="input.map"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, str) and v for v in found.values()):
        raise InputError(
            f"`{shown}` is not a map of names",
            where=shown,
            hint='it is a JSON object such as `{"blocks_0_q": "blocks.0.qkv[0:1024]"}`',
            code="input.map",
        )
    return found


def _no_such(key: str, name: str, near: str | None) -> PlanError:
    return PlanError(
        f"the map gives `{printable(key)}` the name `{printable(name)}`, which is no layer of the"
        " checkpoint",
        hint=near,
        code="plan.map",
    )


def _spellings(key: str) -> list[tuple[_Spelling | None, str]]:
    """The readings of a key, from the whole of it on; prefixes can be nested, and the innermost
    that names a component counts."""
    found: list[tuple[_Spelling | None, str]] = [(None, key)]
    spelled, rest = None, key
    while True:
        inner = next((s for s in _SPELLINGS if rest.startswith(s.prefix)), None)
        if inner is None or (spelled is not None and spelled.underscored):
            return found
        rest = rest.removeprefix(inner.prefix)
        # What `text_encoder.` said is still so behind `base_model.model.`
        spelled = spelled if inner.of is None and spelled is not None else inner
        found.append((spelled, rest))


def _variants(name: str, spelled: _Spelling | None) -> Iterator[str]:
    """Ways to write a name that mean the same: attention processors, and an output projection
    without its index."""
    yield name
    if spelled is not None and spelled.underscored:
        plain, out, first = name.replace("_processor_to_", "_to_"), "_to_out", "_0"
    else:
        plain, out, first = name.replace(".processor.to_", ".to_"), ".to_out", ".0"
        if spelled is not None and spelled.of == _TEXT:
            wrapped = _WRAPPED.fullmatch(name)
            if wrapped is not None:
                yield wrapped["rest"]
    if plain != name:
        yield plain
    if plain.endswith(out):
        yield plain + first


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def _known(
    specs: Mapping[str, TensorSpec], family: str
) -> Iterator[tuple[Component, Match | None]]:
    """The components of a checkpoint, each with the family that lists its names, if that is
    known."""
    told = know(specs, family).matches if family not in {AUTO, NONE} else ()
    for component in components(specs):
        match = next((m for m in told if m.prefix.startswith(component.prefix)), None)
        if family == AUTO:
            match = component.detection.match
            if not component.detection.matches and component.kind in {_DIFFUSION, "other"}:
                # It may have other names than its own, or sizes that no known model has.
                match = recognize(specs) or recognize(specs, by_names=True)
                if match is not None and not match.prefix.startswith(component.prefix):
                    match = None
        yield component, match


def _role(specs: Mapping[str, TensorSpec], match: Match | None) -> str | None:
    if match is None or match.family.name != "clip":
        return None
    norm = next(specs[match.prefix + n] for n in _CLIP_NORMS if match.prefix + n in specs)
    return _CLIPS.get(norm.shape[0])


def _whole(name: str, spec: TensorSpec) -> Place:
    return (Target(name, 0, spec.shape[0] if spec.shape else 1, 0),)


def _cut(place: Place, start: int, stop: int) -> Place:
    """Rows `start` to `stop` of a place, as a place."""
    found = []
    for target in place:
        low, high = max(start, target.first), min(stop, target.first + target.count)
        if low < high:
            at = target.start + low - target.first
            found.append(Target(target.tensor, at, high - low, low - start))
    return tuple(found)


def _fill(
    model: _Model, specs: Mapping[str, TensorSpec], component: Component, match: Match | None
) -> None:
    """Add all names of a component's tensors."""
    dialect = match.family.dialect if match is not None else Dialect(())
    prefix = match.prefix if match is not None else None
    for name, spec in specs.items():
        if component_of(name).prefix != component.prefix:
            continue
        place = _whole(name, spec)
        inner = name.removeprefix(component.prefix)
        bare = name.removeprefix(prefix) if prefix is not None else recipe.without_prefix(inner)
        if match is not None and match.family.name == "clip" and bare == _TRANSPOSED:
            continue
        spellings = {name: None, inner: None, bare: None}
        if match is not None and match.family.name == "llm":
            spellings[bare.removeprefix("model.")] = None
        for spelled in spellings:
            model.add(spelled, place)
        model.bare[bare] = None
        if prefix is None or not name.startswith(prefix):
            continue
        for native in (bare, *dialect.natives(bare)):
            layout = dialect.layout(native, specs, prefix)
            if layout is None:
                continue
            if native != bare:
                model.add(native, layout.rows)
            for other, how, _ in dialect.others(native):
                spans = how.spans(layout.size)
                if spans is not None:
                    model.add(other, layout.places(spans))
                    model.bare.setdefault(other)
