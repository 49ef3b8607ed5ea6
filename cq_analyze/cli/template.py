"""`cq template`: options to `template`, and the recipe as text."""

from __future__ import annotations

from typing import Annotated

import typer

from cq.cli import options
from cq_analyze.cli import deep
from cq_analyze.cli import plan_options as plan


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "template", json=False)
    def template(
        model: plan.Model = None,
        format: plan.Format = None,
        scaling: plan.Scaling = None,
        optimizer: plan.Optimizer = None,
        rotate: plan.Rotate = None,
        family: plan.Family = "auto",
        recipe: plan.Recipe = None,
        only: plan.Only = None,
        skip: plan.Skip = None,
        requantize: plan.Requantize = False,
        allow_custom_loader: plan.AllowCustomLoader = False,
        budget: deep.Budget = None,
        min_sqnr: deep.MinSqnr = None,
        among: deep.Among = None,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
        output: Annotated[
            str | None,
            typer.Option("--output", "-o", metavar="FILE", help="Write FILE instead of stdout."),
        ] = None,
        force: options.Force = False,
    ) -> int:
        """Print the recipe of what `cq quant` would do, a rule for each layer, to be edited.

        `cq quant --recipe` with the file unchanged and the same options writes the same bytes as
        without it. With --budget or --min-sqnr the weights are read, and each layer gets the format
        that serves the limit best.

        \b
          cq template flux.safetensors > layers.json
          cq quant flux.safetensors --recipe layers.json
          cq template flux.safetensors --budget 8GiB > layers.json
        """
        from cq_analyze import recipes, saving

        here = options.terminal()
        limits = budget is not None or min_sqnr is not None
        if limits:
            deep.refuse_with(
                "`--budget` or `--min-sqnr`",
                {
                    "--format": format,
                    "--scaling": scaling,
                    "--optimizer": optimizer,
                    "--rotate": rotate,
                },
            )
            deep.refuse_requantizing("`--budget` or `--min-sqnr`", requantize=requantize)
        else:
            deep.refuse_without(
                "`--budget` or `--min-sqnr`",
                {"--among": among, "--workers": workers, "--memory-limit": memory_limit},
            )
        checkpoint = options.open_input(model)
        if output is not None and output != "-":
            saving.check(output, inputs=checkpoint.inputs, force=force)
        if limits:
            mixture = deep.chosen(
                checkpoint,
                budget,
                min_sqnr,
                among=among,
                family=family,
                recipe=recipe,
                only=only,
                skip=skip,
                allow_custom_loader=allow_custom_loader,
                workers=workers,
                memory_limit=memory_limit,
            )
            found = mixture.to_dict()
        else:
            found = recipes.template(
                checkpoint,
                format=format,
                scaling=scaling,
                optimizer=optimizer,
                rotate=rotate,
                family=family,
                recipe=recipe or (),
                only=only or (),
                skip=skip or (),
                requantize=requantize,
                allow_custom_loader=allow_custom_loader,
            )
        if output is None or output == "-":
            here.data(recipes.text(found))
        else:
            text = recipes.written(found)
            saving.save(text, output, inputs=checkpoint.inputs, force=force)
            here.say(f"template: wrote `{output}`, {len(found['rules'])} rules")
        return 0
