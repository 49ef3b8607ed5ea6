"""Whether a model has what its family's releases have, and nothing else that is quantized.

Owns the comparison of names with the family's roster (`cq.core.roster`). Of a model of no known
release only what nearly all of its blocks have is asked for; of a family that is not known, nothing
but what no model can be without: one whose fellows have biases may well have none.

Source: ComfyUI `comfy/model_detection.py` (`count_blocks`: blocks are counted up to the first that
is not there) and `comfy/ops.py` (what a file lacks stays as it was allocated).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cq.core import families, recipe
from cq.core.components import component_of
from cq.core.dtypes import TensorSpec
from cq.core.families import Match
from cq.core.knowledge import Knowledge
from cq.core.roster import Numbers, Span, filled, place
from cq.core.stored import SCALED_FP8, is_owned, is_scale
from cq.core.text import folded, printable
from cq_analyze import unlisted
from cq_analyze.report import Finding, finding, natural
from cq_analyze.unlisted import nearly_all

# Of so many kinds of tensors that are nowhere, and half as many that no release has, the latter are
# taken for the former under another tool's names.
_RENAMED = 3
# What is missing from a model that lacks even names by which it is told: at most so much of it.
_NEARLY_THERE = 0.05
_Tensors = Mapping[str, Mapping[str, TensorSpec]]
_Specs = Mapping[str, TensorSpec]


class _Blocks(NamedTuple):
    """The blocks of a list: those that are there, those that are gone before the last of them, and
    those so far behind that they are none of the model's."""

    there: frozenset[int]
    gone: tuple[int, ...]
    astray: frozenset[int]

    @property
    def total(self) -> int:
        """How many blocks the model would have if none were gone."""
        return len(self.there) + len(self.gone)


@dataclass(slots=True)
class _Judgement:
    """What is found in one model, and what is worth saying."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(
    specs: _Specs, tensors: _Tensors, marked: Collection[str], known: Knowledge
) -> tuple[list[Finding], list[str]]:
    """What the models in a checkpoint lack, and what they have that their families do not.

    `tensors` are those of `specs` by layer and local name, `marked` the layers that say that they
    are quantized.
    """
    named = frozenset(marked)
    found = _Judgement()
    for match in known.matches:
        _Model(match, specs, tensors, named).judge(found)
    if not any(match.family.kind == "diffusion" for match in known.matches):
        _unrecognized(specs, tensors, named, found)
    told = {one.layer for one in found.findings}
    found.findings += [
        one
        for one in unlisted.headless(tensors)
        if one.layer not in told and known.of(one.layer or "") is None
    ]
    found.notes += unlisted.biasless(
        tensors, [layer for layer in marked if known.of(layer) is None]
    )
    return found.findings, found.notes


class _Model:
    """One model on its way to judgement: the kinds of its tensors, and the release it is."""

    def __init__(
        self, match: Match, specs: _Specs, tensors: _Tensors, marked: frozenset[str]
    ) -> None:
        self.match = match
        self.roster = match.family.roster
        self.specs = specs
        self.marked = marked
        self.kinds = _kinds(match.prefix, tensors)
        self.letter: str | None = None
        self.letter = self._release()

    def judge(self, found: _Judgement) -> None:
        """Add what is found."""
        blocks = self._blocks()
        missing = self._missing(blocks)
        strange = self._strange()
        nowhere = {kind for kind in missing if kind not in self.kinds}
        title = self.match.family.title
        if len(nowhere) >= _RENAMED and 2 * len(strange) >= len(nowhere):
            found.notes.append(
                f"{len(nowhere)} kinds of tensors of {title} are not there, and {len(strange)} are"
                f" that no release has, such as `{printable(self._example(strange[0]))}`: another"
                " tool's names, so that whether the model is whole cannot be told"
            )
            missing = {kind: own for kind, own in missing.items() if kind not in nowhere}
            strange = []
        for group, own in blocks.items():
            found.findings += self._gone_blocks(group, own)
            found.notes += self._other_count(group, own)
        found.findings += self._lacking(missing)
        surplus = list(self._surplus(blocks))
        found.findings += surplus
        found.notes += self._unread(strange, blocks, {one.layer for one in surplus})

    def nearly(self) -> int | None:
        """How much is missing from a model that is one but for a few names; None if it is none."""
        if self.letter is None or self._strange():
            return None
        blocks = self._blocks()
        missing = self._missing(blocks)
        nowhere = sum(kind not in self.kinds for kind in missing)
        lost = sum(map(len, missing.values()))
        if nowhere > max(2, _NEARLY_THERE * len(self._own(self.letter))):
            return None
        if lost > max(2, 2 * _NEARLY_THERE * sum(map(len, self.kinds.values()))):
            return None
        return lost if missing or any(own.gone for own in blocks.values()) else None

    def _own(self, letter: str) -> set[str]:
        return {
            kind
            for kind, spans in self.roster.kinds.items()
            if any(letter in span.releases for span in spans)
        }

    def _release(self) -> str | None:
        """The letter of the release that the model is; of several that it may be, the one that its
        tensors are nearest to."""
        family, roster = self.match.family, self.roster
        named = None if self.match.variant is None else roster.of(self.match.variant)
        present = self.kinds.keys() & roster.kinds.keys()
        if self.match.variant is not None and (named is None or present == self._own(named)):
            return named
        if self.match.variant is None and family.others and self._told():
            return None
        distances = []
        for variant in family.variants:
            letter = roster.of(variant.name)
            if letter is not None and family.may_be(variant, self.specs, self.match.prefix):
                distances.append((self._distance(letter, present), letter != named, letter))
        return min(distances)[2] if distances else named

    def _distance(self, letter: str, present: Iterable[str]) -> int:
        """How many tensors are other than the release's. Nobody adds a few tensors of another
        release, which counts double; some are lost more easily."""
        self.letter = letter
        foreign = 0
        for kind in present:
            spans = [span for span in self.roster.kinds[kind] if letter in span.releases]
            if not any(span.counted for span in spans):
                have = self.kinds[kind]
                foreign += sum(not any(span.covers(own) for span in spans) for own in have)
        return sum(map(len, self._missing(self._blocks()).values())) + 2 * foreign

    def _told(self) -> bool:
        prefix = self.match.prefix
        return any(
            signature.holds(self.specs, prefix) for signature in self.match.family.signatures
        )

    def _blocks(self) -> dict[str, _Blocks]:
        numbers: dict[str, set[int]] = defaultdict(set)
        for kind, places in self.kinds.items():
            group, star, _ = kind.partition("*")
            if star and group in self.roster.lists:
                numbers[group].update(own[0] for own in places)
        counts = self._counts()
        return {group: _split(own, counts.get(group)) for group, own in numbers.items()}

    def _counts(self) -> Mapping[str, int]:
        return {} if self.letter is None else self.roster.releases[self.letter].counts

    def _missing(self, blocks: Mapping[str, _Blocks]) -> dict[str, set[Numbers]]:
        """The numbers of tensors that should be there, by kind."""
        missing: dict[str, set[Numbers]] = {}
        everywhere: dict[str, set[Numbers]] = {
            group: {(i,) for i in own.there} for group, own in blocks.items()
        }
        counts = self._counts()
        for kind, spans in self.roster.kinds.items():
            group, star, _ = kind.partition("*")
            listed = blocks.get(group) if star else None
            have = self.kinds.get(kind, set())
            should: set[Numbers] = set()
            if self.letter is None:
                should = self._usual(kind, spans, listed)
            for span in spans:
                if self.letter is None or self.letter not in span.releases:
                    continue
                if listed is None:
                    should |= span.everywhere
                elif span.counted:
                    should |= everywhere[group]
                elif span.blocks[0] is None or listed.total == counts.get(group, listed.total):
                    should |= span.within(listed.there)
            if not should <= have:
                missing[kind] = should - have
        return self._without_parts(self._truly(missing)) if missing else missing

    def _usual(self, kind: str, spans: Iterable[Span], listed: _Blocks | None) -> set[Numbers]:
        """The numbers of a kind's tensors that even a model of no known release should have: in all
        blocks what nearly all have, and a weight beside a bias."""
        have = self.kinds.get(kind, set())
        should: set[Numbers] = set()
        if listed is not None and all(span.blocks[0] is None for span in spans):
            should = set().union(*(span.within(listed.there) for span in spans))
        if not nearly_all(len(have), len(should)):
            should = set()
        layer = kind.removesuffix(".weight")
        if layer != kind:
            biases = self.kinds.get(f"{layer}.bias", set())
            should |= {own for own in biases if listed is None or own[0] in listed.there}
        return should

    def _truly(self, missing: Mapping[str, set[Numbers]]) -> dict[str, set[Numbers]]:
        """Without what is there under another name, whole or in parts."""
        dialect, prefix = self.match.family.dialect, self.match.prefix

        def elsewhere(name: str) -> bool:
            return any(
                all(prefix + other in self.specs for other, _ in choice)
                for choice in dialect.choices(name)
            )

        left = {
            kind: {numbers for numbers in own if not elsewhere(filled(kind, numbers))}
            for kind, own in missing.items()
        }
        return {kind: own for kind, own in left.items() if own}

    def _without_parts(self, missing: dict[str, set[Numbers]]) -> dict[str, set[Numbers]]:
        """Without parts of which nothing is there."""
        for test in self.match.family.part_tests:
            if not any(test(_layer(kind)) for kind in self.kinds):
                missing = {kind: own for kind, own in missing.items() if not test(_layer(kind))}
        return missing

    def _strange(self) -> list[str]:
        """The kinds that no release has, under no name."""
        dialect = self.match.family.dialect
        return [
            kind
            for kind in self.kinds
            if kind not in self.roster.kinds and not dialect.natives(self._bare(kind))
        ]

    def _bare(self, kind: str) -> str:
        return filled(kind, min(self.kinds[kind]))

    def _example(self, kind: str) -> str:
        return self.match.prefix + self._bare(kind)

    def _gone_blocks(self, group: str, own: _Blocks) -> Iterator[Finding]:
        title = self.match.family.title
        for number in own.gone:
            told = f"is missing from this {title}, with all that is in it"
            yield finding("layers.missing", f"{self.match.prefix}{group}{number}", told)

    def _other_count(self, group: str, own: _Blocks) -> Iterator[str]:
        count = self._counts().get(group, own.total)
        if count != own.total and self.letter is not None:
            lost = "; if it was not pruned, blocks are lost" if own.total < count else ""
            yield (
                f"the model has {own.total} blocks `{self.match.prefix}{group}*`, but"
                f" {self.roster.releases[self.letter].name} has {count}{lost}"
            )

    def _lacking(self, missing: Mapping[str, Iterable[Numbers]]) -> Iterator[Finding]:
        lost: dict[str, set[str]] = defaultdict(set)
        for kind, own in missing.items():
            for numbers in own:
                name = filled(kind, numbers)
                layer = _layer(name)
                lost[layer].add(name[len(layer) + 1 :])
        for layer in sorted(lost, key=natural):
            one = self._lost(layer, lost[layer])
            if one is not None:
                yield one

    def _lost(self, bare: str, locals_: set[str]) -> Finding | None:
        layer, title = self.match.prefix + bare, self.match.family.title
        if locals_ == {"bias"}:
            told = f"has no bias, which it has in every {title} of its kind"
            return finding("bias.missing", layer, told)
        if "weight" in locals_ and layer in self.marked:
            return None  # then it lacks its weight, which is said already
        if "weight" in locals_ and f"{layer}.bias" in self.specs:
            return finding("weight.missing", layer, "has a bias, but no weight")
        told = f"is missing from this {title}"
        if folded(bare) in self.roster.layers:
            return finding("layers.missing", layer, told)
        return finding("tensors.missing", layer, told)

    def _surplus(self, blocks: Mapping[str, _Blocks]) -> Iterator[Finding]:
        """Quantized layers that ComfyUI would not load: none of the family's, or of no block."""
        prefix, title = self.match.prefix, self.match.family.title
        for layer in sorted(self.marked, key=natural):
            if self.match.bare(layer) is None or not _inside(prefix, layer):
                continue
            kind, numbers = place(layer[len(prefix) :])
            astray = blocks.get(kind.partition("*")[0]) if numbers else None
            if astray is not None and numbers[0] in astray.astray:
                told = f"is quantized, but {title} has no such block: those before it are not there"
                yield finding("layers.surplus", layer, told)
                continue
            apart = recipe.has_role(layer, "embedding") or recipe.has_role(layer, "experts")
            # What no release is known of may have more layers than those that are.
            listed = self.match.variant is not None and bool(self.roster.layers)
            if listed and not apart and folded(kind) not in self.roster.layers:
                told = f"is quantized, but {title} has no such layer"
                yield finding("layers.surplus", layer, told)

    def _unread(
        self, strange: Iterable[str], blocks: Mapping[str, _Blocks], told: set[str | None]
    ) -> Iterator[str]:
        """A note on plain tensors that ComfyUI will not read."""
        if self.letter is None:
            return
        prefix = self.match.prefix
        names = [prefix + filled(kind, n) for kind in strange for n in self.kinds[kind]]
        for group, own in blocks.items():
            if own.astray:
                names += [
                    prefix + filled(kind, numbers)
                    for kind, places in self.kinds.items()
                    if kind.startswith(f"{group}*") and kind in self.roster.kinds
                    for numbers in places
                    if numbers[0] in own.astray
                ]
        names = [name for name in names if name.rpartition(".")[0] not in told]
        if names:
            first = printable(min(names, key=natural))
            count = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
            yield (
                f"{count} none that a release of {self.match.family.title} has, such as `{first}`:"
                " ComfyUI reads no tensor that its model does not have"
            )


def _kinds(prefix: str, tensors: _Tensors) -> dict[str, set[Numbers]]:
    """The numbers of a model's tensors by kind, without those that are there because a layer is
    quantized."""
    found: dict[str, set[Numbers]] = defaultdict(set)
    start = len(prefix)
    for layer, own in tensors.items():
        if not _inside(prefix, layer):
            continue
        name = layer[start:]
        kind, numbers = place(name)
        for local in own:
            if local in {"weight", "bias"}:
                found[f"{kind}.{local}" if name else local].add(numbers)
            elif _stands_for_weight(local):
                found[f"{kind}.weight"].add(numbers)
            elif not is_owned(local) and local != SCALED_FP8 and "qweight" not in own:
                other, places = place(f"{name}.{local}" if name else local)
                found[other].add(places)
    return found


def _inside(prefix: str, layer: str) -> bool:
    """Whether a layer is one of the model under `prefix`, and not of another beside it."""
    whole = f"{layer}."
    if not whole.startswith(prefix):
        return False
    return component_of(prefix).kind is not None or component_of(whole).kind is None


def _stands_for_weight(local: str) -> bool:
    """Whether a tensor holds a layer's weight in another way: as codes, or as magnitude and
    direction."""
    return local == "qweight" or (local.startswith("weight_") and not is_scale(local))


def _layer(name: str) -> str:
    """The layer that a weight or bias, or the kind of one, belongs to; another tensor itself."""
    layer, _, local = name.rpartition(".")
    return layer if local in {"weight", "bias"} else name


def _split(numbers: Collection[int], count: int | None) -> _Blocks:
    """The blocks of a list with these numbers, of which the release has `count`, if it is known."""
    there = sorted(numbers)
    if count is None:
        # More blocks gone than there are: the last are no blocks of the model.
        while there[-1] + 1 > 2 * len(there):
            there.pop()
            if not there:
                break
        end = there[-1] + 1 if there else 0
    else:
        end = max((number for number in there if number < count), default=-1) + 1
        while end in numbers:
            end += 1
    kept = frozenset(number for number in numbers if number < end)
    gone = tuple(number for number in range(end) if number not in kept)
    return _Blocks(kept, gone, frozenset(numbers) - kept)


def _unrecognized(
    specs: _Specs, tensors: _Tensors, marked: frozenset[str], found: _Judgement
) -> None:
    """A model that would be told if it did not lack a few of the very names by which it is."""
    nearest: tuple[int, _Model] | None = None
    for name in families.names():
        family = families.load(name)
        for prefix in families.PREFIXES:
            if not _hinted(family, specs, prefix):
                continue
            model = _Model(Match(family, None, prefix), specs, tensors, marked)
            nearly = model.nearly()
            if nearly is not None and (nearest is None or nearly < nearest[0]):
                nearest = nearly, model
    if nearest is not None:
        nearest[1].judge(found)


def _hinted(family: families.Family, specs: _Specs, prefix: str) -> bool:
    """Whether at least half of a signature's tensors are there, and nothing speaks against it."""
    for signature in family.signatures:
        absent = signature.absent(specs, prefix)
        if absent is not None and 2 * len(absent) <= len(signature.has):
            return True
    return False
