"""Devices and portions: the same integers, memory that is kept to, and words that are true.

There is no GPU in the tests. What runs on one is tried on tensors that say they are elsewhere
(`elsewhere.py`), and on streams that only write down what they are told.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import elsewhere
import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import check
from test_optimizers import LAYER, OTHER, inputs, moment, quantized

import cq
from cq.cli.main import run
from cq.cli.output import Terminal, size
from cq.core import calibration as files
from cq.core import catalog, tables
from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.engine import device, local, staging
from cq.core.engine.staging import Staging
from cq.core.errors import ResourceError, UsageError
from cq.core.rounding import stored_tensors
from cq.core.streaming import (
    CPU,
    MODES,
    Checkpointed,
    Placement,
    Room,
    StreamingMode,
    Work,
    offered,
    placed,
)
from cq_quant import where
from cq_quant.optimizers import Rounded, Task
from cq_quant.where import Retreating

GRIDS = tuple(
    (name, scaling)
    for name in catalog.names("formats")
    for scaling in catalog.load("formats", name).scalings
    if not catalog.load("formats", name).casts
)
EVERY_GRID = pytest.mark.parametrize(("name", "scaling"), GRIDS)
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.safetensors`, and `calib.safetensors` of inputs of its two layers."""
    found, recorded = tmp_path_factory.mktemp("devices"), {}
    shapes = {LAYER: (512, 256), OTHER: (256, 512)}
    tensors = {f"{layer}.weight": make.weight(*shape) for layer, shape in shapes.items()}
    make.save(found / "model.safetensors", {**tensors, f"{LAYER}.bias": make.weight(512)})
    for layer, (_, columns) in shapes.items():
        value, held = inputs(2000, columns), inputs(500, columns, "held")
        recorded[layer] = files.Statistics(
            diag=value.square().mean(0),
            sketch=moment(value, 48).sketch.contiguous(),
            mean=value.mean(0) + 0.1,
            absmax=value.abs().amax(0),
            rows=2000,
            held_diag=held.square().mean(0),
            held_sketch=moment(held, 24).sketch.contiguous(),
            held_rows=500,
        )
    files.save(found / "calib.safetensors", recorded)
    return found


# The same code elsewhere --------------------------------------------------------------------------


def test_tensors_elsewhere_meet_no_tensors_here() -> None:
    """The stand-in itself: without this nothing below would fail."""
    here = make.weight(4, 4)
    with elsewhere.Elsewhere():
        there = here.to(elsewhere.DEVICE)
        assert (there.device, there.dtype) == (elsewhere.DEVICE, torch.float32)
        assert torch.equal((there @ there.T).to(CPU), here @ here.T)
        for mixed in (
            lambda: there + here,
            lambda: torch.where(there > 0, here, 0),
            lambda: here[there > 0],
            lambda: torch.index_select(here, 0, torch.zeros(1, dtype=torch.int32).to(there.device)),
            lambda: torch.div(there, 2, out=torch.empty(4, 4)),
        ):
            with pytest.raises(RuntimeError, match="elsewhere and a tensor here"):
                mixed()


def some(scaling: str, name: str, *, calibrated: bool) -> tuple[str, ...]:
    """The optimizers to be tried on a grid. All of them on one; on the others `learned`, which does
    with a calibration what the others do, and more; without one the plain rule."""
    if (name, scaling) == ("int8_tensorwise", "row"):
        return tuple(catalog.names("optimizers"))
    return ("learned",) if calibrated else ("rtn",)


@EVERY_GRID
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_optimizer_rounds_elsewhere_as_here(
    name: str, scaling: str, calibrated: bool
) -> None:
    """Scales, codes, packing and what stands beside: made where the rows are, the same bits."""
    rows, columns = 256, 128
    weight, plug = make.weight(rows, columns, seed=name), catalog.load("formats", name)
    guides = (moment(inputs(256, columns), 16), moment(inputs(64, columns, 1), 16))

    def stored(optimizer: str, place: torch.device) -> dict[str, list[torch.Tensor]]:
        def segments() -> Iterator[torch.Tensor]:
            return (weight[start : start + 128].to(place) for start in (0, 128))

        plug_, found = catalog.load("optimizers", optimizer), dict[str, list[torch.Tensor]]()
        options = {"passes": 1.0} if "passes" in plug_.options else {}
        task = Task(shape=(rows, columns), rows=segments, options=options, device=place.type)
        if calibrated:
            task = replace(task, moment=guides[0].to(place), held=guides[1].to(place))
        spec, fit = TensorSpec("F32", (rows, columns)), plug_.prepare(task)
        for own, tensor in stored_tensors(
            plug, spec, scaling, segments, fit, search=True, together=2
        ):
            found.setdefault(own, []).append(tensor)
        return found

    for optimizer in some(scaling, name, calibrated=calibrated):
        here = stored(optimizer, torch.device(CPU))
        with elsewhere.Elsewhere():
            there = stored(optimizer, elsewhere.DEVICE)
            assert here.keys() == there.keys()
            for own, tensors in here.items():
                for one, two in zip(tensors, there[own], strict=True):
                    assert isinstance(two, elsewhere.Tensor), own
                    assert make.same(one, two.to(CPU)), (optimizer, own)


@EVERY_GRID
def test_every_format_decodes_elsewhere_as_here(name: str, scaling: str) -> None:
    """Codes back to weights, as the run time does it."""
    plug, weight = catalog.load("formats", name), make.weight(128, 256)
    spec = TensorSpec("F32", (128, 256))
    rtn = catalog.load("optimizers", "rtn").fit
    stored = dict(stored_tensors(plug, spec, scaling, lambda: iter([weight]), rtn, search=False))
    group = 256 if plug.rotation == "always" else None
    marker = plug.marker(spec, scaling, group)
    rows = stored.pop("weight")
    here = plug.unpack(rows, 0, stored, marker)
    with elsewhere.Elsewhere():
        beside = {own: tensor.to(elsewhere.DEVICE) for own, tensor in stored.items()}
        there = plug.unpack(rows.to(elsewhere.DEVICE), 0, beside, marker)
        assert isinstance(there, elsewhere.Tensor)
        assert make.same(here, there.to(CPU))


def test_tables_are_the_same_numbers_everywhere() -> None:
    from cq.core.rotation import hadamard

    with elsewhere.Elsewhere():
        there = tables.on(elsewhere.DEVICE, hadamard, 64)
        assert isinstance(there, elsewhere.Tensor)
        assert make.same(there.to(CPU), hadamard(64))
    assert tables.on(torch.device(CPU), hadamard, 64) is hadamard(64)


def produced(part: Part, place: Placement | None = None) -> list[Piece]:
    if place is None:
        return list(part.produce())
    with offered(place):
        return list(part.produce())


def same_pieces(one: list[Piece], two: list[Piece]) -> bool:
    return len(one) == len(two) and all(
        (a.name, a.start) == (b.name, b.start) and make.same(a.tensor, b.tensor)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int8_tensorwise"},
        {"format": "asym_w4a8_int8", "calibrated": False},
        {"format": "nvfp4", "calibrated": False, "optimizer": "rtn"},
        {"format": "int8_tensorwise", "bias_correction": True},
        {"format": "float8_e4m3fn", "calibrated": False, "optimizer": "learned"},
    ],
    ids=str,
)
def test_layers_are_computed_elsewhere_as_here(settings: dict[str, Any], directory: Path) -> None:
    """From file to stored tensors, through the staging: read here, rounded there, written here."""
    part = quantized(directory, **settings).part(f"{LAYER}.weight")
    here = produced(part)
    with elsewhere.Elsewhere() as there:
        place = Placement(device=elsewhere.NAME, segments=1)
        assert same_pieces(here, produced(part, place))
    assert there.made > 10
    assert not any(isinstance(piece.tensor, elsewhere.Tensor) for piece in here)


@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_of_many_segments_are_computed_elsewhere_as_here(
    calibrated: bool, directory: Path, tmp_path: Path
) -> None:
    """Two at a time, and one that is left; grids take all of a segment at once there."""
    make.save(tmp_path / "m.safetensors", {f"{LAYER}.weight": make.weight(8300, 256)})
    source = str(tmp_path / "m")
    part = quantized(directory, source, format="nvfp4", calibrated=calibrated).part(
        f"{LAYER}.weight"
    )
    here = produced(part)
    with elsewhere.Elsewhere():
        assert same_pieces(here, produced(part, Placement(device=elsewhere.NAME, segments=2)))


# Portions change nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["int8_tensorwise", "nvfp4"])
def test_integers_do_not_depend_on_how_many_rows_go_together(
    format_name: str,
    directory: Path,
    tmp_path: Path,
) -> None:
    make.save(tmp_path / "m.safetensors", {f"{LAYER}.weight": make.weight(13000, 256)})
    model = quantized(directory, str(tmp_path / "m"), format=format_name)
    part = model.part(f"{LAYER}.weight")
    assert part.work is not None
    assert part.work.segments == 4
    assert part.work.usual >= 4  # so that what follows is finer
    usual = produced(part)
    for segments, ahead in ((1, 0), (3, 1), (1, 3)):
        place = Placement(device=CPU, segments=segments, ahead=ahead)
        assert same_pieces(usual, produced(part, place))


@EVERY_MODE
def test_modes_write_the_same_file(
    mode: StreamingMode,
    directory: Path,
    tmp_path: Path,
) -> None:
    model = quantized(directory)
    cq.write(model, tmp_path / "auto")
    cq.write(model, tmp_path / mode, streaming_mode=mode, force=True)
    assert (tmp_path / mode).read_bytes() == (tmp_path / "auto").read_bytes()


def test_checkpointed_layers_are_the_same_in_less_memory(directory: Path, tmp_path: Path) -> None:
    """Through the command line: the plan tells the portions, the file is equal byte for byte."""
    model, calib = tmp_path / "m.safetensors", directory / "calib.safetensors"
    make.save(model, {f"{LAYER}.weight": make.weight(13000, 256)})
    words = ("quant", model, "--only", "*", "--calibration", calib, "--memory-limit", "2GiB")
    asked = {
        "usual": (),
        "wide": ("--quip-checkpointed-threshold", "256"),
        "two": ("--quip-checkpointed-threshold", "256", "--quip-checkpointed-segments", "2"),
    }
    plans, peaks = {}, {}
    for name, more in asked.items():
        plan = json.loads(command(*words, *more, "--dry-run", "--json").out)
        (place,) = plan["placements"]
        plans[name], peaks[name] = (place["segments"], place["of_segments"]), plan["nbytes_peak"]
        done = command(*words, *more, "-o", tmp_path / f"{name}.safetensors")
        assert done.code == 0, done.err
    assert plans == {"usual": (4, 4), "wide": (1, 4), "two": (2, 4)}
    assert peaks["wide"] < peaks["two"] < peaks["usual"]
    bytes_of = {(tmp_path / f"{name}.safetensors").read_bytes() for name in asked}
    assert len(bytes_of) == 1
    narrow = command(*words, "--quip-checkpointed", "--dry-run")
    assert "`--quip-checkpointed` changes nothing: no layer of 8192 columns" in narrow.err


def test_shares_take_the_options_and_tell_what_came_of_their_layers(
    directory: Path, tmp_path: Path
) -> None:
    model, calib = directory / "model.safetensors", directory / "calib.safetensors"
    words = ("quant", model, "--only", "*", "--calibration", calib)
    plan = tmp_path / "plan.json"
    plan.write_text(command(*words, "--defer").out)
    command(*words, "-o", tmp_path / "whole.safetensors")
    out = tmp_path / "out.safetensors"
    options = ("--quip-checkpointed-threshold", "512", "--streaming-mode", "minimal")
    for share in ("1/2", "2/2"):
        done = command("run", plan, "-o", out, "--shard", share, *options, "--device", "auto")
        assert done.code == 0, done.err
        assert "`--device auto` is `cpu` here" in done.err
        assert "1 of 2 layers were computed in this run" in done.err
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    refused = command("run", plan, "-o", tmp_path / "no", "--shard", "1/2", "--device", "cuda")
    assert refused.code == 5
    assert "there is no device `cuda`" in refused.err


def test_what_came_of_layers_is_told_from_process_to_process(
    directory: Path, tmp_path: Path
) -> None:
    """As a Ray task does it: computed by one checkpoint, told by another one of the same plan."""
    here, there = (quantized(directory, optimizer="gptq") for _ in range(2))
    cq.write(there, tmp_path / "out")
    (told,), (taken,) = there.outcomes, here.outcomes
    expected = told.to_dict()
    assert len(expected["layers"]) == 2
    taken.take_over(json.loads(json.dumps(told.handed_over())))
    assert taken.to_dict() == expected
    assert told.remarks() == []


def test_a_layer_over_the_budget_is_cut_until_it_fits(
    directory: Path,
    tmp_path: Path,
) -> None:
    make.save(tmp_path / "m.safetensors", {f"{LAYER}.weight": make.weight(20000, 256)})
    model = quantized(directory, str(tmp_path / "m"))
    part = model.part(f"{LAYER}.weight")
    assert part.work is not None
    least = part.work.on_cpu(1)
    assert part.work.on_cpu(part.work.usual) == part.nbytes_peak > 2 * least
    cq.write(model, tmp_path / "all")
    cq.write(model, tmp_path / "cut", memory_limit=least)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "all").read_bytes()
    with pytest.raises(ResourceError, match=f"needs {least / 1e6:.1f} MB"):
        cq.write(model, tmp_path / "less", memory_limit=least - 1)
    with pytest.raises(ResourceError, match="needs") as refused:
        cq.write(model, tmp_path / "less", memory_limit=least, streaming_mode="off")
    assert "--streaming-mode auto" in str(refused.value.hint)


def test_a_plan_tells_the_memory_that_the_work_will_take(directory: Path, tmp_path: Path) -> None:
    """Cut as the limit asks for, and all workers together where that is less."""
    make.save(tmp_path / "m.safetensors", {f"{LAYER}.weight": make.weight(20000, 256)})
    part = quantized(directory, str(tmp_path / "m"), optimizer="gptq").part(f"{LAYER}.weight")
    assert part.work is not None
    words = ("quant", tmp_path / "m.safetensors", "--only", "*", "--workers", "4", "--dry-run")
    given = ("--calibration", directory / "calib.safetensors", "--optimizer", "gptq")

    def told(limit: int, *more: str) -> str:
        asked = command(*words, *given, "--memory-limit", f"{limit}B", *more)
        assert asked.code == 0, asked.err
        return asked.out.strip().splitlines()[-1]

    least, usual = part.work.on_cpu(1), part.nbytes_peak
    plenty, little = told(100 * usual), told(least)
    assert plenty.endswith(f"memory: torch, and up to {size(usual)} for each worker")
    each = f"up to {size(least)} for each worker"
    assert little.endswith(f"memory: torch, and {each}, {size(least)} for all together")
    peaks = [json.loads(told(limit, "--json"))["nbytes_peak"] for limit in (100 * usual, least)]
    assert peaks == [usual, least]


def test_a_part_inside_another_claims_nothing_of_its_placement(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are read to be stored anew are made here; only the outer layer was offered."""
    inner = quantized(directory, format="int8_tensorwise")
    part = cq_requantized(inner).part(f"{LAYER}.weight")
    here, asked = produced(part), list[str]()

    def noted(device: str, ahead: int = 0) -> Staging:
        asked.append(device)
        return Staging(device, ahead)

    monkeypatch.setattr(where, "Staging", noted)
    with elsewhere.Elsewhere():
        assert same_pieces(here, produced(part, Placement(device=elsewhere.NAME, segments=1)))
    assert asked[0] == elsewhere.NAME
    assert set(asked[1:]) == {CPU}


def cq_requantized(model: Any) -> Any:
    import cq_quant

    return cq_quant.quantize(model, format="nvfp4", only=["*"], requantize=True)


# Policies -----------------------------------------------------------------------------------------

MB = 1 << 20
WORKS = st.builds(
    Work,
    weights=st.integers(1, 1 << 30),
    columns=st.integers(1, 1 << 15),
    cut=st.integers(1, 1 << 24),
    usual=st.integers(1, 64),
    gains=st.booleans(),
    nbytes_host=st.integers(0, 1 << 30),
    nbytes_fixed=st.integers(0, 1 << 30),
    nbytes_weight=st.integers(1, 64),
    nbytes_staged=st.integers(1, 4),
)
BYTES = st.integers(0, 1 << 38)
ANY_MODE = st.sampled_from(MODES)
WIDE = st.none() | st.builds(Checkpointed, st.integers(1, 1 << 15), st.integers(2, 64))


@given(WORKS, ANY_MODE, WIDE, BYTES, BYTES, BYTES)
def test_more_vram_never_means_less_work_on_the_device(
    work: Work, mode: StreamingMode, wide: Checkpointed | None, host: int, vram: int, more: int
) -> None:
    little, much = (
        placed(work, mode, Room(host=host, device="cuda:0", vram=v), wide)
        for v in (vram, vram + more)
    )
    on_device = [p.segments if p.device != CPU else 0 for p in (little, much)]
    assert on_device[0] <= on_device[1]


@given(WORKS, ANY_MODE, WIDE, BYTES, BYTES, st.integers(1, 8))
def test_a_placement_keeps_to_what_there_is(
    work: Work, mode: StreamingMode, wide: Checkpointed | None, host: int, vram: int, workers: int
) -> None:
    room = Room(host=host, workers=workers, device="cuda:0", vram=vram)
    place = placed(work, mode, room, wide)
    most = work.most(wide)
    assert 1 <= place.segments <= most <= work.segments
    assert place.segments + place.ahead <= work.segments
    if place.device != CPU:
        assert 0 < place.nbytes_device <= vram
        return
    least = work.on_device(most if mode == "off" else 1, 0)
    assert mode != "off" or least > vram, "what fits is there"
    assert mode == "off" or least + 2 * work.cut * work.nbytes_staged > vram
    assert (place.nbytes_device, place.ahead) == (0, 0)
    assert place.nbytes_host == work.on_cpu(place.segments)
    if work.gains and mode == "off":
        assert place.segments == most
    elif place.nbytes_host > host:
        assert place.segments == 1, "what does not fit is at its least"


@given(WORKS, ANY_MODE, BYTES, BYTES, st.integers(1, 1 << 15), st.integers(2, 64))
def test_checkpointed_layers_are_cut_finer_if_they_are_wide_and_calibrated(
    work: Work, mode: StreamingMode, host: int, vram: int, columns: int, portions: int
) -> None:
    room = Room(host=host, device="cuda:0", vram=vram)
    usual, wide = (
        placed(work, mode, room, asked) for asked in (None, Checkpointed(columns, portions))
    )
    if not work.gains or work.columns < columns:
        assert wide == usual
    else:
        assert wide.segments <= usual.segments or usual.device == CPU != wide.device
        assert wide.segments <= -(-work.segments // portions)


@given(WORKS, BYTES)
def test_what_fits_as_a_whole_is_on_the_device_in_every_mode(work: Work, spare: int) -> None:
    vram = 2 * work.on_device(work.segments, 0) + spare
    room = Room(host=0, device="cuda:0", vram=vram)
    places = {mode: placed(work, mode, room) for mode in MODES}
    assert {place.device for place in places.values()} == {"cuda:0"}
    assert places["off"].segments == places["minimal"].segments == places["auto"].segments
    assert places["auto"].segments == work.segments
    assert places["balanced"].segments <= max(1, min(work.usual, work.segments))
    assert places["aggressive"].segments == 1


def test_modes_mean_what_the_page_says() -> None:
    """One layer of 100 segments of 1 MB of weights, 30 bytes each, in 1 GB of VRAM."""
    work = Work(
        weights=100 * MB,
        columns=8192,
        cut=MB,
        usual=16,
        gains=True,
        nbytes_host=MB,
        nbytes_fixed=10 * MB,
        nbytes_weight=28,
        nbytes_staged=2,
    )
    room = Room(host=2 * 500 * MB, workers=2, device="cuda:0", vram=1000 * MB)
    found = {mode: placed(work, mode, room) for mode in MODES}
    assert {m: (p.device, p.segments, p.ahead) for m, p in found.items()} == {
        "off": (CPU, 100, 0),
        "minimal": ("cuda:0", 32, 1),
        "balanced": ("cuda:0", 16, 2),
        "aggressive": ("cuda:0", 1, 1),
        "auto": ("cuda:0", 16, 2),
    }
    here = {mode: placed(work, mode, replace(room, device=CPU, vram=0)) for mode in MODES}
    assert {mode: p.segments for mode, p in here.items()} == {
        "off": 100,
        "minimal": 35,
        "balanced": 16,
        "aggressive": 1,
        "auto": 16,
    }
    narrow = placed(work, "auto", replace(room, vram=work.on_device(1, 2)))
    assert (narrow.device, narrow.segments) == ("cuda:0", 1), "one layer may have all of it"
    assert placed(work, "auto", replace(room, vram=work.on_device(1, 2) - 1)).device == CPU
    crowded = replace(room, device=CPU, vram=0, workers=4)
    assert placed(work, "auto", crowded).segments == 8


# The engine ---------------------------------------------------------------------------------------


class Gauge:
    """Parts that say how much of a device they hold together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.together = 0
        self.devices: set[str] = set()

    def work(self, job: local.Job) -> None:
        assert job.placement is not None
        with self.lock:
            self.now += job.placement.nbytes_device
            self.most = max(self.most, self.now)
            self.devices.add(job.placement.device)
        time.sleep(0.005)
        with self.lock:
            self.now -= job.placement.nbytes_device


@pytest.mark.parametrize("vram", [40 * MB, 100 * MB, 1000 * MB])
def test_parts_in_flight_keep_to_the_vram_together(
    vram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "found", lambda word: "cuda:0")
    monkeypatch.setattr(device, "vram", lambda where, limit: limit)
    work = Work(
        weights=4 * MB,
        columns=1024,
        cut=MB,
        usual=1,
        gains=False,
        nbytes_host=0,
        nbytes_fixed=0,
        nbytes_weight=8,
        nbytes_staged=1,
    )
    parts = [replace(make.part({f"p{i}": torch.zeros(1)}), work=work) for i in range(12)]
    gauge = Gauge()
    settings = local.Settings(workers=4, device="cuda", vram_limit=vram, memory_limit=1 << 40)
    local.run(parts, gauge.work, settings)
    assert gauge.most <= vram
    assert gauge.devices == {"cuda:0"}
    assert gauge.most > vram // 3 or vram == 1000 * MB


# Staging ------------------------------------------------------------------------------------------


def test_segments_read_ahead_come_in_order_and_no_further_than_asked() -> None:
    taken: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for number in range(20):
            taken.append(number)
            yield torch.tensor([number])

    sent = Staging(CPU, ahead=3).sent(source())
    first = next(sent)
    time.sleep(0.05)
    assert 1 < len(taken) <= 5  # one given out, three waiting, one in the reader's hands
    assert [int(first), *map(int, sent)] == list(range(20))


def test_a_failure_while_reading_ahead_is_raised_where_the_rows_are_asked_for() -> None:
    def source() -> Iterator[torch.Tensor]:
        yield torch.tensor([1])
        raise ResourceError("the disk is gone")

    sent = Staging(CPU, ahead=2).sent(source())
    assert int(next(sent)) == 1
    with pytest.raises(ResourceError, match="the disk is gone"):
        next(sent)


def test_a_reader_ends_when_nobody_asks_any_more() -> None:
    sent = Staging(CPU, ahead=1).sent(torch.zeros(1) for _ in range(1000))
    next(sent)
    before = [t for t in threading.enumerate() if t.name == "cq-read-ahead"]
    assert len(before) == 1
    sent.close()  # type: ignore[attr-defined]
    assert not before[0].is_alive()


def test_readers_use_one_thread_as_workers_do() -> None:
    """Another number of threads is another order of sums: merged weights would differ."""
    seen: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        seen.append(torch.get_num_threads())
        yield torch.zeros(1)

    torch.set_num_threads(2)
    try:
        list(Staging(CPU, ahead=1).sent(source()))
    finally:
        torch.set_num_threads(1)
    assert seen == [1]


class Streams:
    """What streams are told, in order; `current` is the one that copies are made on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, ...]] = []
        self.names = iter(("compute", "up", "down"))
        self.pinned = 0
        empty, streams = torch.empty, self

        class Stream:
            def __init__(self, where: torch.device) -> None:
                self.name = next(streams.names)

            def record_event(self) -> Any:
                streams.told.append((self.name, "event"))
                return Event(self.name)

            def wait_event(self, event: Any) -> None:
                streams.told.append((self.name, "waits for", event.name))

            def wait_stream(self, other: Any) -> None:
                streams.told.append((self.name, "waits for", other.name))

            def recorded(self, tensor: torch.Tensor) -> None:
                streams.told.append((self.name, "keeps"))

        class Event:
            def __init__(self, name: str) -> None:
                self.name = name

            def synchronize(self) -> None:
                streams.told.append(("host", "waits for", self.name))

        def pinned(*shape: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
            self.pinned += pin_memory
            return empty(*shape, **how)

        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


def test_copies_are_waited_for_before_what_they_copy_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The steps of a GPU's streams, told to streams that only write them down."""
    streams = Streams(monkeypatch)
    lane = staging._Cuda(elsewhere.NAME)
    way = Staging(CPU, ahead=0)
    way.device, way._lane = elsewhere.NAME, lane
    rows = [make.weight(8, 4, seed=i) for i in range(3)]
    with elsewhere.Elsewhere():
        there = way.sent(iter(rows))
        back = list(way.returned(("weight", tensor * 2) for tensor in there))
    assert [name for name, _ in back] == ["weight"] * 3
    assert all(torch.equal(tensor, 2 * row) for (_, tensor), row in zip(back, rows, strict=True))
    assert streams.pinned == 6
    up = [("up", "event"), ("compute", "waits for", "up"), ("compute", "keeps")]
    down = [("down", "waits for", "compute"), ("down", "keeps"), ("down", "event")]
    landed = ("host", "waits for", "down")
    # A result is waited for when the next one is computed already and on its way.
    assert streams.told == [*up, *down, *up, *down, landed, *up, *down, landed, landed]


# When a device's memory runs out ------------------------------------------------------------------


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_rows_for_which_memory_runs_out_are_rounded_here(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch in the middle, and what follows goes on there; codes, scales and figures as ever."""
    make.save(tmp_path / "m.safetensors", {f"{LAYER}.weight": make.weight(8300, 256)})
    model = quantized(directory, str(tmp_path / "m"), format="nvfp4")
    part = model.part(f"{LAYER}.weight")
    here, told = produced(part), model.outcomes[0].to_dict()
    from cq_quant.optimizers import _feedback

    real, there = _feedback.ldlq.round_rows, []

    def failing(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if isinstance(weight, elsewhere.Tensor):
            there.append(weight.shape[0])
            if len(there) == 2:
                exhausted()
        return real(weight, *rest)

    monkeypatch.setattr(_feedback.ldlq, "round_rows", failing)
    retreats: list[str] = []
    with (
        elsewhere.Elsewhere(),
        offered(Placement(device=elsewhere.NAME, segments=1), lambda: retreats.append("once")),
    ):
        found = list(part.produce())
    assert same_pieces(here, found)
    assert retreats == ["once"]
    assert len(there) == 3
    ours = model.outcomes[0].to_dict()["layers"][0]
    assert (ours["rows"], ours["taken"]) == (told["layers"][0]["rows"], told["layers"][0]["taken"])


def test_a_layer_whose_factors_find_no_room_is_computed_here(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = quantized(directory).part(f"{LAYER}.weight")
    here = produced(part)
    from cq_quant.optimizers import _feedback

    real = _feedback.ldlq.factors

    def failing(rest: torch.Tensor, *others: Any, **more: Any) -> Any:
        return exhausted() if isinstance(rest, elsewhere.Tensor) else real(rest, *others, **more)

    monkeypatch.setattr(_feedback.ldlq, "factors", failing)
    retreats: list[str] = []
    with (
        elsewhere.Elsewhere(),
        offered(Placement(device=elsewhere.NAME, segments=2), lambda: retreats.append("once")),
    ):
        assert same_pieces(here, list(part.produce()))
    assert retreats == ["once"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "resource.vram"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "resource.device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_device_that_fails_is_told_of_in_a_sentence(error: Exception, code: str) -> None:
    with pytest.raises(ResourceError) as told, device.failures_told("a.weight", "cuda:0"):
        raise error
    assert told.value.code == code
    assert "`cuda:0`" in told.value.message
    assert "`a.weight`" in told.value.message
    assert told.value.hint
    assert told.value.exit_code == 5


def test_a_retreat_tells_the_figures_of_rows_once() -> None:
    """Rows whose attempt on the device failed at the very end count as they were rounded here."""
    weight, told = make.weight(256, 256), list[Rounded]()
    grid = catalog.load("formats", "int8_tensorwise").grid(TensorSpec("F32", (256, 256)), "row")
    guide = moment(inputs(256, 256), 16)
    task = Task(shape=(256, 256), rows=lambda: iter(()), moment=guide, held=guide, tell=told.append)
    fit = catalog.load("optimizers", "gptq").prepare(task)

    class Full:
        """A grid that has no room for the last codes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(grid, name)

        calls = 0

        def nearest(self, *given: Any) -> Any:
            self.calls += 1
            return exhausted() if self.calls == 2 else grid.nearest(*given)

    codes, _ = Retreating(fit, lambda: fit, 128, lambda: None)(weight, Full(), {}, search=True)
    assert sum(r.rows for r in told) == 256
    assert torch.equal(codes, fit(weight, grid, {}, search=True)[0])


# The command --------------------------------------------------------------------------------------


class Said(NamedTuple):
    code: int
    out: str
    err: str


def command(*argv: object) -> Said:
    """A command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = run([str(a) for a in argv], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return Said(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "mps", "cpu:0", ""])
def test_words_that_name_no_device_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="is not a device"):
        device.parse_device(word)


@pytest.mark.parametrize(
    ("count", "word", "expected"),
    [
        (0, "cpu", "cpu"),
        (0, "auto", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cuda:2", None),
        (0, "cuda", None),
        (0, "cuda:0", None),
    ],
)
def test_a_word_means_a_device_that_is_there(
    count: int, word: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if expected is not None:
        assert device.found(word) == expected
        return
    with pytest.raises(ResourceError, match="there is no device") as told:
        device.found(word)
    assert told.value.hint


def test_a_vram_limit_is_never_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (1000, 2000))
    assert device.vram("cuda:0", None) == 800
    assert device.vram("cuda:0", 300) == 300
    assert device.vram("cuda:0", 5000) == 800
    assert device.vram(CPU, 300) == 0


def test_a_device_that_is_not_there_is_exit_5_and_leaves_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("quant", directory / "model.safetensors", "--only", "*", "--force")
    out = tmp_path / "o.safetensors"
    failed = command(*words, "--device", "cuda", "-o", out)
    assert failed.code == 5
    assert "there is no device `cuda`" in failed.err
    assert "hint: leave `--device` out" in failed.err
    assert list(tmp_path.iterdir()) == []
    done = command(*words, "--device", "auto", "-o", out)
    assert done.code == 0
    assert "`--device auto` is `cpu` here" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "`gpu` is not a device"),
        (["--vram-limit", "8GiB"], "`--vram-limit` is of a GPU"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray gives each worker a GPU"),
        (["--streaming-mode", "fast"], "fast"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str],
    message: str,
    directory: Path,
    tmp_path: Path,
) -> None:
    model = directory / "model.safetensors"
    failed = command("quant", model, "--only", "*", "-o", tmp_path / "o.safetensors", *words)
    assert failed.code == 2
    assert message in failed.err


def test_a_mode_that_changes_nothing_is_told(directory: Path, tmp_path: Path) -> None:
    wide = tmp_path / "m.safetensors"
    make.save(wide, {f"{LAYER}.weight": make.weight(8300, 256)})
    words = ("quant", wide, "--only", "*", "--dry-run", "--streaming-mode")
    assert "changes nothing" in command(*words, "off").err
    assert "changes nothing" not in command(*words, "auto").err
    calibrated = command(*words, "off", "--calibration", directory / "calib.safetensors")
    assert "changes nothing" not in calibrated.err


def test_a_plan_tells_where_layers_are_computed_without_torch(
    directory: Path,
) -> None:
    words = ["quant", str(directory / "model.safetensors"), "--only", "*", "--dry-run", "--json"]
    plans = {}
    for name, more in {
        "here": ["--memory-limit", "1GiB"],
        "there": ["--device", "cuda:1", "--vram-limit", "1GiB"],
        "little": ["--device", "auto", "--vram-limit", "1kB"],
        "unknown": ["--device", "cuda"],
    }.items():
        plans[name] = json.loads(command(*words, *more).out)
        check("plan", plans[name])
    (here, *_), (there, *_) = (plans[name]["placements"] for name in ("here", "there"))
    assert here["tensor"] == there["tensor"] == f"{LAYER}.weight"
    assert (here["device"], here["nbytes_device"], here["ahead"]) == ("cpu", 0, 0)
    assert there["device"] == "cuda:1"
    assert 0 < there["nbytes_device"] < 1 << 30
    assert {p["device"] for p in plans["little"]["placements"]} == {"cpu"}
    assert {(p["device"], p["segments"]) for p in plans["unknown"]["placements"]} == {
        ("cuda", None)
    }
    argv = ["cq", *words, "--device", "cuda", "--vram-limit", "1GiB"]
    script = (
        f"import sys; from cq.cli.entry import main; sys.argv = {argv!r}\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
