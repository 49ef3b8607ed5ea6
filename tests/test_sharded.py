"""Checkpoints in several files: every command that writes makes them, every command that reads
takes them, and nothing comes out different."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import make
import pytest
import torch

from bench import large, memory
from cq.cli.main import run
from cq.cli.output import Terminal
from cq.core import shards, write

LAYER = "blocks.0.attn.qkv"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def cq(*argv: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    code = run([str(word) for word in argv], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as one file and as three, a tuned one, a LoRA, a quantized file and manifests."""
    found = tmp_path_factory.mktemp("sharded")
    tensors = make.model(blocks=2)
    make.save(found / "one.safetensors", tensors)
    make.save_shards(found / "several", tensors, count=3)
    tuned = {n: t + 0.01 if n == f"{LAYER}.weight" else t for n, t in tensors.items()}
    make.save(found / "tuned.safetensors", tuned)
    make.save_shards(found / "tuned", tuned, count=2)
    lora = {
        f"diffusion_model.{LAYER}.lora_A.weight": make.weight(4, 64),
        f"diffusion_model.{LAYER}.lora_B.weight": make.weight(192, 4),
    }
    make.save(found / "lora.safetensors", lora)
    for source, name in (("one.safetensors", "one"), ("several", "several")):
        done = cq("quant", found / source, "--format", "float8_e4m3fn", "--defer")
        assert done.code == 0, done.err
        (found / f"{name}.plan").write_text(done.out)
    assert cq("run", found / "one.plan", "-o", found / "fp8.safetensors").code == 0
    sharded = cq(
        *("edit", found / "fp8.safetensors", "--max-shard-size", "30kB"),
        *("-o", found / "fp8" / "m.safetensors"),
    )
    assert sharded.code == 5  # a directory that is not there
    (found / "fp8").mkdir()
    sharded = cq(
        *("edit", found / "fp8.safetensors", "--max-shard-size", "30kB"),
        *("-o", found / "fp8" / "m.safetensors"),
    )
    assert sharded.code == 0, sharded.err
    return found


def loaded(index: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index names, read by safetensors, file by file."""
    placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {name: make.load(index.parent / name) for name in set(placed.values())}
    assert sum(map(len, files.values())) == len(placed)
    return {name: files[shard][name] for name, shard in placed.items()}


WRITING = {
    "quant": ("quant", "one.safetensors", "--format", "nvfp4"),
    "merge": ("merge", "one.safetensors", "lora.safetensors:0.5"),
    "extract": ("merge", "--extract", "tuned.safetensors", "--from", "one.safetensors"),
    "edit": ("edit", "one.safetensors", "--cast", "blocks.*=fp16"),
    "run": ("run", "one.plan"),
}


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_every_command_that_writes_makes_several_files_of_the_same_tensors(
    words: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    one, index = tmp_path / "one.safetensors", tmp_path / "s.safetensors.index.json"
    whole = cq(*words, "-o", one, "--json")
    assert whole.code == 0, whole.err
    limit = one.stat().st_size // 3
    asked = (*words, "--max-shard-size", f"{limit}B")

    planned = cq(*asked, "-o", tmp_path / "s.safetensors", "--dry-run")
    assert planned.code == 0, planned.err
    done = cq(*asked, "-o", tmp_path / "s.safetensors")
    assert done.code == 0, done.err
    assert "ComfyUI reads single files only" in done.err
    files = sorted(tmp_path.glob("s-*.safetensors"))
    assert len(files) > 1
    assert f"become {len(files)} files of up to" in planned.out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [one.name, index.name, *(p.name for p in files)]
    )
    made = make.load(one)
    found = loaded(index)
    assert found.keys() == made.keys()
    assert all(make.same(made[name], found[name]) for name in made)

    # The manifest that goes on names the index, and reads as what was written.
    (tmp_path / "passed.json").write_text(done.out)
    again = cq("run", tmp_path / "passed.json", "-o", tmp_path / "again.safetensors")
    assert again.code == 0, again.err
    rejoined = make.load(tmp_path / "again.safetensors")
    assert all(make.same(made[name], rejoined[name]) for name in made)


READING = {
    "analyze": ("analyze", "{one}", "--json"),
    "analyze deep": ("analyze", "{one}", "--deep", "--json", "--among", "nvfp4"),
    "template": ("template", "{one}"),
    "verify": ("verify", "{fp8}", "--against", "{one}", "--json"),
    "quant": ("quant", "{one}", "--format", "nvfp4", "-o", "{out}"),
    "merge": ("merge", "{one}", "lora.safetensors", "-o", "{out}"),
    "merge a model": ("merge", "{one}", "{tuned}:0.5", "-o", "{out}"),
    "extract": ("merge", "--extract", "{tuned}", "--from", "{one}", "-o", "{out}"),
    "edit": ("edit", "{one}", "--remove-keys", "step", "-o", "{out}"),
    "add keys": ("edit", "{fp8}", "--add-keys", "{one}:step", "--replace", "-o", "{out}"),
    "run": ("run", "{plan}", "-o", "{out}"),
    "run a share": ("run", "{plan}", "--shard", "1/1", "-o", "{out}"),
}
ONE = {
    "one": "one.safetensors",
    "tuned": "tuned.safetensors",
    "fp8": "fp8.safetensors",
    "plan": "one.plan",
}
SEVERAL = {
    "one": "several/model.safetensors.index.json",
    "tuned": "tuned",
    "fp8": "fp8/m.safetensors.index.json",
    "plan": "several.plan",
}


@pytest.mark.parametrize("words", READING.values(), ids=READING)
def test_every_command_that_reads_takes_an_index_for_the_file(
    words: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    outputs, told = [], []
    for inputs in (ONE, SEVERAL):
        out = tmp_path / f"{len(outputs)}.safetensors"
        done = cq(*(word.format(**inputs, out=out) for word in words))
        assert done.code == 0, done.err
        if out.exists():
            outputs.append(make.load(out))
        else:
            told.append(done.out)
    if outputs:
        one, several = outputs
        assert one.keys() == several.keys()
        assert all(make.same(one[name], several[name]) for name in one)
    else:
        one, several = (without_files(json.loads(text)) for text in told)
        assert one == several
        assert len(str(one)) > 500


def without_files(found: Any) -> Any:
    """A document without what is of the files, of their names, which the header's history has, and
    of the order of tensors in them."""
    told = {"path", "checkpoint", "files", "nbytes", "nbytes_file", "ratio", "against", "_model"}
    if isinstance(found, dict):
        return {key: without_files(value) for key, value in found.items() if key not in told}
    if isinstance(found, list):
        return sorted(map(without_files, found), key=json.dumps)
    return found


def test_shards_are_computed_where_the_options_say(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, int | None]] = []

    class Written(write.Written):
        __slots__ = ()

    def watched(*args: Any, **given: Any) -> write.Written:
        seen.append((given["device"], given["streaming_mode"], given["vram_limit"]))
        done = write.write(*args, **{**given, "device": "cpu"})
        fields = {n: getattr(done, n) for n in done.__dataclass_fields__}
        return Written(**{**fields, "retreated": (f"layer {len(seen)}",)})

    monkeypatch.setattr(shards, "write", watched)
    checkpoint = shards.manifest.open_checkpoint(place / "one.safetensors")
    done = shards.write_shards(
        checkpoint,
        tmp_path / "s.safetensors",
        max_bytes=100_000,
        device="cuda:1",
        streaming_mode="minimal",
        vram_limit=7,
    )
    assert len(seen) > 1
    assert set(seen) == {("cuda:1", "minimal", 7)}
    assert set(done.retreated) == {f"layer {n + 1}" for n in range(len(seen))}


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--shard", "1/2"), "shares fill one file"),
    ],
)
def test_several_files_exclude_what_fills_one(
    more: tuple[str, ...], word: str, place: Path, tmp_path: Path
) -> None:
    done = cq(
        *("run", place / "one.plan", "--max-shard-size", "1kB"),
        *("-o", tmp_path / "s.safetensors", *more),
    )
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert word in done.err


def test_name_that_is_no_text_is_refused_before_any_work_where_a_manifest_would_name_it(
    place: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path / "o") + b"\xff.safetensors")
    base = place / "one.safetensors"
    plan = place / "one.plan"
    for words in (
        ("edit", base, "--remove-keys", "step", "-o", name),
        ("run", plan, "-o", name, "--shard", "1/1"),
        ("edit", base, "--max-shard-size", "1kB", "-o", name, "--json"),
    ):
        done = cq(*words)
        assert (done.code, done.out, list(tmp_path.iterdir())) == (2, "", [])
        assert "is not UTF-8 text" in done.err
    done = cq("run", plan, "-o", name, "--json")
    assert done.code == 0, done.err
    assert [os.fsencode(p) for p in tmp_path.iterdir()] == [os.fsencode(name)]


# Large ones ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of 20 GB in four files, all holes but for the headers."""
    found = tmp_path_factory.mktemp("huge")
    index = large.make(found, blocks=(16, 32), shard_bytes=5_500_000_000)
    files = sorted(found.glob("*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) > 20e9
    assert sum(path.stat().st_blocks for path in files) * 512 < 1e6
    return index


def read_so_far() -> int:
    """Bytes that this process has read by system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process reads")
@pytest.mark.parametrize(
    "words",
    [("analyze", "--json"), ("template",), ("quant", "--dry-run", "--json"), ("quant", "--defer")],
    ids=" ".join,
)
def test_plan_of_a_huge_checkpoint_reads_headers_alone(
    words: tuple[str, ...], huge: Path, place: Path
) -> None:
    command, *more = words
    assert cq(command, place / "one.safetensors", *more).code == 0  # and imports what it needs
    headers = sum(
        8 + int.from_bytes(path.open("rb").read(8), "little")
        for path in huge.parent.glob("*.safetensors")
    )
    before = read_so_far()
    done = cq(command, huge, *more)
    assert done.code == 0, done.err
    allowed = headers + huge.stat().st_size + 4 * (1 << 20)  # samples, by which a file is known
    assert headers < read_so_far() - before < allowed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a peak that begins anew")
def test_share_of_a_huge_checkpoint_takes_no_more_memory_than_that_of_a_small_one(
    huge: Path, tmp_path: Path
) -> None:
    """A few layers of it, since an output is reserved as a whole; the plan is of all."""
    tiny = make.save(tmp_path / "tiny.safetensors", make.model(blocks=1))
    kept = cq("edit", huge, "--keep-keys", "double_blocks.1[0-2].img_attn.*")
    (tmp_path / "kept.json").write_text(kept.out)
    plan = cq("quant", tmp_path / "kept.json", "--defer")
    assert plan.code == 0, plan.err
    (tmp_path / "plan.json").write_text(plan.out)
    out = tmp_path / "out.safetensors"
    taken = memory.growth(
        ["quant", str(tiny), "-o", str(tmp_path / "warm.safetensors"), "-q"],
        [
            *("run", str(tmp_path / "plan.json"), "-o", str(out), "--shard", "1/2", "-q"),
            *("--memory-limit", "100MB"),
        ],
    )
    assert 8_000_000 < taken < memory.ALLOWED * 100_000_000
    assert cq("run", tmp_path / "plan.json", "-o", out, "--shard", "2/2").code == 0
    made = make.load(out)
    assert made["double_blocks.11.img_attn.qkv.weight"].shape == (9216, 3072)
    assert not any(bool(tensor.any()) for name, tensor in made.items() if name.endswith(".weight"))
