"""The options of `cq verify` that compare pictures and deliver reports, and what they mean."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cq.cli import options
from cq.core.errors import InputError, UsageError
from cq.core.text import printable

if TYPE_CHECKING:
    from cq_analyze.images import Pictures
    from cq_analyze.renders import Renders
    from cq_analyze.report import Report

_LARGEST_PROMPTS = 1 << 20

Base = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="What REF was merged from: how much survives?"),
]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on", metavar="NAME", help="Only these findings fail (globs); default all of them."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Judge layers' outputs by the inputs recorded in it."
    ),
]
MaxOutputError = Annotated[
    float | None,
    typer.Option(
        "--max-output-error", metavar="R", help="Exit 1 if a layer's output error is higher."
    ),
]
Junit = Annotated[
    str | None, typer.Option("--junit", metavar="FILE", help="Write the result as JUnit XML.")
]
ReportFile = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE", help="Write the result as an HTML page."),
]
Images = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--images", metavar="DIR_REF DIR", help="Compare pictures of the same names: PSNR, SSIM."
    ),
]
Sheet = Annotated[
    str | None,
    typer.Option("--contact-sheet", metavar="FILE", help="Write the pictures side by side (PNG)."),
]
MinPsnr = Annotated[
    float | None,
    typer.Option("--min-psnr", metavar="DB", help="Exit 1 if a picture's PSNR is lower."),
]
Comfyui = Annotated[
    str | None,
    typer.Option("--comfyui", metavar="URL", help="Run --workflow there with REF and with QUANT."),
]
WorkflowFile = Annotated[
    str | None,
    typer.Option("--workflow", metavar="FILE", help="A ComfyUI workflow in API format."),
]
Prompts = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line.")
]
Sizes = Annotated[
    str | None, typer.Option("--sizes", metavar="WxH,…", help="Sizes, such as 1024x1024,512x768.")
]
Batches = Annotated[
    str | None, typer.Option("--batch-sizes", metavar="N,…", help="Batch sizes, such as 1,4.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="N,…", help="Seeds, such as 1,2,3.")]
ReferenceName = Annotated[
    str | None,
    typer.Option(
        "--reference-name", metavar="NAME", help="REF's name in ComfyUI; default its file name."
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model-name", metavar="NAME", help="QUANT's name in ComfyUI; default its file name."
    ),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=1, help="The longest that one run may take."),
]


def check_usage(
    *,
    images: tuple[str, str] | None,
    comfyui: str | None,
    workflow: str | None,
    contact_sheet: str | None,
    min_psnr: float | None,
    **variations: str | None,
) -> None:
    """Options that mean nothing without others. Raises: UsageError."""
    if images is not None and comfyui is not None:
        raise UsageError(
            "`--images` and `--comfyui` both bring the pictures", hint="use one of them"
        )
    if min_psnr is not None and not (math.isfinite(min_psnr) and min_psnr >= 0):
        raise UsageError(f"`--min-psnr` cannot be {min_psnr}")
    if images is None and comfyui is None:
        for name, value in (("--contact-sheet", contact_sheet), ("--min-psnr", min_psnr)):
            if value is not None:
                raise UsageError(f"`{name}` needs pictures", hint="add `--images DIR_REF DIR`")
    if comfyui is None:
        for name, given in (("workflow", workflow), *variations.items()):
            if given is not None:
                raise UsageError(f"`--{name.replace('_', '-')}` needs `--comfyui URL`")
    elif workflow is None:
        raise UsageError(
            "`--comfyui` needs a workflow",
            hint="add `--workflow FILE`, exported by ComfyUI's `Workflow > Export (API)`",
        )


def check_files(paths: Sequence[str | None], *, force: bool) -> None:
    """See, before any work, that reports can be written.

    Raises: UsageError if two are one file; else as `cq_analyze.saving.check`.
    """
    from cq_analyze import saving

    named = [path for path in paths if path is not None]
    if len({os.path.realpath(path) for path in named}) < len(named):
        raise UsageError("two reports would be written to one file", hint="name another")
    opened = options.terminal().opened
    for path in named:
        saving.check(path, force=force)
        if os.path.exists(path) and any(os.path.samestat(os.stat(path), s) for s in opened):  # noqa: PTH116
            raise UsageError(f"`{printable(path)}` is an input", hint="name another file")


def sizes(text: str | None) -> list[tuple[int, int]]:
    """The sizes in `1024x1024,512x768`. Raises: UsageError for anything else."""
    found = []
    for word in _words(text):
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", word)
        if match is None:
            raise UsageError(f"`{printable(word)}` is not a size", hint="write one as `1024x768`")
        found.append((int(match[1]), int(match[2])))
    return found


def numbers(text: str | None, option: str, *, least: int) -> list[int]:
    """The numbers in `1,2,3`. Raises: UsageError for anything else."""
    found = []
    for word in _words(text):
        if not re.fullmatch(r"\d{1,19}", word) or int(word) < least:
            raise UsageError(f"`{option}` takes numbers from {least}, not `{printable(word)}`")
        found.append(int(word))
    return found


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",")]


def prompts(path: str | None) -> list[str]:
    """The lines of a file that are not empty. Raises: InputError if it has none."""
    if path is None:
        return []
    shown = printable(path)
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file.read(_LARGEST_PROMPTS).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"the prompts `{shown}` cannot be read: {told.lower()}") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"there is no prompt in `{shown}`", hint="write one a line")
    return found


def names(
    quantized: str | None, against: str | None, model: str | None, reference: str | None
) -> tuple[str, str]:
    """The two models' names in ComfyUI: reference, quantized. Raises: UsageError if one is
    missing, or they are the same."""
    found = []
    for given, path, option in (
        (reference, against, "--reference-name"),
        (model, quantized, "--model-name"),
    ):
        if given is None and path in {None, "-"}:
            raise UsageError(f"`--comfyui` needs `{option}`", hint="or the file of that name")
        found.append(given or os.path.basename(path or ""))  # noqa: PTH119
    if found[0] == found[1]:
        raise UsageError(
            f"both models are called `{printable(found[0])}`",
            hint="`--reference-name` and `--model-name` tell them apart",
        )
    return found[0], found[1]


def write_reports(
    report: Report,
    *,
    html: str | None,
    junit: str | None,
    contact_sheet: str | None,
    force: bool,
) -> None:
    """Write the files that were asked for, and say so."""
    from cq_analyze import saving

    if html is not None:
        from cq_analyze.verify_page import verify_page

        saving.save(verify_page(report), html, force=force)
    if junit is not None:
        from cq_analyze.junit import junit as as_junit

        saving.save(as_junit(report), junit, force=force)
    if contact_sheet is not None and report.pictures is not None:
        from cq_analyze.images import contact_sheet as sheet

        saving.save(sheet(report.pictures), contact_sheet, force=force)
    for path in (html, junit, contact_sheet):
        if path is not None:
            options.terminal().say(f"verify: wrote `{path}`")


def pictures_plan(
    images: tuple[str, str] | None,
    comfyui: str | None,
    workflow: str | None,
    *,
    models: tuple[str, str] | None,
    prompt_file: str | None,
    size_list: str | None,
    batch_list: str | None,
    seed_list: str | None,
    timeout: float,
) -> Callable[[], tuple[Pictures | None, Renders | None]]:
    """What compares the pictures that were asked for, with what it took to make them; everything
    that can be told before is told now."""
    if images is not None:
        from cq_analyze.images import check_installed, compare_images

        check_installed()
        pair = images
        return lambda: (compare_images(*pair), None)
    if comfyui is None or workflow is None or models is None:
        return lambda: (None, None)
    from cq_analyze.renders import cases, prepare
    from cq_analyze.workflow import load_workflow

    runs = cases(
        prompts(prompt_file),
        sizes(size_list),
        numbers(batch_list, "--batch-sizes", least=1),
        numbers(seed_list, "--seeds", least=0),
    )
    prepared = prepare(
        comfyui,
        load_workflow(workflow),
        reference=models[0],
        quantized=models[1],
        runs=runs,
        timeout=timeout,
    )
    here = options.terminal()

    def run() -> tuple[Pictures | None, Renders | None]:
        renders, pictures = prepared.compare(lambda line: here.say(f"verify: {line}"))
        return pictures, renders

    return run
