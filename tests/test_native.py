"""The native stage: a checkpoint with the names of diffusers becomes the one its makers released,
tensor for tensor and bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cq
import cq_quant
from cq.core import catalog, families
from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.engine import local
from cq.core.errors import InputError, PlanError
from cq.core.names import Names
from cq.core.native import NativeNames, recognize
from tests import make, processes
from tests.test_families import read as skeleton_specs
from tests.test_families import under
from tests.test_names import GOLDEN, split

# Models of the same names in both, and those that diffusers keeps or reshapes in part
OTHERS = {"ernie-image", "hidream-i1", "ltx-2-19b", "ltx-2.3-22b", "wan22-animate-14b"}
MODELS = [skeleton for skeleton in GOLDEN if skeleton not in OTHERS]


def diffusers_specs(skeleton: str) -> dict[str, TensorSpec]:
    """The specs of the model's file of diffusers."""
    native = skeleton_specs(skeleton)
    found = {}
    for name, sources in GOLDEN[skeleton].items():
        spec = native[sources[0][0]]
        rows = sum(count for *_, count in sources)
        shape = (rows, *spec.shape[1:])
        if skeleton == "krea2" and len(sources) > 1:
            shape = (rows, spec.shape[0] // rows)  # a vector as a matrix
        found[name] = TensorSpec(spec.dtype, shape)
    return found


def unread(specs: Mapping[str, TensorSpec]) -> Checkpoint:
    """A checkpoint of those specs; reading it fails, as planning must not."""

    def never() -> Iterator[Piece]:
        raise AssertionError("read while planning")

    return make.checkpoint(
        *(Part(tensors={n: s}, nbytes_peak=1, produce=never) for n, s in specs.items())
    )


@cache
def small_flux() -> dict[str, torch.Tensor]:
    """FLUX.1 with native names, of 1/24 of its widths and two blocks of each kind."""

    def size(full: int) -> int:
        return full // 24 if full % 24 == 0 else 16

    return {
        name: make.noise("BF16", tuple(map(size, spec.shape)), name)
        for name, spec in skeleton_specs("flux1-dev").items()
        if "_blocks" not in name or name.split(".")[1] in {"0", "1"}
    }


def as_diffusers(native: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file that diffusers makes of it, by the rows that its converter took."""
    full = skeleton_specs("flux1-dev")
    found = {}
    for name, sources in GOLDEN["flux1-dev"].items():
        if sources[0][0] in native:
            rows = []
            for source, start, count in sources:
                tensor, all_rows = native[source], full[source].shape[0]
                first = start * tensor.shape[0] // all_rows
                rows.append(tensor[first : first + count * tensor.shape[0] // all_rows])
            found[name] = torch.cat(rows)
    return found


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The small model under native names, and under those of diffusers."""
    native = make.save(tmp_path / "native.safetensors", small_flux())
    return native, make.save(tmp_path / "diffusers.safetensors", as_diffusers(small_flux()))


# What becomes of a checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skeleton", "prefix"), [*((m, "") for m in MODELS), ("z-image", "transformer.")]
)
def test_the_specs_of_diffusers_become_those_of_the_release(skeleton: str, prefix: str) -> None:
    source = unread(under(prefix, diffusers_specs(skeleton)))
    found = NativeNames().apply(source)
    native = {**skeleton_specs(skeleton)}
    native.pop("rope.inv_freq", None)  # a constant of MiniMax H3, which diffusers does not store
    assert dict(found.specs) == native
    assert families.detect(found.specs).matches == families.detect(skeleton_specs(skeleton)).matches


def test_values_and_order_of_rows_are_those_of_the_native_file(files: tuple[Path, Path]) -> None:
    native, diffusers = files
    found = NativeNames().apply(cq.open(diffusers))
    assert sorted(found.specs) == sorted(small_flux())
    for name, tensor in found.read_many(found.specs).items():
        assert make.same(tensor, small_flux()[name]), name
    for part in found.parts:
        list(local.checked(part))
    cq.write(found, native.with_name("out.safetensors"))
    written = make.load(native.with_name("out.safetensors"))
    assert all(make.same(written[name], small_flux()[name]) for name in small_flux())


def test_a_renamed_tensor_is_copied_unread_and_a_joined_one_is_not(
    files: tuple[Path, Path],
) -> None:
    found = NativeNames().apply(cq.open(files[1]))
    copied = {part.name for part in found.parts if part.extent is not None}
    joined = {name for name in found.specs if "qkv" in name or "linear1" in name}
    assert set(found.specs) - copied == joined | {
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    }


def test_a_matrix_becomes_the_vector_of_the_release() -> None:
    """Krea 2's modulation: `(6, K)` in diffusers, `(6 K,)` in the release."""
    specs = diffusers_specs("krea2")
    table = "transformer_blocks.3.scale_shift_table"
    values = make.noise("BF16", specs.pop(table).shape, table)
    source = unread(specs)
    source = make.checkpoint(*source.parts, make.part({table: values}))
    assert make.same(NativeNames().apply(source).read("blocks.3.mod.lin"), values.reshape(-1))


def test_tensors_of_other_components_stay(files: tuple[Path, Path]) -> None:
    vae = {"vae.decoder.conv_in.weight": make.weight(4, 4)}
    model = as_diffusers(small_flux())
    path = make.save(files[0].with_name("both.safetensors"), vae | model)
    found = NativeNames().apply(cq.open(path))
    assert set(found.specs) == {*vae, *small_flux()}
    assert found.part("vae.decoder.conv_in.weight").extent is not None


@settings(max_examples=25)
@given(
    key=st.sampled_from(
        [k for n in as_diffusers(small_flux()) for k, p in [split(n)] if p == "weight"]
        + [k for n in small_flux() for k, p in [split(n.removesuffix(".scale"))] if p == "weight"]
    ),
    bias=st.booleans(),
)
def test_a_change_by_any_name_is_the_same_in_both_files(key: str, bias: bool) -> None:
    """Changed under either spelling and then converted, or changed after the conversion."""
    native = {name: torch.zeros(t.shape) for name, t in small_flux().items()}
    diffusers = {name: torch.zeros(t.shape) for name, t in as_diffusers(small_flux()).items()}
    parameter = "bias" if bias else "weight"
    changed = []
    for tensors in (native, diffusers):
        names = Names({n: TensorSpec("F32", tuple(t.shape)) for n, t in tensors.items()})
        places = names.find(f"transformer.{key}", parameter)  # type: ignore[arg-type]
        changed.append(len(places))
        for target in places[0] if places else ():
            rows = torch.arange(target.first, target.first + target.count) + 1
            part = tensors[target.tensor][target.start : target.start + target.count]
            part += rows.view(-1, *[1] * (part.dim() - 1))
    assert changed == [1, 1] or (bias and changed == [0, 0])
    source = make.checkpoint(*(make.part({n: t}) for n, t in diffusers.items()))
    found = NativeNames().apply(source).read_many(native)
    assert all(torch.equal(found[name], native[name]) for name in native)


# What is refused --------------------------------------------------------------------------------


def test_a_file_with_its_own_names_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError, match=r"native\.safetensors` is no model"):
        NativeNames().apply(cq.open(files[0]))


@pytest.mark.parametrize(
    ("gone", "left"),
    [("transformer_blocks.1.attn.to_k.weight", "transformer_blocks.1.attn.to_q.weight"),
     ("single_transformer_blocks.0.proj_mlp.bias", "single_transformer_blocks.0.attn.to_q.bias")],
)  # fmt: skip
def test_a_part_of_a_fused_weight_that_is_missing_is_refused(gone: str, left: str) -> None:
    specs = diffusers_specs("flux1-dev")
    del specs[gone]
    with pytest.raises(PlanError, match="no native name in FLUX") as caught:
        NativeNames().apply(unread(specs))
    assert f"`{left}`" in caught.value.message


def test_parts_of_several_dtypes_are_refused() -> None:
    specs = diffusers_specs("flux1-dev")
    name = "transformer_blocks.1.attn.to_k.weight"
    specs[name] = TensorSpec("F32", specs[name].shape)
    with pytest.raises(PlanError, match=r"in one dtype|no native name") as caught:
        NativeNames().apply(unread(specs))
    assert "one dtype" in str(caught.value.hint)


def test_a_tensor_that_no_model_has_is_refused_and_many_are_counted() -> None:
    specs = diffusers_specs("flux1-dev") | {
        f"transformer_blocks.{i}.strange.weight": TensorSpec("F32", (1,)) for i in range(9)
    }
    with pytest.raises(PlanError, match=r"`transformer_blocks\.0\.strange\.weight`.* and 4 more"):
        NativeNames().apply(unread(specs))


def test_two_names_of_one_tensor_are_refused() -> None:
    specs = diffusers_specs("flux1-dev")
    specs["transformer_blocks.0.ff.linear_in.weight"] = specs[
        "transformer_blocks.0.ff.net.0.proj.weight"
    ]
    with pytest.raises(PlanError, match="no native name"):
        NativeNames().apply(unread(specs))


def test_only_real_models_are_recognized() -> None:
    assert recognize({}) is None
    assert recognize({n: TensorSpec("F32", (4, 4)) for n in make.model()}) is None
    for skeleton in ("te-t5xxl", "te-clip-l", "te-qwen3-4b"):
        assert recognize(skeleton_specs(skeleton)) is None


def test_the_stage_of_a_manifest() -> None:
    stage = catalog.load("stages", "native")
    assert stage.from_arguments(NativeNames().arguments()) == NativeNames()
    with pytest.raises(InputError, match="`to`"):
        stage.from_arguments({"to": "native"})


# In cq quant ------------------------------------------------------------------------------------


def finite(tmp_path: Path) -> tuple[Path, Path]:
    tensors = {n: make.weight(*t.shape, dtype="BF16", seed=n) for n, t in small_flux().items()}
    native = make.save(tmp_path / "native.safetensors", tensors)
    return native, make.save(tmp_path / "diffusers.safetensors", as_diffusers(tensors))


def test_quantizing_with_native_names_is_quantizing_the_native_file(tmp_path: Path) -> None:
    native, diffusers = finite(tmp_path)
    want = cq_quant.quantize(cq.open(native))
    found = cq_quant.quantize(cq.open(diffusers), native_names=True)
    assert dict(found.specs) == dict(want.specs)
    left, right = found.read_many(found.specs), want.read_many(want.specs)
    assert all(make.same(left[name], right[name]) for name in left)


def test_the_refusal_of_diffusers_names_points_to_the_option(tmp_path: Path) -> None:
    _, diffusers = finite(tmp_path)
    with pytest.raises(PlanError, match="names of diffusers") as caught:
        cq_quant.quantize(cq.open(diffusers))
    assert "--native-names" in str(caught.value.hint)
    tensors = as_diffusers(small_flux())
    some = {n: make.weight(*tensors[n].shape) for n in [*tensors][:200] if n in tensors}
    some.pop("proj_out.weight", None)
    path = make.save(tmp_path / "part.safetensors", some)
    with pytest.raises(PlanError, match="names of diffusers") as caught:
        cq_quant.quantize(cq.open(path))
    assert "--native-names" not in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("skeleton", ["hunyuan-video-13b", "cosmos-predict2-2b-t2i", "ltxv-2b"])
def test_diffusers_names_that_comfyui_does_not_rename_are_refused_too(skeleton: str) -> None:
    sources = cq.open(processes.BASE).sources  # for a name to be shown
    source = replace(unread(diffusers_specs(skeleton)), sources=sources)
    with pytest.raises(PlanError, match="by which ComfyUI loads no quantized model") as caught:
        cq_quant.quantize(source)
    assert "--native-names" in str(caught.value.hint)
    assert cq_quant.quantize(source, format="fp16").specs
    assert cq_quant.quantize(NativeNames().apply(source)).specs


def test_cq_quant_takes_native_names_through_a_pipe(tmp_path: Path) -> None:
    _, diffusers = finite(tmp_path)
    ran = processes.cq("quant", diffusers, "--native-names", "--defer")
    assert ran.code == 0, ran.err
    stages = [stage["op"] for stage in json.loads(ran.out)["stages"]]
    assert stages == ["native", "quant"]
    done = processes.cq("run", "-", "-o", tmp_path / "out.safetensors", stdin=ran.out.encode())
    assert done.code == 0, done.err
    assert "double_blocks.0.img_attn.qkv.comfy_quant" in make.load(tmp_path / "out.safetensors")
