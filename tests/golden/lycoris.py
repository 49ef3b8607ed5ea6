"""Writes `tests/golden/adapters/lycoris.json` anew: what LyCORIS itself makes of small weights.

    PYTHONPATH=. SOME_ENVIRONMENT/bin/python -m tests.golden.lycoris

Needs `lycoris-lora` (written with 4.1.3) beside torch; the tests need only the file. Each case has
the weight, the tensors that LyCORIS saves for it, and the weight that its training sees at strength
1. Of LoHa and LoKr that is not what LyCORIS merges: its merge multiplies by alpha / rank twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parent / "adapters" / "lycoris.json"
_LARGEST = 64  # numbers are multiples of 1/64 where a file can choose them


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    lines = [f"{json.dumps(name)}: {json.dumps(_case(*how))}" for name, how in _cases().items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _linear() -> torch.nn.Module:
    return torch.nn.Linear(4, 8, bias=False)


def _conv() -> torch.nn.Module:
    return torch.nn.Conv2d(4, 8, 2, bias=False)


def _cases() -> dict[str, tuple[Any, Callable[[], torch.nn.Module], dict[str, Any]]]:
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    two = {"lora_dim": 2, "alpha": 1}
    one = {"lora_dim": 1, "alpha": 0.5}
    dora = {"weight_decompose": True}
    columns = {"weight_decompose": True, "wd_on_out": False}
    return {
        "lora": (LoConModule, _linear, two),
        "lora-mid": (LoConModule, _conv, {**two, "use_tucker": True}),
        "dora": (LoConModule, _linear, {**two, **dora}),
        "dora-columns": (LoConModule, _conv, {**two, **columns}),
        "loha": (LohaModule, _linear, two),
        "loha-tucker": (LohaModule, _conv, {**two, "use_tucker": True}),
        "loha-dora": (LohaModule, _linear, {**two, **columns}),
        "lokr": (LokrModule, _conv, {**one, "factor": 2}),
        "lokr-both": (LokrModule, _linear, {**one, "factor": 4, "decompose_both": True}),
        "lokr-whole": (LokrModule, _linear, {**two, "full_matrix": True}),
        "lokr-tucker": (LokrModule, _conv, {**one, "factor": 2, "use_tucker": True}),
        "lokr-dora": (LokrModule, _linear, {**one, "factor": 2, **dora}),
        "glora": (GLoRAModule, _linear, two),
        "glora-conv": (GLoRAModule, _conv, two),
        "oft": (DiagOFTModule, _linear, {"lora_dim": 4}),
        "oft-bound": (DiagOFTModule, _conv, {"lora_dim": 4, "constraint": 0.0625}),
        "oft-rescale": (DiagOFTModule, _linear, {"lora_dim": 4, "rescaled": True}),
        "boft": (ButterflyOFTModule, _linear, {"lora_dim": 4}),
        "boft-bound": (ButterflyOFTModule, _conv, {"lora_dim": 2, "constraint": 0.0625}),
        "boft-rescale": (ButterflyOFTModule, _linear, {"lora_dim": 2, "rescaled": True}),
    }


def _case(kind: Any, make: Callable[[], Any], how: dict[str, Any]) -> dict[str, Any]:
    layer = make()
    layer.weight.data = _rounded(torch.randn_like(layer.weight) * 0.3)
    module = kind("layer", layer, 1.0, **how)
    for name, parameter in module.named_parameters():
        ones = name in {"dora_scale", "rescale"}
        made = torch.randn_like(parameter) * 0.3
        parameter.data = _rounded(1 + made / 4 if ones else made)
    with torch.no_grad():
        if hasattr(module, "get_weight"):
            merged = layer.weight + module.get_weight(layer.weight.shape)
            if module.wd:
                merged = module.apply_weight_decompose(merged)
        else:
            merged = module.get_merged_weight(1, layer.weight.shape)[0]
    saved = {name: _told(tensor) for name, tensor in module.state_dict().items()}
    return {"weight": _told(layer.weight), "tensors": saved, "merged": _told(merged)}


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * _LARGEST).round() / _LARGEST


def _told(tensor: torch.Tensor) -> Any:
    def short(value: Any) -> Any:
        return [short(v) for v in value] if isinstance(value, list) else float(f"{value:.9g}")

    return short(tensor.detach().float().tolist())


if __name__ == "__main__":
    main()
