"""Manifests: a checkpoint as JSON and back; what is refused; the history that files carry."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import make
import orjson
import pytest
import torch

import cq
import cq_quant
from cq.core import catalog, manifest
from cq.core.errors import CqError, InputError, PlanError
from cq.core.manifest import HISTORY_KEY, load, open_checkpoint_stream, work_digest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(), {"format": "pt"})


def line(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document) + b"\n"


def manifest_of(base: Path, *stages: dict[str, Any], **changes: Any) -> bytes:
    return line({**cq.open(base).manifest(), "stages": list(stages), **changes})


def refused(raw: bytes, kind: type[CqError] = InputError) -> CqError:
    with pytest.raises(kind) as caught:
        load(raw, where="stdin")
    return caught.value


# There and back ---------------------------------------------------------------------------------


def test_manifest_of_a_file_has_a_readable_shape(base: Path) -> None:
    document = cq.open(base).manifest()
    assert list(document) == ["cq", "kind", "source", "stages"]
    assert (document["cq"], document["kind"], document["stages"]) == (1, "checkpoint", [])
    (source,) = document["source"]
    assert str(base.resolve()) == source["path"]
    assert base.stat().st_size == source["nbytes"]
    assert sorted(source) == ["header", "nbytes", "path", "sample"]


def test_manifest_loads_an_equal_checkpoint(base: Path, tmp_path: Path) -> None:
    model = cq_quant.quantize(
        cq.open(base), optimizer="rtn", scaling="tensor", skip=["*.mlp.2"], save_quant_metadata=True
    )
    again = load(line(model.manifest()), where="stdin")
    assert model.specs == again.specs
    assert model.metadata == again.metadata
    assert model.notes == again.notes
    assert model.manifest() == again.manifest()
    assert work_digest(model) == work_digest(again)
    first = cq.write(model, tmp_path / "a.safetensors")
    second = cq.write(again, tmp_path / "b.safetensors")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_manifest_of_shards_loads_an_equal_checkpoint(tmp_path: Path) -> None:
    index = make.save_shards(tmp_path / "model", make.model())
    model = cq.open(index.parent)
    again = load(line(model.manifest()), where="stdin")
    assert model.specs == again.specs
    assert model.manifest() == again.manifest()


def test_manifest_file_and_pipe_are_one_checkpoint(base: Path, tmp_path: Path) -> None:
    model = cq_quant.quantize(cq.open(base))
    path = tmp_path / "plan.json"
    path.write_bytes(b"\n " + line(model.manifest()))
    piped = open_checkpoint_stream(io.BytesIO(line(model.manifest())))
    assert model.manifest() == cq.open(path).manifest() == piped.manifest()


def test_manifest_of_a_relative_path_can_be_opened_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    raw = line(cq.open(base.name).manifest())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cq.open(base).specs == load(raw, where="stdin").specs


def test_manifest_keeps_unknown_keys(base: Path) -> None:
    raw = manifest_of(base, future={"deep": [1, 2]}, note="by hand")
    opened = load(raw, where="stdin")
    assert opened.manifest()["future"] == {"deep": [1, 2]}
    after = cq_quant.quantize(opened).manifest()
    assert (after["future"], after["note"]) == ({"deep": [1, 2]}, "by hand")
    assert [stage["op"] for stage in after["stages"]] == ["quant"]


def test_manifest_of_a_written_file_names_it(base: Path, tmp_path: Path) -> None:
    written = cq.write(cq_quant.quantize(cq.open(base)), tmp_path / "out.safetensors")
    document = written.manifest()
    assert str((tmp_path / "out.safetensors").resolve()) == document["source"][0]["path"]
    assert document["stages"] == []
    assert written.digest == document["digest"]
    opened = load(line(document), where="stdin")
    assert "digest" not in opened.manifest()
    assert make.load(written.path).keys() == opened.specs.keys()


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a manifest"),
        (b"{", "not a manifest"),
        (b"{'cq': 1}", "not a manifest"),
        (b"\xff", "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (b"[]", "no `cq` version"),
        (b"1", "no `cq` version"),
        (b'"cq"', "no `cq` version"),
        (b'{"kind": "checkpoint"}', "no `cq` version"),
        (b'{"cq": 1}', "kind is `None`"),
        (b'{"cq": 1, "kind": "report"}', "kind is `report`"),
        (b'{"cq": 1, "kind": "checkpoint"}', "one entry in `source`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": []}', "one entry in `source`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": {}}', "one entry in `source`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [1]}', "no `path`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [{}]}', "no `path`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [{"path": 3}]}', "no `path`"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [{"path": "/none/x"}]}', "does not exist"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [{"path": "a\\u0000b"}]}', "a"),
        (b'{"cq": 1, "kind": "checkpoint", "source": [{"path": ""}], "stages": 1}', "`stages`"),
    ],
)
def test_load_refuses_what_is_no_manifest(raw: bytes, words: str) -> None:
    error = refused(raw)
    assert error.exit_code == 3
    assert words in error.message


def test_load_refuses_two_manifests_in_one(base: Path) -> None:
    assert "not a manifest" in refused(manifest_of(base) * 2).message


@pytest.mark.parametrize("version", [2, 99, "2", None, 1.5, [1]])
def test_load_refuses_another_version_by_name(version: Any, base: Path) -> None:
    error = refused(manifest_of(base, cq=version))
    assert error.code == "input.manifest_version"
    assert f"version `{version}`" in error.message


def test_load_refuses_a_changed_source(base: Path) -> None:
    raw = line(cq_quant.quantize(cq.open(base)).manifest())
    tensors = make.model()
    tensors["final_layer.linear.weight"] += 1
    make.save(base, tensors, {"format": "pt"})
    error = refused(raw, PlanError)
    assert (error.exit_code, error.code) == (4, "plan.source_changed")
    assert str(base) in error.message


def test_load_refuses_a_source_that_has_grown(base: Path) -> None:
    raw = manifest_of(base)
    make.save(base, {**make.model(), "more": torch.ones(1)}, {"format": "pt"})
    assert refused(raw, PlanError).code == "plan.source_changed"


def test_load_refuses_an_unknown_stage_with_near_names(base: Path) -> None:
    error = refused(manifest_of(base, {"op": "qaunt"}), PlanError)
    assert "there is no stage `qaunt`" in error.message
    assert "`quant`" in (error.hint or "")


@pytest.mark.parametrize("stage", [1, [], "quant", {}, {"op": 1}, {"format": "int8_tensorwise"}])
def test_load_refuses_a_stage_without_an_op(stage: Any, base: Path) -> None:
    assert "no `op`" in refused(manifest_of(base, stage)).message


def test_load_refuses_an_unknown_stage_argument_with_near_names(base: Path) -> None:
    error = refused(manifest_of(base, {"op": "quant", "optimiser": "rtn"}))
    assert "no argument `optimiser`" in error.message
    assert "`optimizer`" in (error.hint or "")


@pytest.mark.parametrize(
    "argument",
    [
        {"format": 8},
        {"only": "blocks.*"},
        {"only": [1]},
        {"save_quant_metadata": "yes"},
        {"save_quant_metadata": 1},
        {"scaling": 3},
        {"rules": "x"},
        {"optimizer": ["rtn"]},
    ],
)
def test_load_refuses_a_stage_argument_of_the_wrong_type(
    argument: dict[str, Any], base: Path
) -> None:
    assert (
        f"`{next(iter(argument))}`"
        in refused(manifest_of(base, {"op": "quant", **argument})).message
    )


@pytest.mark.parametrize(
    "argument",
    [
        {"format": "int9"},
        {"optimizer": "best"},
        {"scaling": "block"},
        {"rotate": "7"},
        {"optimizer": "quip", "rotate": "off"},
        {"only": ["nothing.*"]},
        {"only": ["re:("]},
    ],
)
def test_load_refuses_a_stage_argument_with_no_such_value(
    argument: dict[str, Any], base: Path
) -> None:
    error = refused(manifest_of(base, {"op": "quant", **argument}), CqError)
    assert error.exit_code in {2, 3, 4}
    assert f"`{next(iter(argument.values()))}`".strip("[]'`") in error.message or error.hint


def test_load_checks_only_the_fingerprints_that_are_there(base: Path) -> None:
    """A manifest written by hand needs a path and no digests."""
    raw = manifest_of(base, source=[{"path": str(base)}])
    assert cq.open(base).specs == load(raw, where="stdin").specs


# Work digests -----------------------------------------------------------------------------------


def test_work_digest_tells_stages_apart(base: Path) -> None:
    source = cq.open(base)
    digests = {
        work_digest(source),
        work_digest(cq_quant.quantize(source)),
        work_digest(cq_quant.quantize(source, optimizer="rtn")),
        work_digest(cq_quant.quantize(source, scaling="tensor")),
        work_digest(cq_quant.quantize(source, skip=["*.mlp.0"])),
    }
    assert len(digests) == 5


def test_work_digest_names_the_work_not_the_hour(base: Path) -> None:
    before = work_digest(cq.open(base))
    stat = base.stat()
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert before == work_digest(cq.open(base))


# History ----------------------------------------------------------------------------------------


def history(path: Path) -> dict[str, Any]:
    return json.loads(make.metadata(path)[HISTORY_KEY])


def test_history_of_a_copy_is_not_written(base: Path, tmp_path: Path) -> None:
    """A copy without stages is the same file, so it says no more than that file did."""
    cq.write(cq.open(base), tmp_path / "copy.safetensors")
    assert make.metadata(tmp_path / "copy.safetensors") == {"format": "pt"}
    assert base.read_bytes() == (tmp_path / "copy.safetensors").read_bytes()


def test_history_names_sources_and_stages_without_absolute_paths(
    base: Path, tmp_path: Path
) -> None:
    model = cq_quant.quantize(
        make.NothingStage("/home/me/secret/a.safetensors").apply(cq.open(base))
    )
    written = cq.write(model, tmp_path / "out.safetensors")
    text = make.metadata(written.path)[HISTORY_KEY]
    assert str(tmp_path) not in text
    assert "secret" not in text
    record = history(written.path)
    assert [source["name"] for source in record["sources"]] == ["base.safetensors"]
    assert [stage["op"] for stage in record["stages"]] == ["nothing", "quant"]
    assert record["stages"][0]["adapters"] == [{"name": "a.safetensors", "strength": 0.5}]
    assert {cq.__version__} == {stage["version"] for stage in record["stages"]}


def test_history_is_the_same_through_an_intermediate_file(base: Path, tmp_path: Path) -> None:
    """Fused or staged, the output is the same to the byte."""
    stage = make.NothingStage()
    fused = cq.write(cq_quant.quantize(stage.apply(cq.open(base))), tmp_path / "fused.safetensors")
    middle = cq.write(stage.apply(cq.open(base)), tmp_path / "middle.safetensors")
    staged = cq.write(cq_quant.quantize(cq.open(middle.path)), tmp_path / "staged.safetensors")
    assert make.metadata(fused.path) == make.metadata(staged.path)
    assert fused.path.read_bytes() == staged.path.read_bytes()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "not json", '{"sources": 1, "stages": []}', '{"stages": [], "cq": 1}'],
)
def test_history_that_is_not_ours_is_replaced(text: str, tmp_path: Path) -> None:
    path = make.save(tmp_path / "a.safetensors", make.model(), {HISTORY_KEY: text})
    written = cq.write(make.NothingStage().apply(cq.open(path)), tmp_path / "out.safetensors")
    record = history(written.path)
    assert [source["name"] for source in record["sources"]] == ["a.safetensors"]
    assert [stage["op"] for stage in record["stages"]] == ["nothing"]


def test_history_nested_too_deep_does_not_stop_the_work(tmp_path: Path) -> None:
    """A file's metadata is data: whatever stands in it, the weights can still be worked on."""
    deep = '{"sources": [%s], "stages": []}' % ("[" * 300 + "]" * 300)
    path = make.save(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {HISTORY_KEY: deep})
    cq.write(make.NothingStage().apply(cq.open(path)), tmp_path / "out.safetensors")
    assert list(make.load(tmp_path / "out.safetensors")) == ["a"]


def test_stage_document_round_trips_every_stage_of_the_catalogue(base: Path) -> None:
    stage = catalog.load("stages", "quant")()
    document = manifest.stage_document(stage)
    assert document["op"] == "quant"
    arguments = {k: v for k, v in json.loads(json.dumps(document)).items() if k != "op"}
    assert stage == catalog.load("stages", "quant").from_arguments(arguments)
