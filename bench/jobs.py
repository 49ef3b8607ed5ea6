"""The commands that the bench times, and how `--only` chooses among them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

FORMATS = "formats"  # the set of jobs that compare storage formats, yardsticks included


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command to time, as one would type it: `|` and `&&` mean what they mean in a shell.

    `reference` is what its output is measured against: the `model`, the model `merged`, or nothing.
    `rival` is the job of the peer that does the same. `sets` are the names, beside its own, by
    which it can be chosen.
    """

    name: str
    text: str
    reference: str = ""
    peer: bool = False
    rival: str = ""
    sets: tuple[str, ...] = ()

    def steps(
        self, places: Mapping[str, str], programs: Mapping[str, str]
    ) -> list[list[list[str]]]:
        """The pipelines to run in sequence, each a list of argument lists."""
        steps = []
        for step in self.text.split(" && "):
            commands = [shlex.split(command) for command in step.split(" | ")]
            steps.append(
                [
                    [programs.get(words[0], words[0]), *(w.format(**places) for w in words[1:])]
                    for words in commands
                ]
            )
        return steps


YARDSTICK = "quant rtn"  # plain int8 rows: the least work that a format can be
_RTN = "--optimizer rtn -o {out} --force -q"
_QUIP = "--optimizer quip -o {out} --force -q"
_PEER_COMMON = (
    "--simple --low-memory --comfy_quant --save-quant-metadata"
    ' --exclude-layers "(img_in|final_layer)"'
)
_PEER = f"ctq -i {{model}} -o {{out}} --int8 --scaling_mode row {_PEER_COMMON}"
# In the order of the table. int8_tensorwise is the yardstick itself.
_FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "mxfp8",
    "nvfp4",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "awq_w4a16",
    "int8_blockwise",
)
_SEARCHED = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16")
_CUSTOM = ("int8_blockwise",)
_PEER_MODES = {
    "float8_e4m3fn": "--scaling_mode tensor",
    "mxfp8": "--mxfp8",
    "nvfp4": "--nvfp4",
}


def _quant(name: str, *options: str) -> str:
    custom = ("--allow-custom-loader",) if name in _CUSTOM else ()
    return " ".join(("cq quant {model} --format", name, *options, *custom, _RTN))


def _format_job(name: str, text: str, *, peer: bool = False, rival: str = "") -> Job:
    return Job(name=name, text=text, reference="model", peer=peer, rival=rival, sets=(FORMATS,))


def _format_jobs() -> tuple[Job, ...]:
    jobs = []
    for name in _FORMATS:
        rival = f"peer {name}" if name in _PEER_MODES else ""
        jobs.append(_format_job(f"quant {name}", _quant(name), rival=rival))
        if name in _SEARCHED:
            plain = _quant(name, "--no-scale-search")
            jobs.append(_format_job(f"quant {name} plain", plain, rival=rival))
    for name, mode in _PEER_MODES.items():
        text = f"ctq -i {{model}} -o {{out}} {mode} {_PEER_COMMON}"
        jobs.append(_format_job(f"peer {name}", text, peer=True))
    return tuple(jobs)


JOBS = (
    Job(name="cp", text="cp {model} {out}", rival="peer", sets=(FORMATS,)),
    Job(name="cp, then sync", text="cp {model} {out} && sync {out}"),
    Job(
        name=YARDSTICK,
        text=f"cq quant {{model}} {_RTN}",
        reference="model",
        rival="peer",
        sets=(FORMATS,),
    ),
    Job(name="quant quip", text=f"cq quant {{model}} {_QUIP}", reference="model", rival="peer"),
    Job(
        name="quant rtn tensor",
        text=f"cq quant {{model}} --scaling tensor {_RTN}",
        reference="model",
        rival="peer",
    ),
    Job(
        name="merge | quant rtn",
        text=f"cq merge {{model}} {{lora}} -q | cq quant {_RTN}",
        reference="merged",
        rival="peer",
    ),
    Job(
        name="merge | quant quip",
        text=f"cq merge {{model}} {{lora}} -q | cq quant {_QUIP}",
        reference="merged",
        rival="peer",
    ),
    Job(
        name="merge, then quant rtn",
        text=f"cq merge {{model}} {{lora}} -o {{staged}} -q && cq quant {{staged}} {_RTN}",
        reference="merged",
        rival="peer",
    ),
    Job(
        name="merge, then quant quip",
        text=f"cq merge {{model}} {{lora}} -o {{staged}} -q && cq quant {{staged}} {_QUIP}",
        reference="merged",
        rival="peer",
    ),
    Job(name="merge", text="cq merge {model} {lora} -o {out} --force -q"),
    Job(name="peer", text=_PEER, reference="model", peer=True, rival="peer"),
    Job(
        name="peer convrot",
        text=f"{_PEER} --convrot",
        reference="model",
        peer=True,
        rival="peer",
    ),
    *_format_jobs(),
)
STARTUP = (
    Job(name="python -c pass", text="python -c pass"),
    Job(name="cq --help", text="cq --help"),
    Job(name="cq verify --help", text="cq verify --help"),
    Job(name="cq quant MODEL --dry-run", text="cq quant {model} --dry-run -q"),
    Job(name="peer --help", text="ctq --help", peer=True),
)


def chosen(jobs: Sequence[Job], patterns: Sequence[str]) -> tuple[Job, ...]:
    """The jobs whose name, or the name of a set of theirs, matches one of the globs; all of them
    without a glob.

    >>> [job.name for job in chosen(JOBS, ["quant nvfp4*"])]
    ['quant nvfp4', 'quant nvfp4 plain']
    """
    return tuple(
        job
        for job in jobs
        if not patterns
        or any(fnmatchcase(name, p) for name in (job.name, *job.sets) for p in patterns)
    )
