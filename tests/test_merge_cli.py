"""`cq merge` on the command line: what is printed, what is refused, and pipes of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cq.cli.main import run
from cq.cli.output import Terminal
from tests.processes import BASE, STYLE, quick, shell


def cq(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = run([str(a) for a in argv], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return code, out.getvalue(), err.getvalue()


def test_explain_says_how_much_changes_and_warns_where_it_is_too_much() -> None:
    code, out, err = cq("merge", BASE, f"{STYLE}:0.8", "--explain", "--dry-run")
    assert code == 0
    assert "lora" in out
    assert "changes its layers by 29.60% of their size" in err
    assert "warning" not in err
    code, out, _ = cq("merge", BASE, f"{STYLE}:8", "--explain", "--dry-run", "--json")
    assert code == 0
    _, _, err = cq("merge", BASE, f"{STYLE}:8", "--explain", "--dry-run")
    assert "warning: `style.safetensors` is larger than the weights of" in err
    effect = json.loads(out)["decisions"][0]["effect"]
    assert effect["relative"] == pytest.approx(2.96, abs=0.01)
    assert effect["largest_layer"] == "double_blocks.0.txt_mod.lin"
    assert "double_blocks.0.txt_mod.lin" in effect["saturated"]


def test_explain_of_strength_zero_says_that_nothing_changes() -> None:
    code, _, err = cq("merge", BASE, f"{STYLE}:0", "--explain", "--dry-run")
    assert code == 0
    assert "changes nothing" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([BASE], "no adapter to merge"),
        ([BASE, STYLE, "--rank", "4"], "`--rank`"),
        ([BASE, STYLE, "--alpha", "much"], "`much` is no alpha"),
        ([BASE, STYLE, "--density", "0.5"], "no density"),
        ([BASE, STYLE, "--dtype", "int8"], "`int8` is no dtype"),
        (["--extract", BASE], "`--from`"),
        ([BASE, "--extract", BASE, "--from", BASE], "merges nothing"),
        (["--extract", BASE, "--from", BASE, "--rank", "0"], "rank"),
    ],
)
def test_merge_refuses_words_that_do_not_go_together(words: list[object], message: str) -> None:
    code, out, err = cq("merge", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "hint: " in err


def test_extract_makes_a_file_and_says_what_its_rank_leaves_out(tmp_path: Path) -> None:
    said = ""
    for words in (
        ("merge", BASE, STYLE, "-o", "tuned.st"),
        ("merge", "--extract", "tuned.st", "--from", BASE, "--rank", "16", "-o", "lora.st"),
        ("merge", BASE, "lora.st", "-o", "back.st"),
    ):
        done = quick(*words, cwd=tmp_path)
        assert done.code == 0, done.err
        said += done.err
    assert "rank 16 leaves out" in said
    tuned, back, base = (load_file(p) for p in (tmp_path / "tuned.st", tmp_path / "back.st", BASE))
    layer = "double_blocks.0.img_attn.qkv.weight"
    difference = (tuned[layer] - base[layer]).float()
    # What is left is the rounding of the merged weights to their own dtype.
    assert (back[layer] - tuned[layer]).float().norm() < 0.1 * difference.norm()
    with safe_open(tmp_path / "lora.st", "pt") as file:
        assert all(key.startswith("diffusion_model.") for key in file.keys())  # noqa: SIM118


def test_a_pipe_of_merge_with_every_option_computes_the_same_file(tmp_path: Path) -> None:
    words = f"{BASE} {STYLE}:0.6 {STYLE}:0.3 --method ties --density 0.5 --dtype fp32 --no-dampen"
    done = shell(
        f"cq merge -q {words} | cq quant -q --format bf16 -o piped.st > /dev/null",
        tmp_path,
    )
    assert done.code == 0, done.err
    for staged in (
        ("merge", *words.split(), "-o", "staged.st"),
        ("quant", "--format", "bf16", "staged.st", "-o", "two.st"),
    ):
        done = quick(*staged, cwd=tmp_path)
        assert done.code == 0, done.err
    assert (tmp_path / "piped.st").read_bytes() == (tmp_path / "two.st").read_bytes()


def test_keep_format_goes_back_to_the_same_layers(tmp_path: Path) -> None:
    for words in (
        ("quant", BASE, "-o", "q.st"),
        ("merge", "q.st", f"{STYLE}:0.8", "--keep-format", "-o", "m.st"),
        ("analyze", "m.st"),
    ):
        done = quick(*words, cwd=tmp_path)
        assert done.code == 0, done.err
    with safe_open(tmp_path / "q.st", "pt") as a, safe_open(tmp_path / "m.st", "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        changed = [k for k in a.keys() if not torch.equal(a.get_tensor(k), b.get_tensor(k))]  # noqa: SIM118
    assert changed
    assert all(name.rpartition(".")[2] in {"weight", "weight_scale"} for name in changed)


def test_map_is_read_on_the_command_line(tmp_path: Path) -> None:
    file = {"odd_" + name: tensor for name, tensor in load_file(STYLE).items()}
    save_file(file, tmp_path / "odd.st")
    keys = {name.partition(".")[0] for name in file}
    names = {key: key.removeprefix("odd_") for key in keys}
    (tmp_path / "map.json").write_text(json.dumps(names))
    code, _, err = cq("merge", BASE, tmp_path / "odd.st", "--dry-run")
    assert code == 4
    assert "--map FILE" in err
    code, _, err = cq(
        "merge", BASE, tmp_path / "odd.st", "--map", tmp_path / "map.json", "--dry-run"
    )
    assert code == 0, err
