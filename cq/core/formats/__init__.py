"""Storage formats, one file each, named by ComfyUI's key. Owns the protocol that they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.grid import Grid, Scales
from cq.core.packing import fits

if TYPE_CHECKING:
    import torch


SMOOTHED_SINCE = "0.30.0"  # the first ComfyUI release that reads a `pre_quant_scale`


class Format(ABC):
    """How a quantized weight is stored. Everything but `pack…`, `unpack` and `store` is pure
    planning on a 2-D weight `(N, K)`.

    `name` is ComfyUI's key and the file's name, `scalings` what `--scaling` may be (the default
    first), `rotation` whether weights are stored in the rotated basis. `first_comfyui` is the first
    ComfyUI release that reads it, None if only the custom `loader` does. `keeps_shape` says that
    the stored weight always has the shape of the weight, so that it may stand on layers whose shape
    ComfyUI reads to tell the model; `embeddings` and `experts` whether ComfyUI takes it for
    embedding tables and for stacked expert weights `(E, N, K)`, every stored tensor then with a
    leading E. `aliases` are the names that other tools wrote for the same storage. `casts` says
    that it is a plain dtype: no marker, no scales, any shape; `whole` that `unpack` wants all rows
    at once. `largest_input` is the largest input that its runtime can hold at an `input_scale` of
    1, None if it reads no such scale; `smooths` whether it reads a `pre_quant_scale`. Plugs inherit
    the defaults.
    """

    name: str
    scalings: tuple[str, ...]
    first_comfyui: str | None
    rotation: Literal["never", "optional", "always"] = "never"
    loader: str | None = None
    keeps_shape: bool = False
    embeddings: bool = False
    experts: bool = False
    aliases: tuple[str, ...] = ()
    casts: bool = False
    whole: bool = False
    largest_input: float | None = None
    smooths: bool = False

    @abstractmethod
    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Why `weight` cannot be stored so, as a sentence part, or None if it can.

        `group` is the rotation group, None for the original basis.
        """
        ...

    @abstractmethod
    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """Specs of the stored tensors by local name (`weight`, `weight_scale`), without the
        marker. The stored weight has a row for each weight row, then perhaps rows of padding."""
        ...

    @abstractmethod
    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The layer's `comfy_quant` settings; empty for a plain dtype, which has no marker."""
        ...

    @abstractmethod
    def grid(self, weight: TensorSpec, scaling: str) -> Grid | None:
        """The levels; None for a format that rounds by itself, in `store`."""
        ...

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(rows, K)` as rows of the stored `weight`; only with a grid, as `pack_scales`."""
        raise NotImplementedError(f"the format `{self.name}` has no `pack`")

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """The whole weight's scales as the stored tensors beside `weight`."""
        raise NotImplementedError(f"the format `{self.name}` has no `pack_scales`")

    def store(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a whole weight; only where `grid` is None."""
        raise NotImplementedError(f"the format `{self.name}` has no `store`")

    @abstractmethod
    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """What ComfyUI would trip over in a layer stored so, judged from specs and marker."""
        ...

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """Whether one matrix's tensors may be stored so, where the marker names no format; what
        else it says is in `marker`. No by default: then only a marker tells of the format."""
        return False

    @abstractmethod
    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape `(N, K)` of the weight that is stored so; with its padding if nothing tells how
        much of it is padding. Raises: InputError if the stored tensors do not fit together."""
        ...

    def unturned(self, marker: Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
        """The marker by which `unpack` leaves a rotated weight in the basis that it is stored in,
        and the rotation's group; the marker itself and None if there is nothing to leave."""
        return marker, None

    @abstractmethod
    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """The float32 weight rows, in the original basis, of the stored weight's `rows` from
        `start` (a multiple of 128) on, with padding. `beside` are the whole other stored tensors.

        Lenient: scales of any shape that another tool wrote for the same storage are understood.
        """
        ...


class Fault(tuple[str, str]):
    """A slug such as `scale.shape` and a sentence: why ComfyUI cannot use a layer as stored."""

    __slots__ = ()

    def __new__(cls, slug: str, sentence: str) -> Fault:
        """A fault of the kind `slug`, told by `sentence`."""
        return super().__new__(cls, (slug, sentence))


def first_release(plug: Format, *, embedding: bool, experts: bool, rotated: bool) -> str | None:
    """The first ComfyUI release that reads a layer of that kind in the format; None if none does.

    >>> from cq.core import catalog
    >>> int8 = catalog.load("formats", "int8_tensorwise")
    >>> first_release(int8, embedding=True, experts=False, rotated=True)
    '0.30.0'
    """
    if plug.first_comfyui is None:
        return None
    releases = [plug.first_comfyui]
    if embedding:
        releases.append("0.30.0" if rotated else "0.21.0")
    if experts:
        releases.append("0.23.0")
    return newest(releases)


def newest(releases: Iterable[str]) -> str | None:
    """The newest of `releases`, None of none."""
    return max(releases, key=lambda r: [int(n) for n in r.split(".")], default=None)


def loaded_by(plugs: Iterable[Format], releases: Iterable[str] = ()) -> str:
    """Who loads a checkpoint of such formats, whose layers need `releases` besides: a ComfyUI
    release, perhaps with a custom loader.

    >>> from cq.core import catalog
    >>> loaded_by([catalog.load("formats", "int8_tensorwise"), catalog.load("formats", "bf16")])
    'ComfyUI 0.27.0 or newer'
    """
    marked = [plug for plug in plugs if not plug.casts]
    custom = sorted({plug.loader or plug.name for plug in marked if plug.first_comfyui is None})
    own = [plug.first_comfyui for plug in marked if plug.first_comfyui is not None]
    least = newest([*own, *releases])
    told = "any ComfyUI" if least is None else f"ComfyUI {least} or newer"
    return f"{told} with {' and '.join(custom)}" if custom else told


def plain_shape(
    stored: Mapping[str, TensorSpec], *, scale: str = "weight_scale", block: int | None = None
) -> tuple[int, ...]:
    """The shape of a weight that is stored one element per weight, beside a scale that can be
    spread over it (see `cq.core.packing.spread`).

    Raises: InputError if the scale is missing or does not fit.
    """
    shape = stored["weight"].shape
    if scale not in stored:
        raise InputError(f"there is no `{scale}` beside the codes", code="input.scale")
    if len(shape) != 2 or not fits(stored[scale].shape, (shape[0], shape[1]), block):
        raise InputError(
            f"a scale of shape {list(stored[scale].shape)} does not fit codes of shape"
            f" {list(shape)}",
            code="input.scale",
        )
    return shape


def block_of(weight: tuple[int, ...], scale: tuple[int, ...]) -> int | None:
    """The block that a scale's shape speaks of: a square one, or one along a row; None for a scale
    of whole rows or of a tensor.

    >>> block_of((256, 512), (2, 4)), block_of((256, 512), (256, 4, 1)), block_of((2, 4), (2, 1))
    (128, 128, None)
    """
    if len(weight) != 2 or 0 in weight or 0 in scale:
        return None
    rows, columns = weight
    if len(scale) == 2 and scale not in {(rows, 1), (1, 1)}:
        if rows % scale[0] == 0 and columns % scale[1] == 0:
            block = columns // scale[1]
            return block if rows // scale[0] == block else None
    elif len(scale) == 3 and scale[::2] == (rows, 1) and columns % scale[1] == 0:
        return columns // scale[1]
    return None


def decode(
    plug: Format, stored: Mapping[str, torch.Tensor], marker: Mapping[str, Any]
) -> torch.Tensor:
    """The whole float32 weight `(N, K)` or `(E, N, K)` of a layer's stored tensors, unpadded.

    Raises: InputError if the stored tensors do not fit together.
    """
    import torch

    from cq.core.dtypes import spec_of

    if stored["weight"].ndim == 3 and not plug.casts:
        experts = [
            {name: tensor[i] if tensor.ndim else tensor for name, tensor in stored.items()}
            for i in range(stored["weight"].shape[0])
        ]
        return torch.stack([decode(plug, expert, marker) for expert in experts])
    shape = plug.shape({name: spec_of(tensor) for name, tensor in stored.items()}, marker)
    beside = {name: tensor for name, tensor in stored.items() if name != "weight"}
    value = plug.unpack(stored["weight"], 0, beside, marker)
    return value[tuple(slice(side) for side in shape)]
