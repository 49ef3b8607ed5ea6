"""`cq analyze`: options to `analyze`, and what it found as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from cq.cli import options
from cq.cli.output import size
from cq.core.text import folded, printable
from cq_analyze.cli import deep as deeply
from cq_analyze.cli import plan_options as plan

if TYPE_CHECKING:
    from cq.core.components import Component
    from cq.core.families import Match
    from cq_analyze.adapters import AdapterFile
    from cq_analyze.calibrations import CalibrationFile
    from cq_analyze.description import Analysis, Plan, Quantized

_MOST_FINDINGS = 10
_MOST_GROUPS = 12
_MOST_FITS = 4


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "analyze")
    def analyze(
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
        deep: deeply.Deep = False,
        among: deeply.Among = None,
        metric: deeply.Metric = None,
        sort: deeply.Sort = None,
        report: deeply.Report = None,
        force: options.Force = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Say what a file is and what `cq quant` would make of it, from its header alone.

        Tells the model's family, what its numbers are for, and the plan; of a quantized checkpoint
        the formats and what ComfyUI would trip over (then it exits 1); of a LoRA its kind, ranks
        and the models that it fits. With --deep it reads the weights and measures what each format
        would cost each layer.

        \b
          cq analyze flux.safetensors
          cq analyze flux.safetensors --format nvfp4 --json
          cq analyze flux.safetensors --deep --report flux.html
        """
        from cq_analyze import chart, saving
        from cq_analyze.description import analyze as analyze_checkpoint

        here = options.terminal()
        if deep:
            deeply.check_words(
                metric or "sqnr",
                sort or "name",
                among=among,
                allow_custom_loader=allow_custom_loader,
            )
            deeply.refuse_requantizing("`--deep`", requantize=requantize)
        else:
            words = {"--among": among, "--metric": metric, "--sort": sort, "--report": report}
            more = {"--force": force, "--workers": workers, "--memory-limit": memory_limit}
            deeply.refuse_without("`--deep`", {**words, **more})
        checkpoint = options.open_input(model)
        if report is not None:
            saving.check(report, inputs=checkpoint.inputs, force=force)
            chart.check_installed()
        found = analyze_checkpoint(
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
        costs = None
        if deep:
            costs = deeply.measured(
                checkpoint,
                "analyze",
                among=among,
                family=family,
                recipe=recipe,
                only=only,
                skip=skip,
                allow_custom_loader=allow_custom_loader,
                workers=workers,
                memory_limit=memory_limit,
            )
        if costs is not None and report is not None:
            deeply.write_page(found, costs, report, force=force)
        if here.json:
            here.document(found.to_dict() | ({} if costs is None else {"deep": costs.to_dict()}))
        else:
            show(found)
            if costs is not None:
                deeply.show(costs, metric or "sqnr", sort or "name")
        return 0 if found.passed else 1


def show(found: Analysis) -> None:
    """An analysis as a person reads it."""
    here = options.terminal()
    for line in _heading(found):
        here.data(line)
    if len(found.components) > 1:
        here.data("")
        here.table(
            ("component", "prefix", "model", "tensors>", "bytes>"),
            [_component(component) for component in found.components],
        )
    here.data("")
    here.table(("what", "tensors>", "parameters>", "bytes>", "share>"), _amounts(found))
    if found.quantized is not None:
        _show_quantized(found.quantized)
    if found.adapter is not None:
        for line in _adapter(found.adapter):
            here.data(line)
    if found.calibration is not None:
        for line in _calibration(found.calibration):
            here.data(line)
    if found.plan is not None:
        _show_plan(found.plan)
    elif found.unplanned is not None:
        here.data(f"\nnothing would be quantized: {found.unplanned}")


def _heading(found: Analysis) -> Iterator[str]:
    total = found.inventory.total
    yield (
        f"{found.checkpoint}: {_what(found)}, {_count(total.parameters)} parameters in"
        f" {total.tensors} tensors, {size(found.nbytes_file)}"
    )
    yield from (f"note: {note}" for note in found.notes)


def _what(found: Analysis) -> str:
    if found.adapter is not None:
        return " and ".join(found.adapter.kinds) + " adapter"
    if found.calibration is not None:
        return "calibration"
    models = " and ".join(_title(match) for match in found.known.matches)
    doubts = [" or ".join(_title(m) for m in d.matches) for d in found.known.doubtful]
    told = [*filter(None, [models]), *(f"ambiguous: {doubt}" for doubt in doubts)]
    if told:
        return " and ".join(told)
    kinds = {component.kind for component in found.components} - {"other"}
    if kinds and "diffusion model" not in kinds:
        return " and ".join(sorted(kinds))
    return "unknown model, general rules apply"


def _title(match: Match) -> str:
    variant = f" ({match.variant})" if match.variant else ""
    prefix = f", under `{match.prefix}`" if match.prefix else ""
    return f"{match.family.title}{variant}{prefix}"


def _component(component: Component) -> tuple[str, ...]:
    models = " or ".join(_title(match) for match in component.detection.matches) or "unknown"
    if component.kind in {"VAE", "other"} and not component.detection.matches:
        models = ""
    return (
        component.kind,
        component.prefix or "(none)",
        models,
        str(component.tensors),
        size(component.nbytes),
    )


def _amounts(found: Analysis) -> Iterator[tuple[str, ...]]:
    from cq_analyze.inventory import ROLES

    whole = max(1, found.inventory.total.nbytes)
    if found.adapter is None and found.calibration is None:
        for name, amount in found.inventory.roles.items():
            yield _amount(ROLES[name], amount, whole)
    for name, amount in found.inventory.dtypes.items():
        yield _amount(f"in {name}", amount, whole)


def _amount(name: str, amount: Any, whole: int) -> tuple[str, ...]:
    return (
        name,
        str(amount.tensors),
        _count(amount.parameters),
        size(amount.nbytes),
        f"{100 * amount.nbytes / whole:.1f} %",
    )


def _count(number: float) -> str:
    for unit in ("", " K", " M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.2f} B"


def _show_plan(found: Plan) -> None:
    here = options.terminal()
    here.data("")
    here.table(
        ("layers>", "bytes>", "becomes>", "with", "reason"),
        _decisions(found.decisions),
    )
    here.data(
        f"\n{size(found.nbytes_before)} of tensors become a file of {size(found.nbytes)}"
        f" ({100 * found.ratio:.0f} %), which {found.loaded_by} loads;"
        f" memory: torch, and up to {size(found.nbytes_peak)} for each worker"
    )


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of decisions with equal outcome and reason, quantized ones first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for decision in sorted(decisions, key=lambda d: d["action"] != "quantize"):
        becomes = "kept"
        if decision["action"] == "quantize":
            words = (decision["format"], decision["scaling"], decision["optimizer"])
            rotation = decision["rotation"] and f"rotated by {decision['rotation']}"
            becomes = " ".join(filter(None, (*words, rotation)))
        groups.setdefault((becomes, decision["reason"]), []).append(decision)
    ordered = sorted(groups.items(), key=lambda g: (g[0][0] == "kept", -_nbytes(g[1])))
    for (becomes, reason), members in ordered[:_MOST_GROUPS]:
        kept = becomes == "kept"
        after = sum(d.get("nbytes_after", d["nbytes"]) for d in members)
        names = _names(members) if kept else ""
        told = f"{reason}: {names}" if names else reason
        yield str(len(members)), size(_nbytes(members)), "" if kept else size(after), becomes, told
    rest = [d for _, members in ordered[_MOST_GROUPS:] for d in members]
    if rest:
        yield str(len(rest)), size(_nbytes(rest)), "", "", "more kinds; `--json` has them all"


def _nbytes(members: Sequence[Mapping[str, Any]]) -> int:
    return sum(member["nbytes"] for member in members)


def _names(members: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(printable(folded(member["layer"]), 60) for member in members))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _show_quantized(found: Quantized) -> None:
    here = options.terminal()
    told = ", ".join(f"{count} {name}" for name, count in found.formats.items())
    shown = ", ".join(f"{count} by {name}" for name, count in found.evidence.items())
    here.data(
        f"\nquantized layers: {told or 'none that can be read'}" + (f" ({shown})" if shown else "")
    )
    here.data(f"loaded by {found.loaded_by}")
    for note in found.notes:
        here.data(f"note: {note}")
    counts = Counter(finding.name for finding in found.findings)
    for name, count in counts.items():
        members = [finding for finding in found.findings if finding.name == name]
        here.data("")
        for member in members[:_MOST_FINDINGS]:
            here.data(f"{name}: {member}")
        if count > _MOST_FINDINGS:
            here.data(f"{name}: {count - _MOST_FINDINGS} more like these")
        here.data(f"  what to do: {members[0].mend}")
    if not found.findings:
        here.data("nothing to find fault with in the header")


def _adapter(found: AdapterFile) -> Iterator[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
    keys = ", ".join(f"{name} ({count})" for name, count in found.spellings.items())
    prefixes = ", ".join(f"`{p}`" if p else "no prefix" for p in found.prefixes)
    yield f"\ntargets: {kinds}; keys as of {keys}; {prefixes}"
    if found.text_encoder_targets:
        yield f"text encoder: {found.text_encoder_targets} of {found.targets} targets"
    if found.ranks:
        yield f"rank: {_spread(found.ranks)}"
    if found.alphas:
        low, high = found.scales or (1.0, 1.0)
        scale = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        yield f"alpha: {_spread(found.alphas)}; alpha / rank: {scale}"
    else:
        yield "alpha: no tensor, so alpha / rank is 1 unless the file's metadata states an alpha"
    yield from _fits(found)
    if found.unrecognized:
        some = ", ".join(f"`{printable(name, 80)}`" for name in found.unrecognized[:3])
        yield f"{len(found.unrecognized)} tensors of no kind that cq knows, such as {some}"
    others = [kind for kind in found.kinds if kind not in found.merges]
    if others:
        yield f"`cq merge` does not merge {' or '.join(others)}"


def _calibration(found: CalibrationFile) -> Iterator[str]:
    def spread(span: tuple[int, int]) -> str:
        return f"{span[0]}" if span[0] == span[1] else f"{span[0]} to {span[1]}"

    columns = ", ".join(f"{count} of {columns}" for columns, count in found.columns.items())
    yield f"\n{found.layers} layers with {found.inputs} different inputs; features: {columns}"
    yield (
        f"rows: {spread(found.rows)}, and at least {found.held_rows} held back;"
        f" directions: {spread(found.ranks)}"
    )
    if found.few:
        some = ", ".join(f"`{printable(name, 60)}`" for name in found.few[:2])
        yield f"few rows, less than two for each feature: {len(found.few)} layers, such as {some}"
    fits = " or ".join(found.fits[:_MOST_FITS])
    yield f"fits {fits} by its layers' names" if fits else "fits no family that cq knows"


def _spread(counts: Mapping[Any, int]) -> str:
    values = sorted(counts)
    if len(values) == 1:
        return f"{values[0]:g}"
    common = max(counts, key=lambda value: counts[value])
    return f"{values[0]:g} to {values[-1]:g}, most often {common:g}"


def _fits(found: AdapterFile) -> Iterator[str]:
    for fit in found.fits[:_MOST_FITS]:
        unknown = fit.targets - fit.known
        rest = f", {unknown} of {fit.targets} targets are unknown to it" if unknown else ""
        yield f"fits {fit.title} by its layers' names{rest}"
    if len(found.fits) > _MOST_FITS:
        yield f"fits {len(found.fits) - _MOST_FITS} more families"
    if found.names_of is not None:
        yield f"fits {found.names_of}: its layers' names are those of the diffusers library"
    elif not found.fits and found.targets > found.text_encoder_targets:
        yield "fits no family that cq knows, by its layers' names"
