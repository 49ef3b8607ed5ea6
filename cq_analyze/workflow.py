"""A ComfyUI workflow in API format, and what `cq verify --comfyui` changes in it.

Owns where the model, the prompt, seeds, sizes and the batch size stand: by the placeholders
`%model%` and `%prompt%`, else by the names of inputs and by the links between nodes.

Source: ComfyUI's nodes (`nodes.py`: `UNETLoader.unet_name`, `CheckpointLoaderSimple.ckpt_name`,
`KSampler.seed`, `EmptyLatentImage`; `comfy_extras/nodes_custom_sampler.py`:
`RandomNoise.noise_seed`, `BasicGuider.conditioning`, `CFGGuider.positive`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cq.core.errors import InputError
from cq.core.text import printable

MODEL, PROMPT = "%model%", "%prompt%"
_LOADER_INPUTS = ("unet_name", "ckpt_name")
_SEEDS = ("seed", "noise_seed")
_TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt")
_CONDITIONS = ("positive", "conditioning")
_PLACES = {
    "model": f"no node has a `unet_name` or `ckpt_name`; write `{MODEL}` where the model's name"
    " stands",
    "prompt": f"no text leads to a sampler's `positive`; write `{PROMPT}` where the prompt stands",
    "seed": "no node has a number as its `seed` or `noise_seed`",
    "size": "no `Empty…` node has a `width` and a `height`",
    "batch": "no `Empty…` node has a `batch_size`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: None leaves what the workflow has."""

    prompt: str | None = None
    size: tuple[int, int] | None = None
    batch: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """An input of a node."""

    node: str
    name: str


class Workflow:
    """The nodes by id, each `{"class_type": …, "inputs": {…}}`."""

    def __init__(self, nodes: Mapping[str, Any], *, shown: str) -> None:
        self.nodes = nodes
        self.shown = shown

    def model(self, names: tuple[str, ...]) -> Place:
        """Where the model's name stands. Of several loaders it is the one that has one of `names`.

        Raises: InputError if there is none, or one cannot be told from others.
        """
        marked = list(self._holding(MODEL))
        if len(marked) == 1:
            return marked[0]
        found = [place for place in self._inputs(_LOADER_INPUTS) if self._is(place, str)]
        named = [place for place in found if self._value(place) in names]
        for one in (named, found):
            if len(one) == 1:
                return one[0]
        if not found:
            raise self._lacks("model")
        told = ", ".join(f"`{place.node}`" for place in found)
        raise InputError(
            f"the workflow `{self.shown}` loads several models, in the nodes {told}",
            where=self.shown,
            hint=f"write `{MODEL}` as the name of the one to compare",
            code="input.workflow",
        )

    def made(self, model: Place, name: str, case: Case) -> dict[str, Any]:
        """The workflow with the model `name` and the changes of `case`.

        Raises: InputError if there is no place for one of them.
        """
        nodes: dict[str, Any] = copy.deepcopy(dict(self.nodes))
        changes: list[tuple[Place, Any]] = [(model, name)]
        if case.prompt is not None:
            changes += [(place, case.prompt) for place in self._places("prompt")]
        if case.seed is not None:
            changes += [(place, case.seed) for place in self._places("seed")]
        if case.batch is not None:
            changes += [(place, case.batch) for place in self._places("batch")]
        if case.size is not None:
            for place in self._places("size"):
                changes.append((place, case.size[0 if place.name == "width" else 1]))
        for place, value in changes:
            nodes[place.node]["inputs"][place.name] = value
        return nodes

    def _places(self, what: str) -> list[Place]:
        found = list(
            {
                "prompt": self._prompts,
                "seed": lambda: (p for p in self._inputs(_SEEDS) if self._is(p, int)),
                "batch": lambda: self._empty("batch_size"),
                "size": self._sizes,
            }[what]()
        )
        if not found:
            raise self._lacks(what)
        return found

    def _prompts(self) -> Iterator[Place]:
        marked = list(self._holding(PROMPT))
        if marked:
            yield from marked
            return
        seen: set[str] = set()
        waiting = [
            self._value(place)[0]
            for place in self._inputs(_CONDITIONS)
            if self._is(place, list) and self._is_end(place)
        ]
        while waiting:
            node = str(waiting.pop())
            if node in seen or node not in self.nodes:
                continue
            seen.add(node)
            texts = [Place(node, name) for name in _TEXTS if self._is(Place(node, name), str)]
            yield from texts
            if not texts:
                links = self.nodes[node]["inputs"].values()
                waiting += [link[0] for link in links if isinstance(link, list) and link]

    def _is_end(self, place: Place) -> bool:
        """Whether the node samples or guides, so that its condition is the prompt."""
        inputs = self.nodes[place.node]["inputs"]
        return place.name == "positive" or "model" in inputs

    def _sizes(self) -> Iterator[Place]:
        """The empty latent's size, and whatever must be told the same size, such as a schedule."""
        pairs = {
            (self._value(place), self._value(Place(place.node, "height")))
            for place in self._empty("width")
            if self._is(Place(place.node, "height"), int)
        }
        for place in self._inputs(("width",)):
            other = Place(place.node, "height")
            known = self._is(place, int) and self._is(other, int)
            if known and (self._value(place), self._value(other)) in pairs:
                yield from (place, other)

    def _empty(self, name: str) -> Iterator[Place]:
        for place in self._inputs((name,)):
            kind = self.nodes[place.node].get("class_type", "")
            if str(kind).startswith("Empty") and self._is(place, int):
                yield place

    def _inputs(self, names: tuple[str, ...]) -> Iterator[Place]:
        for node, content in self.nodes.items():
            yield from (Place(node, name) for name in names if name in content["inputs"])

    def _holding(self, placeholder: str) -> Iterator[Place]:
        for node, content in self.nodes.items():
            for name, value in content["inputs"].items():
                if value == placeholder:
                    yield Place(node, name)

    def _value(self, place: Place) -> Any:
        return self.nodes[place.node]["inputs"].get(place.name)

    def _is(self, place: Place, kind: type) -> bool:
        value = self._value(place)
        return type(value) is kind and value != []

    def _lacks(self, what: str) -> InputError:
        return InputError(
            f"the workflow `{self.shown}` has no place for the {what}",
            where=self.shown,
            hint=_PLACES[what],
            code="input.workflow",
        )


def load_workflow(path: str | os.PathLike[str]) -> Workflow:
    """The workflow in a file. Raises: InputError if it cannot be read or is not in API format."""
    shown = printable(os.fspath(path))

    def bad(what: str, hint: str | None = None) -> InputError:
        told = f"the workflow `{shown}` {what}"
        return InputError(told, where=shown, hint=hint, code="input.workflow")

    try:
        nodes = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise bad(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except orjson.JSONDecodeError as error:
        raise bad(f"is not JSON: {printable(str(error))}") from error
    export = "export it in ComfyUI by `Workflow > Export (API)`"
    if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
        raise bad("is in the form of ComfyUI's editor, not in API format", export)
    if (
        not isinstance(nodes, dict)
        or not nodes
        or not all(
            isinstance(node, dict)
            and isinstance(node.get("inputs"), dict)
            and isinstance(node.get("class_type"), str)
            for node in nodes.values()
        )
    ):
        raise bad("is not a workflow in API format", export)
    return Workflow(nodes, shown=shown)
