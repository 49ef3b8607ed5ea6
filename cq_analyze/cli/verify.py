"""`cq verify`: options to `verify` and to the comparison of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cq.cli import options
from cq.core.errors import UsageError
from cq_analyze.cli import verify_options as asked
from cq_analyze.cli import verify_text

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint
    from cq_analyze.report import Report


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "verify")
    def verify(
        quantized: Annotated[
            str | None,
            typer.Argument(
                metavar="[QUANT|-]", help="A checkpoint or manifest; left out, it is piped in."
            ),
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(
                "--against", metavar="REF", help="The unquantized checkpoint to compare with."
            ),
        ] = None,
        min_sqnr: Annotated[
            float | None,
            typer.Option("--min-sqnr", metavar="DB", help="Exit 1 if a layer's SQNR is lower."),
        ] = None,
        max_error: Annotated[
            float | None,
            typer.Option(
                "--max-error", metavar="R", help="Exit 1 if a layer's relative error is higher."
            ),
        ] = None,
        header_only: Annotated[
            bool,
            typer.Option("--header-only", help="Look at names, shapes and markers only."),
        ] = False,
        calibration: asked.Calibration = None,
        max_output_error: asked.MaxOutputError = None,
        base: asked.Base = None,
        fail_on: asked.FailOn = None,
        images: asked.Images = None,
        contact_sheet: asked.Sheet = None,
        min_psnr: asked.MinPsnr = None,
        comfyui: asked.Comfyui = None,
        workflow: asked.WorkflowFile = None,
        reference_name: asked.ReferenceName = None,
        model_name: asked.ModelName = None,
        prompts: asked.Prompts = None,
        sizes: asked.Sizes = None,
        batch_sizes: asked.Batches = None,
        seeds: asked.Seeds = None,
        timeout: asked.Timeout = 600.0,
        report: asked.ReportFile = None,
        junit: asked.Junit = None,
        force: options.Force = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Check that ComfyUI can load a quantized checkpoint, and measure what quantizing cost.

        With --against it reports each layer's SQNR, relative error and cosine, with --calibration
        the error of its output as well; with --images or --comfyui it compares pictures. Exits 1 if
        there is a finding or a limit is not kept.

        \b
          cq verify flux-int8.safetensors --against flux.safetensors --min-sqnr 28
          cq quant flux.safetensors --defer | cq verify --against flux.safetensors
          cq verify out.safetensors --against merged.safetensors --base flux.safetensors
          cq verify flux-int8.safetensors --against flux.safetensors --calibration calib.safetensors
          cq verify --images before/ after/ --min-psnr 30 --contact-sheet sheet.png
        """
        here = options.terminal()
        asked.check_usage(
            images=images,
            comfyui=comfyui,
            workflow=workflow,
            contact_sheet=contact_sheet,
            min_psnr=min_psnr,
            reference_name=reference_name,
            model_name=model_name,
            prompts=prompts,
            sizes=sizes,
            batch_sizes=batch_sizes,
            seeds=seeds,
        )
        checkpoint, reference, origin = _inputs(
            quantized, against, base, only_pictures=images is not None or comfyui is not None
        )
        asked.check_files([report, junit, contact_sheet], force=force)
        if report is not None:
            from cq_analyze.chart import check_installed

            check_installed()
        models = None
        if comfyui is not None:
            models = asked.names(quantized, against, model_name, reference_name)
        compare_pictures = asked.pictures_plan(
            images,
            comfyui,
            workflow,
            models=models,
            prompt_file=prompts,
            size_list=sizes,
            batch_list=batch_sizes,
            seed_list=seeds,
            timeout=timeout,
        )
        limits = {
            "--min-sqnr": min_sqnr,
            "--max-error": max_error,
            "--max-output-error": max_output_error,
            "--header-only": header_only,
        }
        found = _verified(
            checkpoint,
            limits,
            against=reference,
            base=origin,
            calibration=calibration,
            fail_on=fail_on or None,
            workers=workers,
            memory_limit=options.parse_size(memory_limit),
        )
        pictures, renders = compare_pictures()
        found = found.with_pictures(pictures, renders=renders, min_psnr=min_psnr)
        asked.write_reports(
            found, html=report, junit=junit, contact_sheet=contact_sheet, force=force
        )
        if here.json:
            here.document(found.to_dict())
        else:
            verify_text.show(found)
        return 0 if found.passed else 1


def _inputs(
    quantized: str | None, against: str | None, base: str | None, *, only_pictures: bool
) -> tuple[Checkpoint | None, Checkpoint | None, Checkpoint | None]:
    """The checkpoint, its reference and its base. With pictures to compare there need be none: a
    checkpoint that is piped in is then named `-`."""
    piped = [path for path in (against, base) if path == "-"]
    piped += ["-"] if quantized == "-" or (quantized is None and not only_pictures) else []
    if len(piped) > 1:
        raise UsageError("stdin cannot be both the checkpoint and the reference")
    checkpoint = None
    if quantized is not None or not only_pictures:
        checkpoint = options.open_input(quantized, what="QUANT")
    reference = None if against is None else options.open_input(against, what="REF")
    return checkpoint, reference, None if base is None else options.open_input(base, what="BASE")


def _verified(
    checkpoint: Checkpoint | None,
    limits: Mapping[str, float | bool | None],
    *,
    against: Checkpoint | None,
    base: Checkpoint | None,
    calibration: str | None,
    fail_on: list[str] | None,
    workers: int | None,
    memory_limit: int | None,
) -> Report:
    from cq_analyze.report import Report
    from cq_analyze.verification import check_names
    from cq_analyze.verification import verify as verify_checkpoint

    if checkpoint is None:
        for name, value in {**limits, "--calibration": calibration}.items():
            if value is not None and value is not False:
                raise UsageError(f"`{name}` needs a checkpoint", hint="name it as QUANT")
        check_names(fail_on)
        return Report(fail_on=None if fail_on is None else tuple(fail_on))
    with options.terminal().progress("verify") as progress:
        return verify_checkpoint(
            checkpoint,
            against=against,
            base=base,
            min_sqnr=limits["--min-sqnr"],
            max_error=limits["--max-error"],
            calibration=calibration,
            max_output_error=limits["--max-output-error"],
            fail_on=fail_on,
            header_only=bool(limits["--header-only"]),
            workers=workers,
            memory_limit=memory_limit,
            on_progress=progress.on_progress,
        )
