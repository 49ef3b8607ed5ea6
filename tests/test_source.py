"""Sources: cuts, rows equal to torch's slices, shards, truncation, fingerprints, refusals."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cq
from cq.core import source as sources
from cq.core.dtypes import TensorSpec
from cq.core.errors import CqError, InputError, PlanError, ResourceError
from cq.core.manifest import open_checkpoint_stream
from cq.core.source import check_fingerprint, cuts, largest_cut, open_source

TILE = 128


def refused(path: Path) -> InputError:
    """The error for opening `path`, which exits with 3 and names a file."""
    with pytest.raises(InputError) as caught:
        cq.open(path)
    assert caught.value.exit_code == 3
    return caught.value


# Cuts -------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 9), st.sampled_from([127, 128, 129, 4096, 5000, 200_000]))


@given(st.lists(SIZES, max_size=4))
def test_cuts_cover_every_row_once_in_order(shape: list[int]) -> None:
    spec = TensorSpec("BF16", tuple(shape))
    at = 0
    for start, stop in cuts(spec):
        assert at == start
        assert stop > start
        at = stop
    assert at == (shape[0] if shape else 1)


@given(st.integers(1, 300_000), st.integers(1, 1 << 17))
def test_cuts_never_split_a_tile_of_128_rows(rows: int, columns: int) -> None:
    for start, stop in cuts(TensorSpec("F32", (rows, columns))):
        assert start % TILE == 0
        assert stop % TILE == 0 or stop == rows


@given(st.integers(1, 100_000), st.integers(1, 1 << 24))
def test_cuts_bound_a_segment(rows: int, columns: int) -> None:
    """16 Mi elements at most, or one row where a row alone is more than a tile should be."""
    spec = TensorSpec("F32", (rows, columns))
    sizes = [(stop - start) * columns for start, stop in cuts(spec)]
    assert max(sizes) == largest_cut(spec)
    assert largest_cut(spec) <= max(columns, 1 << 24)


def test_cuts_of_a_scalar_are_one_segment() -> None:
    assert list(cuts(TensorSpec("F32", ()))) == [(0, 1)]
    assert largest_cut(TensorSpec("F32", ())) == 1


def test_cuts_depend_on_the_shape_alone() -> None:
    shape = (5000, 3000)
    assert list(cuts(TensorSpec("I8", shape))) == list(cuts(TensorSpec("F64", shape)))


# Rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", make.TORCH_DTYPES)
def test_rows_equal_the_slices_of_torch(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "odd": make.noise("U8", (3,)),
        "matrix": make.noise(dtype, (7, 5)),
        "five": make.noise(dtype, (4, 1, 3, 2, 2)),
        "vector": make.noise(dtype, (9,)),
        "scalar": make.noise(dtype, ()),
        "no rows": make.noise(dtype, (0, 3)),
        "no columns": make.noise(dtype, (3, 0)),
    }
    file = open_source(make.save(tmp_path / "a.safetensors", tensors)).files[0]
    for name, expected in tensors.items():
        rows = expected.shape[0] if expected.shape else 1
        for start in range(rows + 1):
            for stop in range(start, rows + 1) if expected.shape else [1]:
                part = expected[start:stop] if expected.shape else expected
                assert make.same(part, file.rows(name, 0 if not expected.shape else start, stop))


def test_rows_read_data_that_is_not_aligned(tmp_path: Path) -> None:
    """Only safetensors' own writer pads headers and sorts by width; others are valid files too."""
    value = make.noise("F64", (3, 2))
    path = tmp_path / "a.safetensors"
    header = {"a": make.entry("U8", [3], 0, 3), "b": make.entry("F64", [3, 2], 3, 51)}
    raw = json.dumps(header).encode()
    raw += b" " * ((4 - len(raw)) % 8)
    path.write_bytes(make.file_bytes(raw, b"abc" + make.bits(value)))
    checkpoint = cq.open(path)
    assert make.same(value, checkpoint.read("b"))
    assert make.same(value[1:2], open_source(path).files[0].rows("b", 1, 2))
    assert checkpoint.read("a").tolist() == [97, 98, 99]


def test_rows_are_memory_of_their_own(tmp_path: Path) -> None:
    file = open_source(make.save(tmp_path / "a.safetensors", {"a": torch.ones(4)})).files[0]
    file.rows("a", 0, 4).zero_()
    assert torch.equal(torch.ones(4), file.rows("a", 0, 4))


def test_rows_of_a_dtype_that_torch_lacks_are_a_resource_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(make.file_bytes({"a": make.entry("F6_E2M3", [4], 0, 3)}, b"abc"))
    with pytest.raises(ResourceError, match="`F6_E2M3`"):
        cq.open(path).read("a")


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (), (1, 0, 3)])
def test_checkpoint_reads_tensors_of_any_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    value = make.noise("F32", shape)
    checkpoint = cq.open(make.save(tmp_path / "a.safetensors", {"a": value}))
    assert make.same(value, checkpoint.read("a"))


def test_checkpoint_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {"tall": make.noise("BF16", (40_000, 64)), "scalar": make.noise("F16", ())}
    checkpoint = cq.open(make.save(tmp_path / "a.safetensors", tensors))
    assert len(list(checkpoint.pieces("tall"))) == 3
    read = checkpoint.read_many(tensors)
    assert list(tensors) == list(read)
    for name, expected in tensors.items():
        assert make.same(expected, read[name])


@pytest.mark.parametrize("cut", [1, 100, 4000])
def test_a_file_truncated_after_opening_is_an_input_error_when_read(
    cut: int, tmp_path: Path
) -> None:
    path = make.save(tmp_path / "a.safetensors", {"weight": torch.ones(1000)})
    checkpoint = cq.open(path)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(InputError, match="`weight`") as caught:
        checkpoint.read("weight")
    assert caught.value.code == "input.truncated"
    assert str(path) in caught.value.message


@pytest.mark.parametrize("kernel", [True, False])
def test_a_file_truncated_after_opening_is_an_input_error_when_copied(
    kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    path = make.save(tmp_path / "a.safetensors", {"weight": torch.ones(1000)})
    checkpoint = cq.open(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match="`weight`") as caught:
        cq.write(checkpoint, tmp_path / "out.safetensors")
    assert caught.value.code == "input.truncated"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# Shards and directories -------------------------------------------------------------------------


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": make.weight(4, 3, seed=i) for i in range(5)}


@pytest.fixture
def index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return make.save_shards(tmp_path / "model", tensors, metadata={"format": "pt"})


def test_open_source_reads_shards_as_one(index: Path, tensors: dict[str, torch.Tensor]) -> None:
    for path in (index, index.parent):
        checkpoint = cq.open(path)
        assert tensors.keys() == checkpoint.specs.keys()
        assert checkpoint.metadata == {"format": "pt"}
        assert len(checkpoint.inputs) == 2
        for name, expected in tensors.items():
            assert make.same(expected, checkpoint.read(name))


def test_open_source_takes_a_directory_with_one_file(tmp_path: Path) -> None:
    make.save(tmp_path / "only.safetensors", {"a": torch.ones(2)})
    (tmp_path / "config.json").write_text("{}")
    assert list(cq.open(tmp_path).specs) == ["a"]


def test_open_source_refuses_a_directory_without_files(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert "holds no safetensors file" in error.message
    assert str(tmp_path) in error.message


def test_open_source_asks_which_file_of_a_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make.save(tmp_path / f"{name}.safetensors", {"a": torch.ones(2)})
    error = refused(tmp_path)
    assert error.code == "input.ambiguous"
    assert "`a.safetensors`, `b.safetensors`" in (error.hint or "")


def rewrite(index: Path, **changes: Any) -> None:
    document = json.loads(index.read_text())
    document["weight_map"] |= changes
    index.write_text(json.dumps(document))


def test_index_with_a_missing_shard_is_refused(index: Path) -> None:
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    error = refused(index)
    assert "model-00002-of-00002.safetensors` does not exist" in error.message


def test_index_with_a_missing_tensor_is_refused(index: Path) -> None:
    rewrite(index, ghost="model-00001-of-00002.safetensors")
    assert "`ghost`" in refused(index).message


def test_index_with_a_tensor_in_the_wrong_shard_is_refused(index: Path) -> None:
    rewrite(index, **{"layer.0.weight": "model-00002-of-00002.safetensors"})
    assert "`layer.0.weight`" in refused(index).message


def test_index_without_a_tensor_of_its_shards_is_refused(index: Path) -> None:
    document = json.loads(index.read_text())
    del document["weight_map"]["layer.3.weight"]
    index.write_text(json.dumps(document))
    error = refused(index)
    assert "`layer.3.weight`" in error.message
    assert error.hint


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "/etc/absolute.safetensors",
        "model.bin",
        "..",
        "",
        "a\0b.safetensors",
        "a\ud800b.safetensors",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_index_with_anything_but_a_name_beside_it_is_refused(shard: Any, index: Path) -> None:
    make.save(index.parent.parent / "outside.safetensors", {"layer.0.weight": torch.ones(1)})
    rewrite(index, **{"layer.0.weight": shard})
    error = refused(index)
    assert error.message.isprintable()


@pytest.mark.parametrize("shard", ["../x.safetensors", "sub/x.safetensors", "{}/x.safetensors"])
def test_index_never_leads_out_of_its_directory(shard: str, tmp_path: Path) -> None:
    """Although the file is there and holds just what the index says."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path, directory / "sub"):
        make.save(place / "x.safetensors", {"a": torch.ones(1)})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.format(tmp_path)}}))
    assert "not the name of a safetensors file beside it" in refused(index).message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[1]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_index_that_is_no_index_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    assert str(path) in refused(path).message


# Fingerprints -----------------------------------------------------------------------------------


def test_fingerprints_of_equal_files_are_equal(tmp_path: Path) -> None:
    tensors = make.model()
    first = open_source(make.save(tmp_path / "a.safetensors", tensors))
    second = open_source(make.save(tmp_path / "b.safetensors", tensors))
    assert first.fingerprint() == second.fingerprint()
    check_fingerprint(second, first.fingerprint())


@pytest.mark.parametrize("at", [0, 1, 500_000, -1])
def test_fingerprint_differs_when_a_sampled_weight_changes(at: int, tmp_path: Path) -> None:
    """The first and last KiB of the data are samples, and so are 62 places between them."""
    value = torch.zeros(1_000_001)
    before = open_source(make.save(tmp_path / "a.safetensors", {"a": value})).fingerprint()
    span = 4 * len(value) - 1024
    value[at if at in (0, -1) else (span * (1 if at == 1 else 32) // 63) // 4 + 1] = 1
    after = open_source(make.save(tmp_path / "b.safetensors", {"a": value})).fingerprint()
    assert before["header"] == after["header"]
    assert before["sample"] != after["sample"]


def test_fingerprint_differs_when_every_weight_changes_a_little(tmp_path: Path) -> None:
    value = make.weight(300, 300)
    before = open_source(make.save(tmp_path / "a.safetensors", {"a": value})).fingerprint()
    after = open_source(make.save(tmp_path / "b.safetensors", {"a": value * 1.01})).fingerprint()
    assert before["sample"] != after["sample"]


def test_fingerprint_differs_when_the_size_changes(tmp_path: Path) -> None:
    one = open_source(make.save(tmp_path / "a.safetensors", {"a": torch.zeros(4)}))
    two = open_source(make.save(tmp_path / "b.safetensors", {"a": torch.zeros(5)}))
    for key in ("nbytes", "header"):
        assert one.fingerprint()[key] != two.fingerprint()[key]
    with pytest.raises(PlanError, match="has changed"):
        check_fingerprint(two, one.fingerprint())


def test_fingerprint_of_shards_covers_every_shard(index: Path, tmp_path: Path) -> None:
    before = open_source(index).fingerprint()
    shard = index.parent / "model-00002-of-00002.safetensors"
    make.save(
        shard, {name: value + 1 for name, value in make.load(shard).items()}, {"format": "pt"}
    )
    after = open_source(index).fingerprint()
    assert before["header"] == after["header"]
    assert before["sample"] != after["sample"]


# What is not a checkpoint -----------------------------------------------------------------------


def test_open_offers_near_file_names(tmp_path: Path) -> None:
    make.save(tmp_path / "flux-dev.safetensors", {"a": torch.ones(1)})
    error = refused(tmp_path / "flux-deb.safetensors")
    assert "does not exist" in error.message
    assert "`flux-dev.safetensors`" in (error.hint or "")


def test_open_in_a_missing_directory_is_an_input_error(tmp_path: Path) -> None:
    assert refused(tmp_path / "none" / "a.safetensors").hint is None


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(64), "pickle"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9" + bytes(64), "pickle"),
        (b"\x7fELF\x02\x01\x01\x01" + bytes(64), "safetensors"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    ],
    ids=["gguf", "zip", "pickle", "elf", "html", "lfs"],
)
def test_open_says_what_another_format_is(raw: bytes, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    error = refused(path)
    assert str(path) in error.message
    assert hint in (error.hint or "")


def test_open_refuses_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    assert "has 0 bytes" in refused(path).message


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="this system has no /dev/null")
def test_open_refuses_the_null_device() -> None:
    assert "/dev/null" in refused(Path("/dev/null")).message


def test_open_refuses_a_directory_named_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.mkdir()
    refused(path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_open_says_why_a_file_is_unreadable(tmp_path: Path) -> None:
    path = make.save(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    path.chmod(0)
    error = refused(path)
    assert error.code == "input.unreadable"
    assert "permission denied" in error.message


@pytest.mark.parametrize("name", ["nul\0byte.safetensors", "x" * 300 + ".safetensors"])
def test_open_refuses_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name)


def test_open_reads_a_file_whose_name_is_not_text(tmp_path: Path) -> None:
    """File names on Linux are bytes; such a file opens, and its work can be named and written."""
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    try:
        make.save(path, {"a": torch.ones(2)})
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only names in UTF-8")
    checkpoint = make.NothingStage().apply(cq.open(path))
    cq.write(checkpoint, tmp_path / "out.safetensors")
    assert torch.equal(torch.ones(2), make.load(tmp_path / "out.safetensors")["a"])


# Streams ----------------------------------------------------------------------------------------


def pipe_of(raw: bytes) -> io.BufferedReader:
    """The reading end of a real pipe; `raw` must fit a pipe's buffer."""
    read, write = os.pipe()
    with os.fdopen(write, "wb") as end:
        end.write(raw)
    return os.fdopen(read, "rb")


def test_stream_from_a_pipe_is_a_checkpoint(tmp_path: Path) -> None:
    tensors = make.model(blocks=1, dim=8)
    raw = make.save(tmp_path / "a.safetensors", tensors, {"format": "pt"}).read_bytes()
    with pipe_of(raw) as pipe:
        checkpoint = open_checkpoint_stream(pipe)
    assert checkpoint.metadata == {"format": "pt"}
    for name, expected in tensors.items():
        assert make.same(expected, checkpoint.read(name))
    with pytest.raises(CqError) as caught:
        checkpoint.manifest()
    assert caught.value.exit_code == 2
    assert caught.value.code == "usage.stdin_bytes"


def test_stream_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make.save(tmp_path / "a.safetensors", {"a": torch.ones(3)}).read_bytes()
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(sources.tempfile, "tempdir", str(spool))
    checkpoint = open_checkpoint_stream(io.BytesIO(raw))
    assert torch.equal(torch.ones(3), checkpoint.read("a"))
    assert list(spool.iterdir()) == []


def test_stream_that_is_cut_off_is_an_input_error() -> None:
    raw = make.file_bytes({"a": make.entry("F32", [2], 0, 8)}, bytes(8))
    for length in (1, 8, 9, 30, len(raw) - 1):
        with pytest.raises(InputError, match="stdin"):
            open_checkpoint_stream(io.BytesIO(raw[:length]))


def test_stream_that_is_empty_points_to_the_step_before() -> None:
    with pytest.raises(InputError, match="stdin is empty") as caught:
        open_checkpoint_stream(io.BytesIO())
    assert caught.value.hint


def test_stream_without_room_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make.save(tmp_path / "a.safetensors", {"a": torch.ones(3)}).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(ResourceError, match="no space left") as caught:
        open_checkpoint_stream(io.BytesIO(raw))
    assert caught.value.exit_code == 5
    assert "TMPDIR" in (caught.value.hint or "")


@pytest.fixture
def named_pipe(tmp_path: Path) -> Callable[[bytes], Path]:
    """A named pipe into which the bytes are written once somebody reads."""

    def named_pipe(raw: bytes) -> Path:
        path = tmp_path / "pipe"
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(raw,), daemon=True).start()
        return path

    return named_pipe


def test_open_reads_a_named_pipe(tmp_path: Path, named_pipe: Callable[[bytes], Path]) -> None:
    tensors = {"a": make.noise("BF16", (300, 400))}
    raw = make.save(tmp_path / "a.safetensors", tensors).read_bytes()
    assert make.same(tensors["a"], cq.open(named_pipe(raw)).read("a"))


def test_open_reads_a_manifest_from_a_named_pipe(
    tmp_path: Path, named_pipe: Callable[[bytes], Path]
) -> None:
    base = cq.open(make.save(tmp_path / "a.safetensors", {"a": torch.ones(2)}))
    pipe = named_pipe(json.dumps(base.manifest()).encode())
    assert base.manifest() == cq.open(pipe).manifest()


def test_open_refuses_a_named_pipe_that_is_cut_off(named_pipe: Callable[[bytes], Path]) -> None:
    error = refused(named_pipe(make.file_bytes({"a": make.entry("I8", [9], 0, 9)}, b"abc")))
    assert error.code == "input.truncated"
