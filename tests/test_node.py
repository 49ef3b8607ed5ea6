"""The ComfyUI node, against stand-ins of the two classes that it touches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cq.core.calibration import Calibration

HERE = Path(__file__).resolve().parent.parent / "integrations" / "comfyui"


class ModelPatcher:
    """As ComfyUI's: a clone has wrappers of its own and the same model."""

    def __init__(self, model: Any, wrappers: dict[str, dict[str, list[Any]]] | None = None) -> None:
        self.model = model
        self.wrappers = wrappers or {}

    def clone(self) -> ModelPatcher:
        copied = {k: {n: list(w) for n, w in own.items()} for k, own in self.wrappers.items()}
        return ModelPatcher(self.model, copied)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


class Executor:
    """As ComfyUI's `WrapperExecutor` around the method of a guider."""

    def __init__(self, original: Callable[..., Any], guider: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, guider, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](self, *args, **kwargs)


def sample(patcher: ModelPatcher, noise: torch.Tensor, *, steps: int = 2) -> torch.Tensor:
    """What ComfyUI's guider does with the wrappers of its model."""

    def outer_sample(noise: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        assert seed == 7
        for _ in range(steps):
            noise = noise - patcher.model.diffusion_model(noise)
        return noise

    every = [w for own in patcher.wrappers.get("outer_sample", {}).values() for w in own]
    guider = SimpleNamespace(model_patcher=patcher)
    with torch.no_grad():
        found: torch.Tensor = Executor(outer_sample, guider, every).execute(noise, seed=7)
    return found


@pytest.fixture(scope="module")
def node() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cq_node", HERE / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def patcher() -> ModelPatcher:
    block = torch.nn.ModuleDict({"img_in": torch.nn.Linear(8, 8)})
    block.forward = lambda x: block["img_in"](x)  # type: ignore[method-assign]
    return ModelPatcher(SimpleNamespace(diffusion_model=block))


def recording(node: ModuleType, patcher: ModelPatcher, path: Path, **settings: Any) -> Any:
    (found,) = node.NODE_CLASS_MAPPINGS["CQRecordCalibration"]().record(
        patcher, str(path), **settings
    )
    return found


def test_every_sampling_adds_to_the_file(
    node: ModuleType, patcher: ModelPatcher, tmp_path: Path
) -> None:
    noise = torch.randn(30, 8)
    recorded = recording(node, patcher, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert torch.equal(sample(recorded, noise), sample(patcher, noise))
    assert _rows(tmp_path / "c") == {"img_in": 60}
    sample(recorded, noise, steps=3)
    assert _rows(tmp_path / "c") == {"img_in": 150}


def _rows(path: Path) -> dict[str, int]:
    layers = Calibration.open(path).layers
    return {name: found.rows + found.held_rows for name, found in layers.items()}


def test_the_model_that_went_in_is_not_recorded(
    node: ModuleType, patcher: ModelPatcher, tmp_path: Path
) -> None:
    recorded = recording(node, patcher, tmp_path / "c")
    sample(patcher, torch.randn(4, 8))
    assert not (tmp_path / "c").exists() and not patcher.wrappers
    sample(recorded, torch.randn(4, 8))
    assert not patcher.model.diffusion_model["img_in"]._forward_pre_hooks


def test_an_interrupted_sampling_leaves_no_hooks_and_no_file(
    node: ModuleType, patcher: ModelPatcher, tmp_path: Path
) -> None:
    recorded = recording(node, patcher, tmp_path / "c")
    with pytest.raises(RuntimeError):
        sample(recorded, torch.randn(4, 5))
    assert not patcher.model.diffusion_model["img_in"]._forward_pre_hooks
    assert not (tmp_path / "c").exists()


def test_the_node_says_before_sampling_that_a_file_cannot_be_written(
    node: ModuleType, patcher: ModelPatcher, tmp_path: Path
) -> None:
    (tmp_path / "c").write_text("x")
    with pytest.raises(FileExistsError, match="overwrite"):
        recording(node, patcher, tmp_path / "c")
    sample(recording(node, patcher, tmp_path / "c", overwrite=True), torch.randn(40, 8))
    assert _rows(tmp_path / "c") == {"img_in": 80}
    for path in (tmp_path, tmp_path / "no" / "c", " "):
        with pytest.raises(ValueError, match="name a file"):
            recording(node, patcher, Path(path))


def test_the_node_declares_what_its_function_takes(node: ModuleType) -> None:
    kind = node.CQRecordCalibration
    inputs = kind.INPUT_TYPES()
    names = [*inputs["required"], *inputs["optional"]]
    code = getattr(kind, kind.FUNCTION).__code__
    assert names == list(code.co_varnames[1 : code.co_argcount])
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
