"""A device that is none: tensors that say they are elsewhere, and are computed here all the same.

`Elsewhere` is a mode under which torch's device `meta` holds numbers. Operators run on the CPU,
with real values, and refuse operands that are not all in one place, as a GPU would; only single
numbers of the CPU may meet tensors elsewhere, but not be written to. So the code for devices is
tried in full where there is none: what it makes must be asked for where it is needed, and the
results must be those of the CPU, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
DEVICE = torch.device(NAME)
# Copies between places, and what brings a number or a tensor to the host, may be given both kinds.
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense", "aten::item"}


class Tensor(torch.Tensor):
    """A tensor elsewhere; its numbers are `here`."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def record_stream(self, stream: Any) -> None:
        """Told to the stream, which is not one of torch's."""
        stream.recorded(self)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator, whose operands must all be in one place."""
    name = func._schema.name
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    away = [each for each in tensors if isinstance(each, Tensor)]
    if away and name not in _COPIES:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) and (tensor.ndim or tensor is tensors[0]):
                raise RuntimeError(f"{name} got tensors elsewhere and a tensor here")
    asked = kwargs.get("device")
    to = bool(away) if asked is None else torch.device(asked) == DEVICE
    if name == "aten::copy_":
        to = isinstance(args[0], Tensor)
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    plain = tree_map(lambda each: each.here if isinstance(each, Tensor) else each, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if not to:
        return found
    found = tree_map(lambda each: Tensor(each) if isinstance(each, torch.Tensor) else each, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


class Elsewhere(TorchDispatchMode):
    """Within it tensors can be made elsewhere, and brought there; `made` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = run(func, args, kwargs or {})
        self.made += isinstance(found, Tensor)
        return found
