"""`cq template`: the recipe of what `cq quant` would do, which makes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import pytest
import torch

import cq
import cq_analyze
import cq_quant
from cq.core import catalog, select
from cq.core.errors import PlanError, ResourceError
from cq.core.recipe_file import load_recipe
from cq_analyze import recipes, saving
from tests.processes import BASE
from tests.test_architecture import check
from tests.test_cli_errors import cq as run

FORMATS = catalog.names("formats")
ODD_NAMES = ("blocks.0.odd[1]*?", "re:blocks.1.mlp", "blocks.2.ümlaut x")


def odd_model(prefix: str = "") -> dict[str, torch.Tensor]:
    """A small model with every kind of layer that a plan treats apart."""
    tensors = {
        **make.model(dim=128, dtype="F16", prefix=prefix),
        f"{prefix}blocks.0.tiny.weight": make.weight(8, 128),
        f"{prefix}blocks.0.uneven.weight": make.weight(100, 200, dtype="BF16"),
        f"{prefix}blocks.0.sixteen.weight": make.weight(128, 80, dtype="BF16"),
        f"{prefix}blocks.0.conv.weight": make.weight(64, 64, 3, 3),
        f"{prefix}blocks.0.counts.weight": torch.arange(128 * 128).view(128, 128),
        f"{prefix}blocks.0.counts.bias": make.weight(128),
        f"{prefix}blocks.0.experts.down.weight": make.weight(2, 128, 128, dtype="BF16"),
        f"{prefix}embed_tokens.weight": make.weight(256, 128, dtype="BF16"),
        f"{prefix}scale": make.weight(128),
        "first_stage_model.decoder.mid.q.weight": make.weight(128, 128),
        "cond_stage_model.layers.0.q.weight": make.weight(128, 128),
    }
    return tensors | {f"{name}.weight": make.weight(128, 128, seed=name) for name in ODD_NAMES}


def written(source: Path, out: Path, **words: Any) -> bytes:
    cq.write(cq_quant.quantize(cq.open(source), **words), out)
    return out.read_bytes()


def template(source: Path, out: Path, **words: Any) -> Path:
    """The recipe that the template of `source` is, in a file, checked against the schema."""
    found = cq_analyze.template(cq.open(source), **words)
    check("recipe", found)
    saving.save(recipes.written(found), out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    return out


@pytest.fixture(params=["", "model.diffusion_model."], ids=["bare", "prefixed"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make.save(tmp_path / "odd.safetensors", odd_model(request.param), {"note": "kept"})


@pytest.mark.parametrize("name", FORMATS)
def test_template_of_odd_layers_makes_the_bytes_of_the_defaults(
    name: str, odd: Path, tmp_path: Path
) -> None:
    words = {"format": name, "allow_custom_loader": True}
    recipe = template(odd, tmp_path / "layers.json", **words)
    plain = written(odd, tmp_path / "a.safetensors", **words)
    assert written(odd, tmp_path / "b.safetensors", recipe=recipe, **words) == plain


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "bf16"])  # which it is already
def test_template_of_a_known_family_makes_the_bytes_of_the_defaults(
    name: str, tmp_path: Path
) -> None:
    words = {"format": name, "allow_custom_loader": True}
    recipe = template(BASE, tmp_path / "layers.json", **words)
    plain = written(BASE, tmp_path / "a.safetensors", **words)
    assert written(BASE, tmp_path / "b.safetensors", recipe=recipe, **words) == plain


MADE_WITH: dict[str, dict[str, Any]] = {
    "format": {"format": "nvfp4"},
    "codebook": {"format": "convrot_w4a4"},
    "scaling": {"scaling": "tensor"},
    "rtn": {"optimizer": "rtn"},
    "small rotation": {"rotate": "16"},
    "rotated rtn": {"optimizer": "rtn", "rotate": "64"},
    "not rotated": {"optimizer": "rtn", "rotate": "off"},
    "family": {"family": "none"},
    "only": {"only": ["blocks.0.*", "*.1.mlp.2=nvfp4"]},
    "skip": {"skip": ["*.mlp.*"]},
    "embedding": {"only": ["*"]},
    "cast": {"format": "fp16"},
    "cast but some": {"format": "fp32", "skip": ["*.mlp.*"]},
}


@pytest.mark.parametrize("name", MADE_WITH)
def test_template_stands_for_the_options_that_it_was_made_with(name: str, tmp_path: Path) -> None:
    """All but the provenance in the header is equal: the command was another one."""
    odd = make.save(tmp_path / "odd.safetensors", odd_model())
    recipe = template(odd, tmp_path / "layers.json", **MADE_WITH[name])
    written(odd, tmp_path / "a.safetensors", **MADE_WITH[name])
    written(odd, tmp_path / "b.safetensors", recipe=recipe)
    first, second = (make.load(tmp_path / f"{o}.safetensors") for o in "ab")
    assert first.keys() == second.keys()
    assert all(make.same(first[key], second[key]) for key in first)


def test_template_of_a_template_is_the_same(tmp_path: Path) -> None:
    recipe = template(BASE, tmp_path / "a.json", format="nvfp4")
    again = template(BASE, tmp_path / "b.json", recipe=recipe)
    assert again.read_text() == recipe.read_text()


def test_every_layer_has_one_rule_that_says_all() -> None:
    found = cq_analyze.template(cq.open(BASE))
    model = cq_quant.quantize(cq.open(BASE))
    assert [rule["layers"] for rule in found["rules"]] == [note["layer"] for note in model.notes]
    for rule, note in zip(found["rules"], model.notes, strict=True):
        assert rule["reason"] == note["reason"]
        assert (rule["_shape"], rule["_dtype"]) == (note["shape"], note["dtype"])
        assert rule["_nbytes_after"] == note.get("nbytes_after", note["nbytes"])
        if note["action"] == "keep":
            assert rule["skip"] is True
        else:
            said = [rule[key] for key in ("format", "scaling", "optimizer", "rotate")]
            assert said == ["int8_tensorwise", "row", "quip", str(note["rotation"])]
    assert found["_family"] == ["flux1 (flux1-schnell)"]
    assert found["_model"] == ["digits.safetensors"]
    assert str(BASE.parent) not in recipes.text(found)


def test_patterns_match_their_layer_alone() -> None:
    for name in (*ODD_NAMES, "a[b", "[re:]", "re:", "x*"):
        test = select.matcher(recipes.exactly(name))
        assert test(name)
        others = [name + "x", "x" + name, name.replace("*", "y"), name.replace("1", "2")]
        assert not any(test(other) for other in others if other != name)


def test_text_has_a_line_for_each_rule() -> None:
    found = cq_analyze.template(cq.open(BASE))
    lines = recipes.text(found).split("\n")
    assert [line for line in lines if '"layers"' in line] == [
        f"  {json.dumps(rule)}{',' if i + 1 < len(found['rules']) else ''}"
        for i, rule in enumerate(found["rules"])
    ]


def test_template_on_the_command_line_is_accepted_unchanged(tmp_path: Path) -> None:
    done = run("template", BASE)
    assert (done.code, done.err) == (0, "")
    path = tmp_path / "layers.json"
    path.write_text(done.out)
    assert len(load_recipe(path)) == len(cq_analyze.template(cq.open(BASE))["rules"])
    for out, more in (("a", ()), ("b", ("--recipe", path))):
        assert run("quant", BASE, "-o", tmp_path / out, "-q", *more).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_template_writes_a_file_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    done = run("template", BASE, "-o", path)
    assert (done.code, done.out) == (0, "")
    assert "wrote" in done.err
    before = path.read_text()
    again = run("template", BASE, "--format", "nvfp4", "-o", path)
    assert again.code == 4
    assert "exists" in again.err
    assert path.read_text() == before
    assert run("template", BASE, "--format", "nvfp4", "-o", path, "--force").code == 0
    assert path.read_text() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layers.json"]


def test_template_never_replaces_its_input(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(BASE.read_bytes())
    assert run("template", source, "-o", source, "--force").code == 4
    assert source.read_bytes() == BASE.read_bytes()


def test_template_into_no_directory_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not exist"):
        saving.save("", tmp_path / "none" / "layers.json")


def test_template_of_a_quantized_file_is_refused_as_quant_refuses_it(tmp_path: Path) -> None:
    written(BASE, tmp_path / "q.safetensors")
    with pytest.raises(PlanError, match="is quantized already"):
        cq_analyze.template(cq.open(tmp_path / "q.safetensors"))


def test_template_of_requantizing_makes_the_bytes_of_requantizing(tmp_path: Path) -> None:
    source, words = tmp_path / "q.safetensors", {"format": "nvfp4", "requantize": True}
    written(BASE, source)
    recipe = template(source, tmp_path / "layers.json", **words)
    again = written(source, tmp_path / "b.safetensors", recipe=recipe, **words)
    assert again == written(source, tmp_path / "a.safetensors", **words)
    done = run("template", source, "--requantize", "--budget", "4MB")
    assert done.code == 2
    assert "exclude each other" in done.err


def test_thousands_of_rules_are_matched_in_linear_time() -> None:
    """Names in full are looked up: 20 000 rules for 20 000 layers take no 400 million trials."""
    names = [f"blocks.{i}.mlp" for i in range(20_000)]
    assert select.select(names, names, what="layer") == dict(zip(names, names, strict=True))


def test_first_pattern_that_matches_wins_among_names_and_globs() -> None:
    layers = ["a.0", "a.1", "a.2", "b"]
    found = select.select(["a.2", "a.*", "re:[b]"], layers, what="layer")
    assert found == {"a.0": "a.*", "a.1": "a.*", "a.2": "a.2", "b": "re:[b]"}
    assert select.select(["a.*", "a.2", "b"], layers, what="layer")["a.2"] == "a.*"


def test_one_rule_says_what_becomes_of_a_layers_weight_and_bias() -> None:
    """In a cast, where the weight may be of another format than the bias beside it."""
    bias = {"tensor": "a.bias", "format": "bf16", "scaling": "none", "optimizer": None}
    weight = bias | {"tensor": "a.weight", "format": "fp16"}
    facts = {"action": "quantize", "reason": "", "shape": [1], "dtype": "F32", "nbytes": 4}
    (rule,) = recipes.rules([bias | facts, weight | facts])
    assert (rule["layers"], rule["format"]) == ("a", "fp16")
