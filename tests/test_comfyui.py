"""`cq verify --comfyui`: a workflow run with both models by a server that speaks ComfyUI's API over
real HTTP and a real websocket; every way in which it fails is one clear error."""

from __future__ import annotations

import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cq.cli import main
from cq.cli.output import Terminal
from cq.core.errors import CqError, InputError, PlanError, ResourceError, UsageError
from cq_analyze.comfyui import Server
from cq_analyze.renders import cases, prepare
from cq_analyze.workflow import Case, Place, Workflow, load_workflow
from tests.comfyui_server import GIB, comfyui
from tests.test_architecture import check


def nodes(**changes: Any) -> dict[str, Any]:
    """A workflow such as ComfyUI exports; `changes` are nodes by id, `n5`."""
    found = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.st", "weight_dtype": "x"}},
        "2": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 32, "batch_size": 1},
        },
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 7,
                "model": ["1", 0],
                "positive": ["8", 0],
                "negative": ["5", 0],
                "latent_image": ["2", 0],
            },
        },
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["6", 0]}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["6", 0]}},
        "6": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5.st", "type": "flux"}},
        "8": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["4", 0], "guidance": 3.5}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
    }
    return {**found, **{key.removeprefix("n"): value for key, value in changes.items()}}


def workflow(**changes: Any) -> Workflow:
    return Workflow(nodes(**changes), shown="w.json")


def prepared(url: str, *, runs: dict[str, Case] | None = None, timeout: float = 20) -> Any:
    return prepare(
        url,
        workflow(),
        reference="base.st",
        quantized="int8.st",
        runs=runs or cases(),
        timeout=timeout,
    )


# Runs


def test_both_models_are_run_with_all_variations_and_compared() -> None:
    with comfyui() as server:
        server.error["int8.st"] = 3
        server.seconds = {"base.st": 0.6, "int8.st": 0.05}
        server.nbytes = {"base.st": 12 * GIB, "int8.st": 7 * GIB}
        runs = cases(["a dog", "a long prompt"], [(48, 40)], [2], [1])
        told: list[str] = []
        renders, pictures = prepared(server.url, runs=runs).compare(told.append)
    made = server.prompts
    assert [p["1"]["inputs"]["unet_name"] for p in made] == ["base.st"] * 2 + ["int8.st"] * 2
    assert [p["4"]["inputs"]["text"] for p in made] == ["a dog", "a long prompt"] * 2
    assert all(p["5"]["inputs"]["text"] == "blurry" for p in made)
    assert all(p["3"]["inputs"]["seed"] == 1 for p in made)
    assert all(p["2"]["inputs"] == {"width": 48, "height": 40, "batch_size": 2} for p in made)
    assert server.freed == 2
    assert len(pictures.pictures) == 4 and pictures.findings == ()
    assert {(p.width, p.height) for p in pictures.pictures} == {(48, 40)}
    for picture in pictures.pictures:
        assert picture.psnr == pytest.approx(20 * 2.4065402 - 9.5424251, abs=1e-4)
    assert renders.reference.seconds_per_picture == pytest.approx(0.3, abs=0.15)
    assert renders.quantized.seconds_per_picture < renders.reference.seconds_per_picture
    assert renders.speedup is not None and renders.speedup > 1.5
    assert renders.reference.nbytes_peak == 12 * GIB
    assert renders.quantized.timings[0].pictures == 2
    assert renders.device == "cuda:0 Fake GPU"
    assert len(told) == 4 and "`int8.st` 2 of 2 (prompt2-48x40-batch2-seed1)" in told[3]


def test_a_workflow_is_run_as_it_is_without_variations() -> None:
    with comfyui("new lists") as server:
        _, pictures = prepared(server.url).compare()
    assert [p.name for p in pictures.pictures] == ["as-it-is-1.png"]
    assert pictures.pictures[0].psnr == float("inf")
    expected = nodes()
    expected["1"]["inputs"]["unet_name"] = "base.st"
    assert server.prompts[0] == expected


# Failures


def test_a_server_that_is_not_there_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ResourceError, match=r"cannot talk to ComfyUI at .*refused"):
            prepared(url)


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("not ComfyUI", ResourceError, "answers something else than ComfyUI does"),
        ("full", ResourceError, "its queue is full"),
        ("refused", PlanError, "node `1`: Value not in list: unet_name: 'x' not in"),
        ("node", PlanError, r"failed in its node `3` \(KSampler\): RuntimeError: mat1 and mat2"),
        ("interrupted", ResourceError, "was interrupted"),
        ("no pictures", PlanError, "made no picture"),
        ("hangs up", ResourceError, "cannot talk to ComfyUI at"),
    ],
)
def test_each_failure_is_one_clear_error(fault: str, kind: type[CqError], told: str) -> None:
    with comfyui(fault) as server, pytest.raises(kind, match=told) as failed:
        prepared(server.url).compare()
    assert failed.value.hint or fault == "interrupted"


def test_a_run_that_takes_too_long_is_an_error() -> None:
    with comfyui("silent") as server:
        renderings = prepared(server.url, timeout=1)
        begun = time.monotonic()
        with pytest.raises(ResourceError, match="did not finish a run in 1 s"):
            renderings.compare()
        assert time.monotonic() - begun < 20


def test_a_model_that_the_server_does_not_have_is_an_error_before_any_run() -> None:
    with comfyui(models=("base.st", "int8-new.st")) as server:
        with pytest.raises(InputError, match=r"no model `int8\.st`") as failed:
            prepared(server.url)
        assert "`int8-new.st`" in (failed.value.hint or "")
        assert server.prompts == []


@pytest.mark.parametrize("url", ["127.0.0.1:8188", "ftp://x", "http://", "x"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        Server(url, timeout=1)


# Places in a workflow


def test_the_positive_prompt_is_found_through_other_nodes_and_the_negative_left_alone() -> None:
    made = workflow().made(Place("1", "unet_name"), "m", Case(prompt="x"))
    assert [made[i]["inputs"]["text"] for i in "45"] == ["x", "blurry"]
    guider = {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["8", 0]}}
    custom = {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["10", 0]}}
    noise = {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}}
    other = workflow(n3=custom, n10=guider, n11=noise)
    made = other.made(Place("1", "unet_name"), "m", Case(prompt="x", seed=9))
    assert [made[i]["inputs"]["text"] for i in "45"] == ["x", "blurry"]
    assert made["11"]["inputs"]["noise_seed"] == 9


def test_placeholders_go_before_guesses() -> None:
    any_node = {"class_type": "Any", "inputs": {"words": "%prompt%", "file": "%model%"}}
    own = workflow(n20=any_node)
    place = own.model(("a", "b"))
    assert place == Place("20", "file")
    made = own.made(place, "m", Case(prompt="x"))
    assert made["20"]["inputs"] == {"words": "x", "file": "m"}
    assert made["4"]["inputs"]["text"] == "a cat"
    assert made["1"]["inputs"]["unet_name"] == "flux.st"


def test_a_schedule_of_the_same_size_changes_with_the_latent() -> None:
    schedule = {"class_type": "Flux2Scheduler", "inputs": {"width": 64, "height": 32}}
    other = {"class_type": "ImageScale", "inputs": {"width": 8, "height": 8}}
    made = workflow(n20=schedule, n21=other).made(
        Place("1", "unet_name"), "m", Case(size=(128, 96))
    )
    assert made["20"]["inputs"] == {"width": 128, "height": 96}
    assert made["21"]["inputs"] == {"width": 8, "height": 8}


def test_of_several_loaders_the_named_one_is_meant_else_it_is_an_error() -> None:
    low = {"class_type": "UNETLoader", "inputs": {"unet_name": "low.st"}}
    both = workflow(n20=low)
    assert both.model(("low.st", "int8.st")) == Place("20", "unet_name")
    with pytest.raises(InputError, match="several models") as failed:
        both.model(("x", "y"))
    assert "%model%" in (failed.value.hint or "")


@pytest.mark.parametrize(
    ("case", "gone", "told"),
    [
        (Case(prompt="x"), "4", "no place for the prompt"),
        (Case(seed=1), "3", "no place for the seed"),
        (Case(size=(8, 8)), "2", "no place for the size"),
        (Case(batch=1), "2", "no place for the batch"),
    ],
)
def test_a_change_without_a_place_is_an_error(case: Case, gone: str, told: str) -> None:
    found = nodes()
    del found[gone]
    with pytest.raises(InputError, match=told):
        Workflow(found, shown="w").made(Place("1", "unet_name"), "m", case)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a workflow in API format"),
        (b"{}", "is not a workflow in API format"),
        (b'{"1": {"inputs": {}}}', "is not a workflow in API format"),
        (b'{"nodes": [], "links": []}', "is in the form of ComfyUI's editor"),
    ],
)
def test_a_file_that_is_no_workflow_is_an_error(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "w.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=told):
        load_workflow(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_workflow(tmp_path / "none.json")


# The command


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = main.run([*map(str, argv)], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return code, out.getvalue(), err.getvalue()


def test_the_command_reports_speed_memory_and_pictures(tmp_path: Path) -> None:
    path, words = tmp_path / "w.json", tmp_path / "prompts.txt"
    path.write_text(json.dumps(nodes()))
    words.write_text("a dog\n\n  a bird \n")
    given = ["--workflow", path, "--reference-name", "base.st", "--model-name", "int8.st"]
    given += ["--prompts", words, "--sizes", "32x16", "--seeds", "1"]
    with comfyui() as server:
        server.error["int8.st"] = 9
        sheet = tmp_path / "s.png"
        code, out, err = run(
            "verify", "--comfyui", server.url, *given, "--min-psnr", 35, "--contact-sheet", sheet
        )
        assert code == 1, err
        assert "cuda:0 Fake GPU at http://" in out and "base.st" in out
        assert "PSNR 29.05 dB" in out and "not kept by 2 of 2 pictures" in out
        assert sheet.read_bytes().startswith(b"\x89PNG")
        code, out, _ = run("verify", "--comfyui", server.url, *given, "--json")
    document = json.loads(out)
    check("verify", document)
    assert code == 0 and document["checkpoint"] is None
    assert document["renders"]["quantized"]["runs"][1]["case"] == "prompt2-32x16-seed1"
    assert len(document["pictures"]["pairs"]) == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--comfyui", "http://x"], "`--comfyui` needs a workflow"),
        (["--workflow", "w.json"], "`--workflow` needs `--comfyui URL`"),
        (["--seeds", "1"], "`--seeds` needs `--comfyui URL`"),
        (["--min-psnr", "30"], "`--min-psnr` needs pictures"),
        (["--comfyui", "http://x", "--workflow", "w"], "needs `--reference-name`"),
        (
            ["--comfyui", "http://x", "--workflow", "w", "--images", "a", "b"],
            "both bring the pictures",
        ),
        (
            [
                *("--comfyui", "http://x", "--workflow", "w"),
                *("--reference-name", "a", "--model-name", "a"),
            ],
            "both models are called `a`",
        ),
        (["--images", "a", "b", "--min-sqnr", "3"], "`--min-sqnr` needs a checkpoint"),
        (["--images", "a", "b", "--fail-on", "scale.nothing"], "there is no finding"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(argv: list[str], told: str) -> None:
    code, _, err = run("verify", *argv)
    assert code == 2 and told in err, err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--sizes", "64", "`64` is not a size"),
        ("--sizes", "0x8", "`0x8` is not a size"),
        ("--seeds", "1,x", "`--seeds` takes numbers from 0"),
        ("--batch-sizes", "0", "`--batch-sizes` takes numbers from 1"),
    ],
)
def test_lists_must_be_lists(tmp_path: Path, option: str, value: str, told: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(nodes()))
    named = ["--reference-name", "a", "--model-name", "b"]
    code, _, err = run(
        "verify", "--comfyui", "http://127.0.0.1:1", "--workflow", path, *named, option, value
    )
    assert code == 2 and told in err, err
