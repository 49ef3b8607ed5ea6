"""What `cq analyze --deep` and `cq template --budget` share: options, measuring with progress, and
measurements as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cq.cli import options
from cq.cli.output import size
from cq.core.errors import UsageError
from cq.core.text import printable

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint
    from cq_analyze.budget import Mixture
    from cq_analyze.deep import Cost, MeasuredLayer, Measurements
    from cq_analyze.description import Analysis

_UNUSED = 0.01  # so much of a budget left calls for a reason

Deep = Annotated[
    bool, typer.Option("--deep", help="Read the weights: outliers, and what each format costs.")
]
Among = Annotated[
    list[str] | None,
    typer.Option(
        "--among", metavar="FORMAT", help="Measure this format; repeatable, default all that fit."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric", metavar="sqnr|cosine|mse|outliers", help="What --deep shows; default sqnr."
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="name|size|NAME",
        help="Order of layers: a column of the table, the worst first; default name.",
    ),
]
Report = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE", help="Write what --deep finds as an HTML page."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Choose a format for each layer: the least error in a file of SIZE, such as 12GiB.",
    ),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        metavar="DB",
        help="Choose a format for each layer: the smallest file in which each has DB or more.",
    ),
]


def refuse_without(needed: str, given: dict[str, Any]) -> None:
    """Options that mean nothing without `needed`. Raises: UsageError if one was given."""
    for name, value in given.items():
        if value:
            raise UsageError(f"`{name}` needs {needed}")


def refuse_with(chosen: str, given: dict[str, Any]) -> None:
    """Options that mean nothing with `chosen`. Raises: UsageError if one was given."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"`{name}` and {chosen} exclude each other",
                hint="name the formats to choose from with `--among`",
            )


def refuse_requantizing(chosen: str, *, requantize: bool) -> None:
    """Weights are measured as they are stored. Raises: UsageError for `--requantize`."""
    if requantize:
        raise UsageError(
            f"`--requantize` and {chosen} exclude each other",
            hint="undo the quantization first: `cq quant FILE --format bf16 -o PLAIN`",
        )


def measured(
    checkpoint: Checkpoint,
    command: str,
    *,
    among: Sequence[str] | None,
    family: str,
    recipe: str | None,
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    allow_custom_loader: bool,
    workers: int | None,
    memory_limit: str | None,
) -> Measurements:
    """What `cq_analyze.measure` finds, with progress on stderr."""
    from cq.core.recipe_file import load_recipe
    from cq_analyze.deep import measure

    with options.terminal().progress(command) as progress:
        return measure(
            checkpoint,
            formats=among or None,
            family=family,
            rules=() if recipe is None else load_recipe(recipe),
            only=only or (),
            skip=skip or (),
            allow_custom_loader=allow_custom_loader,
            workers=workers,
            memory_limit=options.parse_size(memory_limit),
            on_progress=progress.on_progress,
        )


def chosen(
    checkpoint: Checkpoint, budget: str | None, min_sqnr: float | None, **asked: Any
) -> Mixture:
    """The mixture that `cq_analyze.choose_formats` makes of what `measured` finds."""
    from cq_analyze.budget import check_limits, choose_formats

    nbytes = options.parse_size(budget)  # before weights are read, as it may be no size
    check_limits(nbytes, min_sqnr)
    found = choose_formats(
        measured(checkpoint, "template", **asked), budget=nbytes, min_sqnr=min_sqnr
    )
    tell(found)
    return found


def check_words(
    metric: str,
    sort: str,
    *,
    among: Sequence[str] | None,
    allow_custom_loader: bool,
) -> None:
    """What can be told before weights are read. Raises: UsageError for an unknown metric or order;
    PlanError for an unknown format."""
    from cq_analyze.candidates import candidates
    from cq_analyze.deep import METRICS, check_order

    ways = candidates(formats=among or None, allow_custom_loader=allow_custom_loader)
    check_order(sort, ways)
    if metric not in METRICS:
        raise UsageError(f"there is no metric `{metric}`", hint="choose from " + ", ".join(METRICS))


def write_page(analysis: Analysis, found: Measurements, path: str, *, force: bool) -> None:
    """Write the page and say so."""
    from cq_analyze import page, saving

    saving.save(page.page(analysis, found), path, force=force)
    options.terminal().say(f"analyze: wrote `{path}`")


def show(found: Measurements, metric: str, sort: str) -> None:
    """Measurements as a person reads them: a row for each layer, then one for each candidate."""
    from cq_analyze.deep import OUTLIERS

    here = options.terminal()
    names = list(OUTLIERS) if metric == "outliers" else [way.name for way in found.candidates]
    here.data("")
    here.table(
        (
            "layer",
            "bytes>",
            *(f"{name.replace('_', ' ') if name in OUTLIERS else name}>" for name in names),
        ),
        [_row(layer, found, metric) for layer in found.ordered(sort, metric)],
    )
    if metric != "outliers":
        here.data("")
        for line in _legend(found, metric):
            here.data(line)
    here.data("")
    here.table(
        ("candidate", "layers>", "bytes>", "become>", "mean SQNR dB>", "worst>"), _totals(found)
    )


def _row(layer: MeasuredLayer, found: Measurements, metric: str) -> tuple[str, ...]:
    from cq_analyze.deep import OUTLIERS

    head = printable(layer.layer), size(layer.nbytes)
    if metric == "outliers":
        values = (getattr(layer.outliers, name) for name in OUTLIERS)
        return *head, *("-" if value is None else f"{value:.3g}" for value in values)
    costs = {cost.candidate: cost for cost in layer.costs}
    return *head, *(_value(costs.get(way), metric) for way in found.candidates)


def _value(cost: Cost | None, metric: str) -> str:
    value = None if cost is None else cost.metric(metric)
    if cost is None or value is None:
        return "-"
    mark = "" if cost.against is None else "*"
    if math.isinf(value):
        return ("exact" if value > 0 else "lost") + mark
    return {"sqnr": f"{value:.2f}", "cosine": f"{value:.6f}"}.get(metric, f"{value:.3g}") + mark


def _legend(found: Measurements, metric: str) -> Iterator[str]:
    told = {"sqnr": "SQNR in dB", "cosine": "cosine", "mse": "mean squared error"}[metric]
    yield f"{told} of each candidate; `-`: the layer cannot be stored so"
    if any(cost.against is not None for layer in found.layers for cost in layer.costs):
        yield "`*`: the plan does not store the layer so unless it is named"
    broken = [layer for layer in found.layers if layer.broken is not None]
    for layer in broken[:10]:
        yield f"`{printable(layer.layer)}` {layer.broken}"


def _totals(found: Measurements) -> Iterator[tuple[str, ...]]:
    for total in found.totals():
        levels = (total["mean_sqnr_db"], total["min_sqnr_db"])
        yield (
            total["candidate"],
            str(total["layers"]),
            size(total["nbytes_before"]),
            size(total["nbytes"]),
            *("-" if level is None else f"{level:.2f}" for level in levels),
        )


def tell(found: Mixture) -> None:
    """What was chosen, as talk: the recipe itself is the data."""
    from cq_analyze import planning

    here = options.terminal()
    counts = ", ".join(f"{count} {name}" for name, count in found.counts().items())
    here.say(f"template: {counts}")
    loaders = planning.loaders(found.model)
    worst = "" if math.isinf(found.min_sqnr) else f", worst layer {found.min_sqnr:.2f} dB"
    here.say(
        f"template: the file will have {found.nbytes} bytes ({size(found.nbytes)}){worst},"
        f" and {loaders} loads it"
    )
    if found.budget is not None and found.unused >= _UNUSED * found.budget:
        why = (
            "every choice of formats with less error takes more"
            if found.best
            else "nothing better was found that takes more of it"
        )
        share = f"{100 * found.unused / found.budget:.1f} %"
        here.say(f"template: {size(found.unused)} ({share}) of the budget are left: {why}")
