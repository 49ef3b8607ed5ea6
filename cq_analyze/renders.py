"""One workflow run by ComfyUI with two models: are the pictures alike, and which is faster?

Owns the runs: every prompt, size, batch size and seed with the reference and with the quantized
model, and what they took, side by side. What a picture differs by is told by `cq_analyze.images`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cq.core import select
from cq.core.errors import InputError
from cq.core.text import printable
from cq_analyze.comfyui import Server
from cq_analyze.images import Pictures, check_installed, compare_images
from cq_analyze.workflow import Case, Place, Workflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One run of a case: seconds, pictures and the peak of the device's memory in bytes."""

    case: str
    seconds: float
    pictures: int
    nbytes_peak: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "case": self.case,
            "seconds": self.seconds,
            "pictures": self.pictures,
            "nbytes_peak": self.nbytes_peak,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All runs of one model; the first includes loading it."""

    model: str
    timings: tuple[Timing, ...]

    @property
    def seconds_per_picture(self) -> float:
        """The median over runs but the first, which loads the model; of a single run its own."""
        later = self.timings[1:] or self.timings
        return statistics.median(t.seconds / t.pictures for t in later)

    @property
    def nbytes_peak(self) -> int | None:
        """The peak over all runs."""
        return max((t.nbytes_peak for t in self.timings if t.nbytes_peak is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "model": self.model,
            "seconds_per_picture": self.seconds_per_picture,
            "seconds_first_run": self.timings[0].seconds,
            "nbytes_peak": self.nbytes_peak,
            "runs": [timing.to_dict() for timing in self.timings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Renders:
    """Both sides, on one device."""

    url: str
    device: str
    reference: Side
    quantized: Side

    @property
    def speedup(self) -> float | None:
        """Seconds per picture of the reference over those of the quantized model."""
        seconds = self.quantized.seconds_per_picture
        return self.reference.seconds_per_picture / seconds if seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "url": self.url,
            "device": self.device,
            "speedup": self.speedup,
            "reference": self.reference.to_dict(),
            "quantized": self.quantized.to_dict(),
        }


def cases(
    prompts: Sequence[str] = (),
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> dict[str, Case]:
    """Every combination by its name; what is empty stays as the workflow has it.

    >>> list(cases(["a cat"], sizes=[(512, 768)], seeds=[1, 2]))
    ['prompt1-512x768-seed1', 'prompt1-512x768-seed2']
    """
    found = {}
    numbered: list[tuple[int, str | None]] = [*enumerate(prompts, 1)] or [(0, None)]
    shapes: list[tuple[int, int] | None] = [*sizes] or [None]
    counts: list[int | None] = [*batches] or [None]
    starts: list[int | None] = [*seeds] or [None]
    for (i, prompt), size, batch, seed in itertools.product(numbered, shapes, counts, starts):
        words = [
            "" if prompt is None else f"prompt{i}",
            "" if size is None else f"{size[0]}x{size[1]}",
            "" if batch is None else f"batch{batch}",
            "" if seed is None else f"seed{seed}",
        ]
        case = Case(prompt=prompt, size=size, batch=batch, seed=seed)
        found["-".join(filter(None, words)) or "as-it-is"] = case
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderings:
    """Runs that can be made: the server is there, has both models, and the workflow has a place for
    all that changes."""

    server: Server
    workflow: Workflow
    place: Place
    device: str
    reference: str
    quantized: str
    runs: Mapping[str, Case]

    def compare(self, tell: Callable[[str], None] = lambda _: None) -> tuple[Renders, Pictures]:
        """Run every case with the reference, then with the quantized model, and compare the
        pictures. `tell` is told of each run.

        Raises: PlanError if the workflow fails; ResourceError if the server does.
        """
        sides = []
        with tempfile.TemporaryDirectory(prefix="cq-pictures-") as directory:
            folders = [Path(directory, word) for word in ("reference", "quantized")]
            for name, folder in zip((self.reference, self.quantized), folders, strict=True):
                folder.mkdir()
                sides.append(self._side(name, folder, tell))
            found = compare_images(*folders)
        findings = [replace(f, sentence=_without(f.sentence, directory)) for f in found.findings]
        pictures = replace(
            found,
            reference=printable(self.reference),
            compared=printable(self.quantized),
            findings=tuple(findings),
        )
        renders = Renders(
            url=self.server.shown, device=self.device, reference=sides[0], quantized=sides[1]
        )
        return renders, pictures

    def _side(self, name: str, folder: Path, tell: Callable[[str], None]) -> Side:
        self.server.free()
        timings = []
        for number, (case_name, case) in enumerate(self.runs.items(), 1):
            run = self.server.run(self.workflow.made(self.place, name, case))
            for index, picture in enumerate(run.pictures, 1):
                Path(folder, f"{case_name}-{index}.png").write_bytes(picture)
            timings.append(
                Timing(
                    case=case_name,
                    seconds=run.seconds,
                    pictures=len(run.pictures),
                    nbytes_peak=run.nbytes_peak,
                )
            )
            tell(
                f"`{printable(name)}` {number} of {len(self.runs)} ({case_name}):"
                f" {len(run.pictures)} in {run.seconds:.2f} s"
            )
        return Side(model=printable(name), timings=tuple(timings))


def prepare(
    url: str,
    workflow: Workflow,
    *,
    reference: str,
    quantized: str,
    runs: Mapping[str, Case],
    timeout: float = 600.0,
) -> Renderings:
    """See, before anything is run, that all of it can be. The models have their names as the server
    has them.

    Units: `timeout` of one run in seconds.

    Raises: as `Server`; InputError if the server has no such model or the workflow no place for
    what a case changes.
    """
    check_installed()
    place = workflow.model((reference, quantized))
    for case in runs.values():
        workflow.made(place, reference, case)
    server = Server(url, timeout=timeout)
    device = server.device()
    for name in (reference, quantized):
        _check_model(server, workflow, place, name)
    return Renderings(
        server=server,
        workflow=workflow,
        place=place,
        device=device,
        reference=reference,
        quantized=quantized,
        runs=runs,
    )


def _without(sentence: str, directory: str) -> str:
    """A sentence that names no temporary directory."""
    return sentence.replace(f"`{printable(directory)}/", "the series `")


def _check_model(server: Server, workflow: Workflow, place: Place, name: str) -> None:
    node = workflow.nodes[place.node]["class_type"]
    known = server.models(node, place.name)
    if known is not None and name not in known:
        raise InputError(
            f"ComfyUI has no model `{printable(name)}` for its node `{printable(node)}`",
            where=printable(name),
            hint=select.nearest(name, known)
            or "`--reference-name` and `--model-name` are names as its own list has them",
            code="input.model_name",
        )
