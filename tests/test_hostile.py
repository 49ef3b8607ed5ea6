"""Hostile input: whatever a file says, it ends in a `CqError`, soon, and in memory of its size.

A few thousand cases of what `make fuzz` does a million times, and what that has found.
"""

from __future__ import annotations

import ast
import io
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import make
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cq
from bench import hostile
from bench.fuzz import mutate_json
from cq.core.errors import InputError
from cq.core.manifest import open_checkpoint, open_checkpoint_stream

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cq", "cq_analyze", "cq_edit", "cq_merge", "cq_quant")
CASE_SECONDS = 5
CONSTANT_BYTES = 24 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hostile.Target]:
    found = hostile.targets(tmp_path_factory.mktemp("seeds"))
    return {target.name: target for target in found}


DOORS = (
    *("header", "file", "analyze", "convert", "marker", "layers", "manifest", "recipe"),
    *("adapter", "adapter config", "map", "calibration", "index", "edit"),
)


def mutant(seed: bytes, number: int) -> bytes:
    """`seed` with its JSON changed, or some of its bytes."""
    rng = random.Random(number)
    raw = bytearray(mutate_json(seed, rng))
    if rng.random() < 0.3 or raw == seed:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    return bytes(raw)


def test_every_door_is_knocked_at(doors: dict[str, hostile.Target]) -> None:
    assert tuple(doors) == DOORS


@pytest.mark.parametrize("name", DOORS)
def test_seeds_pass_or_nearly_pass(
    name: str, doors: dict[str, hostile.Target], tmp_path: Path
) -> None:
    """Else mutants of them would all end at the first check."""
    found = [doors[name].knock(seed, tmp_path) for seed in doors[name].seeds]
    assert name in {"header", "recipe", "calibration"} or None in found, found


@pytest.mark.parametrize("name", DOORS)
@given(number=st.integers(0, 2**63))
@settings(max_examples=60)
def test_hostile_bytes_end_in_an_error_of_cq(
    name: str, number: int, doors: dict[str, hostile.Target], place: Path
) -> None:
    seeds = doors[name].seeds
    raw = mutant(seeds[number % len(seeds)], number)
    started = time.monotonic()
    doors[name].knock(raw, place)
    assert time.monotonic() - started < CASE_SECONDS


@pytest.mark.parametrize("name", DOORS)
def test_hostile_bytes_take_memory_of_their_size(
    name: str, doors: dict[str, hostile.Target], tmp_path: Path
) -> None:
    for seed in doors[name].seeds:
        doors[name].knock(seed, tmp_path)  # what is loaded once stays
    for number in range(8):
        raw = mutant(doors[name].seeds[0], number)
        tracemalloc.start(1)
        doors[name].knock(raw, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * len(raw) + CONSTANT_BYTES


def test_a_door_that_lets_something_else_out_is_noticed(tmp_path: Path) -> None:
    door = hostile.Target("broken", lambda raw, place: json.loads(raw), (b"",))
    with pytest.raises(ValueError, match="Expecting value"):
        door.knock(b"", tmp_path)


def test_manifest_takes_no_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    # Python's `read(n)` takes n bytes before it looks how many there are.
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"cq": 1, "kind": "none"}')
    for read in (
        lambda: open_checkpoint(path),
        lambda: open_checkpoint_stream(io.BufferedReader(io.FileIO(path))),
    ):
        tracemalloc.start(1)
        with pytest.raises(InputError):
            read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/tmp/a.safetensors", "sub/a.safetensors", "./a.safetensors"),
        *("..\0/a.safetensors", "", ".safetensors/", "a.safetensors/..", "a.safetensors\0"),
    ],
)
def test_index_never_leads_out_of_its_directory(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    for directory in (tmp_path, inside, inside / "sub"):
        make.save(directory / "a.safetensors", {"t": make.weight(2)})
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(InputError):
        cq.open(index)
    index.write_text(json.dumps({"weight_map": {"t": "a.safetensors"}}))
    assert [file.path for file in cq.open(index).inputs] == [inside / "a.safetensors"]


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield path, ast.parse(path.read_text())


def runs_what_it_reads(tree: ast.Module) -> list[str]:
    """What in a module can make code of data: pickles, and what stands for them."""
    modules = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "yaml.load"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
            found.append(ast.unparse(node.func))
    return found


def test_nothing_that_is_read_can_run() -> None:
    assert {
        str(path): found for path, tree in modules() if (found := runs_what_it_reads(tree))
    } == {}


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "torch.load(x)", "eval(x)", "import dill.a"],
)
def test_the_search_for_what_can_run_finds_it(text: str) -> None:
    assert runs_what_it_reads(ast.parse(text))
