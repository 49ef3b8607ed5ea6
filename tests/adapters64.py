"""What every kind of adapter does to a weight, in numpy and float64, for tests to compare with.

Written from the papers and from what a real ComfyUI was measured to do, not from cq. Arrays are
whole weights `(N, K)` or `(N, I, h, w)`; `t` holds the tensors of one layer by their endings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]
LINEAR = (24, 16)
CONV = (24, 8, 3, 3)
SQUARE = (16, 16)
EPS32 = 2.0**-23


class Case(NamedTuple):
    """A layer of one kind. `full` is the weight at strength 1; `comfy` the weight at any strength
    in ComfyUI, where that is not `W + s * (full - W)`."""

    kind: str
    name: str
    shape: tuple[int, ...]
    make: Callable[[np.random.Generator], Tensors]
    full: Callable[[Array, Tensors], Array]
    comfy: Callable[[Array, Tensors, float], Array] | None = None

    def right(self, weight: Array, t: Tensors, strength: float) -> Array:
        """The weight at `strength`."""
        if self.kind == "set_weight" and strength:  # whatever it is
            strength = 1.0
        return weight + strength * (self.full(weight, t) - weight)

    def as_comfyui(self, weight: Array, t: Tensors, strength: float) -> Array:
        """The weight at `strength` in ComfyUI."""
        own = self.right if self.comfy is None else self.comfy
        return own(weight, t, strength)


def c(t: Mapping[str, Array], rank: int) -> float:
    return float(t[".alpha"]) / rank if ".alpha" in t else 1.0


# --- kinds ----------------------------------------------------------------------------------------


def lora(weight: Array, t: Tensors) -> Array:
    up, down = t[".lora_up.weight"], t[".lora_down.weight"]
    rank = down.shape[0]
    if ".lora_mid.weight" in t:
        mid = t[".lora_mid.weight"]
        delta = np.einsum("om,mnhw,ni->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    else:
        delta = up.reshape(-1, rank) @ down.reshape(rank, -1)
    return weight + c(t, rank) * delta.reshape(weight.shape)


def loha(weight: Array, t: Tensors) -> Array:
    made = []
    for n in "12":
        a, b = t[f".hada_w{n}_a"], t[f".hada_w{n}_b"]
        if f".hada_t{n}" in t:
            made.append(np.einsum("ijkl,jr,ip->prkl", t[f".hada_t{n}"], b, a))
        else:
            made.append(a @ b)
    delta = (made[0] * made[1]).reshape(weight.shape)
    return weight + c(t, t[".hada_w1_b"].shape[0]) * delta


def lokr(weight: Array, t: Tensors) -> Array:
    rank = None
    made = []
    for n in "12":
        whole, a, b = f".lokr_w{n}", f".lokr_w{n}_a", f".lokr_w{n}_b"
        if whole in t:
            made.append(t[whole])
            continue
        rank = t[b].shape[0]
        if n == "2" and ".lokr_t2" in t:
            made.append(np.einsum("ijkl,jr,ip->prkl", t[".lokr_t2"], t[b], t[a]))
        else:
            made.append(t[a] @ t[b])
    one, two = made
    if two.ndim == 4:
        one = one[:, :, None, None]
    scale = 1.0 if rank is None else c(t, rank)
    return weight + scale * np.kron(one, two).reshape(weight.shape)


def glora(weight: Array, t: Tensors) -> Array:
    a1, a2, b1, b2 = (t[f".{n}.weight"] for n in ("a1", "a2", "b1", "b2"))
    rank = a2.shape[0]
    inner = np.einsum("ir,rj->ij", a1.reshape(len(a1), -1), a2.reshape(rank, -1))
    turned = np.einsum("oi...,ij->oj...", weight, inner)
    added = (b1.reshape(len(b1), -1) @ b2.reshape(rank, -1)).reshape(weight.shape)
    return weight + c(t, rank) * (turned + added)


def glora_old(weight: Array, t: Tensors) -> Array:
    a1, a2, b1, b2 = (t[f".{n}.weight"] for n in ("a1", "a2", "b1", "b2"))
    flat = weight.reshape(len(weight), -1)
    return weight + c(t, a1.shape[0]) * (b2 @ b1 + flat @ a2 @ a1).reshape(weight.shape)


def cayley(blocks: Array, bound: float) -> Array:
    q = blocks - np.swapaxes(blocks, -1, -2)
    norm = math.sqrt((q**2).sum()) + 1e-8
    if bound > 0 and norm > bound:
        q = q * (bound / norm)
    one = np.eye(q.shape[-1])
    return (one + q) @ np.linalg.inv(one - q)


def oft_turned(weight: Array, blocks: Array, bound: float) -> Array:
    size = blocks.shape[-1]
    out = np.empty_like(weight)
    for n, r in enumerate(cayley(blocks, bound)):
        own = slice(n * size, (n + 1) * size)
        out[own] = np.tensordot(r.T, weight[own], 1)
    return out


def oft(weight: Array, t: Tensors) -> Array:
    turned = oft_turned(weight, t[".oft_blocks"], float(t.get(".alpha", 0)) * len(weight))
    rescale = t.get(".rescale", np.ones(len(weight)))
    return rescale.reshape(-1, *[1] * (weight.ndim - 1)) * turned


def oft_comfy(weight: Array, t: Tensors, s: float) -> Array:
    turned = oft_turned(weight, t[".oft_blocks"], float(t.get(".alpha", 0)))
    return weight + s * s * (turned - weight)


def boft_turned(weight: Array, blocks: Array, bound: float, s: float) -> Array:
    rows, size = len(weight), blocks.shape[-1]
    turned = weight.copy()
    for stage, own in enumerate(cayley(blocks, bound)):
        apart = 2**stage * size // 2
        order = [
            start + half * apart + step
            for start in range(0, rows, 2 * apart)
            for step in range(apart)
            for half in (0, 1)
        ]
        before, after = turned[order], np.empty_like(turned)
        for n, r in enumerate(own):
            part = slice(n * size, (n + 1) * size)
            mixed = s * r + (1 - s) * np.eye(size)
            after[part] = np.tensordot(mixed, before[part], 1)
        turned[order] = after
    return turned


def boft(weight: Array, t: Tensors) -> Array:
    bound = float(t.get(".alpha", 0)) * len(weight)
    rescale = t.get(".rescale", np.ones(len(weight)))
    turned = boft_turned(weight, t[".oft_blocks"], bound, 1.0)
    return rescale.reshape(-1, *[1] * (weight.ndim - 1)) * turned


def boft_comfy(weight: Array, t: Tensors, s: float) -> Array:
    if ".alpha" not in t:
        return weight
    rescale = t.get(".rescale", np.ones(len(weight))).reshape(-1, *[1] * (weight.ndim - 1))
    turned = rescale * boft_turned(weight, t[".oft_blocks"], float(t[".alpha"]), s)
    return weight + s * (turned - weight)


def dora(inner: Callable[[Array, Tensors], Array]) -> Callable[[Array, Tensors], Array]:
    def full(weight: Array, t: Tensors) -> Array:
        v = inner(weight, t)
        magnitude = t[".dora_scale"]
        axis = 0 if magnitude.shape[0] == len(weight) else 1
        norm = np.sqrt((v**2).sum(tuple(n for n in range(v.ndim) if n != axis), keepdims=True))
        return v * magnitude.reshape(norm.shape) / norm

    return full


def dora_comfy(inner: Callable[[Array, Tensors], Array]) -> Callable[..., Array]:
    def merged(weight: Array, t: Tensors, s: float) -> Array:
        v = inner(weight, t)
        magnitude = t[".dora_scale"]
        axis = 0 if magnitude.shape[0] == len(weight) else 1
        of = weight if axis == 0 else v
        norm = np.sqrt((of**2).sum(tuple(n for n in range(v.ndim) if n != axis), keepdims=True))
        return weight + s * (v * magnitude.reshape(norm.shape) / (norm + EPS32) - weight)

    return merged


def dora_oft_comfy(weight: Array, t: Tensors, s: float) -> Array:
    alpha = float(t.get(".alpha", 0))
    turned = oft_turned(weight, t[".oft_blocks"], alpha)
    return dora_comfy(lambda w, _: w + alpha * s * (turned - w))(weight, t, s)


def dora_boft_comfy(weight: Array, t: Tensors, s: float) -> Array:
    alpha = float(t[".alpha"])
    turned = boft_turned(weight, t[".oft_blocks"], alpha, s)
    return dora_comfy(lambda w, _: w + alpha * (turned - w))(weight, t, s)


def peft_dora(weight: Array, t: Tensors) -> Array:
    v = weight + _peft_delta(weight, t)
    norm = np.sqrt((v.reshape(len(v), -1) ** 2).sum(1))
    factor = next(x for n, x in t.items() if "magnitude" in n).reshape(-1) / norm
    return v * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _peft_delta(weight: Array, t: Tensors) -> Array:
    up, down = t[".lora_B.weight"], t[".lora_A.weight"]
    rank = down.shape[0]
    return c(t, rank) * (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(weight.shape)


def peft_plain(weight: Array, t: Tensors, s: float) -> Array:
    return weight + s * _peft_delta(weight, t)


def unchanged(weight: Array, t: Tensors, s: float) -> Array:
    return weight


def replaced(ending: str) -> Callable[[Array, Tensors], Array]:
    return lambda weight, t: t[ending].reshape(weight.shape)


def added(ending: str) -> Callable[[Array, Tensors], Array]:
    return lambda weight, t: weight + t[ending].reshape(weight.shape)


# --- layers ---------------------------------------------------------------------------------------


def tensors(alpha: float | None = None, **shapes: tuple[int, ...]) -> Callable[..., Tensors]:
    """Random tensors; `__` in a keyword stands for a dot. Those of ones are near 1."""

    def make(rng: np.random.Generator) -> Tensors:
        made = {}
        for name, shape in shapes.items():
            values = rng.standard_normal(shape) * 0.3
            if name in {"dora_scale", "rescale"} or "magnitude" in name:
                values = 1 + values / 2
            made["." + name.replace("__", ".")] = values
        if alpha is not None:
            made[".alpha"] = np.array(alpha)
        return made

    return make


def cases() -> list[Case]:
    """Layers of every kind."""
    rows, columns = LINEAR
    lo = {"lora_up__weight": (rows, 4), "lora_down__weight": (4, columns)}
    co = {"lora_up__weight": (rows, 4, 1, 1), "lora_down__weight": (4, 8, 3, 3)}
    mid = {**co, "lora_down__weight": (4, 8, 1, 1), "lora_mid__weight": (4, 4, 3, 3)}
    mid5 = {
        "lora_up__weight": (rows, 5, 1, 1),
        "lora_mid__weight": (5, 4, 3, 3),
        "lora_down__weight": (4, 8, 1, 1),
    }
    peft = {"lora_B__weight": (rows, 4), "lora_A__weight": (4, columns)}
    ha = {f"hada_w{n}_a": (rows, 4) for n in "12"} | {f"hada_w{n}_b": (4, columns) for n in "12"}
    hac = {f"hada_w{n}_a": (rows, 4) for n in "12"} | {f"hada_w{n}_b": (4, 72) for n in "12"}
    hat = {f"hada_w{n}_a": (4, rows) for n in "12"} | {f"hada_w{n}_b": (4, 8) for n in "12"}
    hat |= {f"hada_t{n}": (4, 4, 3, 3) for n in "12"}
    kr1, kr1ab = {"lokr_w1": (4, 2)}, {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2)}
    kr2, kr2ab = {"lokr_w2": (6, 8)}, {"lokr_w2_a": (6, 3), "lokr_w2_b": (3, 8)}
    krc = {"lokr_w1": (4, 2), "lokr_w2": (6, 4, 3, 3)}
    krcab = {"lokr_w1": (4, 2), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 36)}
    krt = {"lokr_w1": (4, 2), "lokr_w2_a": (2, 6), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)}
    gl = {"a1__weight": (16, 3), "a2__weight": (3, 16)}
    gl |= {"b1__weight": (rows, 3), "b2__weight": (3, 16)}
    glc = {"a1__weight": (8, 3, 1, 1), "a2__weight": (3, 8, 1, 1)}
    glc |= {"b1__weight": (rows, 3, 1, 1), "b2__weight": (3, 8, 3, 3)}
    glo = {"a1__weight": (3, 16), "a2__weight": (16, 3)}
    glo |= {"b1__weight": (3, 16), "b2__weight": (rows, 3)}
    glco = {"a1__weight": (3, 72), "a2__weight": (72, 3)}
    glco |= {"b1__weight": (3, 72), "b2__weight": (rows, 3)}
    sq = {
        "a1__weight": (16, 3),
        "a2__weight": (3, 16),
        "b1__weight": (16, 3),
        "b2__weight": (3, 16),
    }
    sqo = {"a1__weight": (3, 16), "a2__weight": (16, 3), "b1__weight": (3, 16)}
    sqo |= {"b2__weight": (16, 3)}
    of, bo = {"oft_blocks": (4, 6, 6)}, {"oft_blocks": (3, 4, 6, 6)}
    out, into = {"dora_scale": (rows, 1)}, {"dora_scale": (1, columns)}
    outc, intoc = {"dora_scale": (rows, 1, 1, 1)}, {"dora_scale": (1, 8, 1, 1)}
    scaled, scaledc = {"rescale": (rows, 1)}, {"rescale": (rows, 1, 1, 1)}
    vector = ("lora_magnitude_vector", "lora_magnitude_vector__weight")
    return [
        Case("lora", "lora", LINEAR, tensors(2.0, **lo), lora),
        Case("lora", "lora-no-alpha", LINEAR, tensors(**lo), lora),
        Case("lora", "lora-conv", CONV, tensors(6.0, **co), lora),
        Case("lora", "lora-mid", CONV, tensors(2.0, **mid), lora),
        Case("lora", "lora-mid-two-ranks", CONV, tensors(2.0, **mid5), lora),
        Case("loha", "loha", LINEAR, tensors(2.0, **ha), loha),
        Case("loha", "loha-no-alpha", LINEAR, tensors(**ha), loha),
        Case("loha", "loha-conv", CONV, tensors(2.0, **hac), loha),
        Case("loha", "loha-tucker", CONV, tensors(2.0, **hat), loha),
        Case("lokr", "lokr-whole", LINEAR, tensors(2.0, **kr1, **kr2), lokr),
        Case("lokr", "lokr-large", LINEAR, tensors(2.0, **kr1, **kr2ab), lokr),
        Case("lokr", "lokr-small", LINEAR, tensors(3.0, **kr1ab, **kr2), lokr),
        Case("lokr", "lokr-both", LINEAR, tensors(2.0, **kr1ab, **kr2ab), lokr),
        Case("lokr", "lokr-no-alpha", LINEAR, tensors(**kr1, **kr2ab), lokr),
        Case("lokr", "lokr-conv", CONV, tensors(2.0, **krc), lokr),
        Case("lokr", "lokr-conv-large", CONV, tensors(2.0, **krcab), lokr),
        Case("lokr", "lokr-tucker", CONV, tensors(3.0, **krt), lokr, unchanged),
        Case("glora", "glora", LINEAR, tensors(2.0, **gl), glora),
        Case("glora", "glora-no-alpha", LINEAR, tensors(**gl), glora),
        Case("glora", "glora-conv", CONV, tensors(2.0, **glc), glora),
        Case("glora", "glora-square", SQUARE, tensors(2.0, **sq), glora),
        Case("glora", "glora-old", LINEAR, tensors(2.0, **glo), glora_old),
        Case("glora", "glora-old-conv", CONV, tensors(2.0, **glco), glora_old),
        Case("glora", "glora-old-square", SQUARE, tensors(2.0, **sqo), glora_old),
        Case("oft", "oft", LINEAR, tensors(**of), oft, oft_comfy),
        Case("oft", "oft-conv", CONV, tensors(0.0, **of), oft, oft_comfy),
        Case("oft", "oft-bound", LINEAR, tensors(0.01, **of), oft, oft_comfy),
        Case("oft", "oft-tiny-bound", LINEAR, tensors(1e-4, **of), oft, oft_comfy),
        Case("oft", "oft-loose-bound", LINEAR, tensors(100.0, **of), oft, oft_comfy),
        Case("oft", "oft-rescale", LINEAR, tensors(**of, **scaled), oft, oft_comfy),
        Case("boft", "boft", LINEAR, tensors(0.0, **bo), boft, boft_comfy),
        Case("boft", "boft-no-alpha", LINEAR, tensors(**bo), boft, boft_comfy),
        Case("boft", "boft-bound", LINEAR, tensors(0.02, **bo), boft, boft_comfy),
        Case("boft", "boft-conv", CONV, tensors(100.0, **bo, **scaledc), boft, boft_comfy),
        Case("dora", "dora-rows", LINEAR, tensors(2.0, **lo, **out), dora(lora), dora_comfy(lora)),
        Case(
            "dora", "dora-columns", LINEAR, tensors(2.0, **lo, **into), dora(lora), dora_comfy(lora)
        ),
        Case("dora", "dora-conv", CONV, tensors(2.0, **co, **outc), dora(lora), dora_comfy(lora)),
        Case(
            "dora", "dora-conv-in", CONV, tensors(2.0, **co, **intoc), dora(lora), dora_comfy(lora)
        ),
        Case("dora", "dora-loha", LINEAR, tensors(2.0, **ha, **out), dora(loha), dora_comfy(loha)),
        Case("dora", "dora-lokr", CONV, tensors(2.0, **krc, **intoc), dora(lokr), dora_comfy(lokr)),
        Case("dora", "dora-lokr-tucker", CONV, tensors(2.0, **krt, **outc), dora(lokr), unchanged),
        Case(
            "dora", "dora-glora", LINEAR, tensors(2.0, **gl, **out), dora(glora), dora_comfy(glora)
        ),
        Case("dora", "dora-oft", LINEAR, tensors(0.05, **of, **out), dora(oft), dora_oft_comfy),
        Case("dora", "dora-oft-in", LINEAR, tensors(**of, **into), dora(oft), dora_oft_comfy),
        Case("dora", "dora-boft", LINEAR, tensors(0.05, **bo, **out), dora(boft), dora_boft_comfy),
        Case("dora", "dora-boft-no-alpha", LINEAR, tensors(**bo, **out), dora(boft), unchanged),
        *(
            Case(
                "dora",
                f"dora-peft-{n}",
                LINEAR,
                tensors(**peft, **{name: (rows,)}),
                peft_dora,
                peft_plain,
            )
            for n, name in enumerate(vector)
        ),
        Case(
            "dora",
            "dora-peft-conv",
            CONV,
            tensors(
                lora_B__weight=(rows, 4, 1, 1),
                lora_A__weight=(4, 8, 3, 3),
                lora_magnitude_vector__weight=(1, rows, 1, 1),
            ),
            peft_dora,
            peft_plain,
        ),
        Case("diff", "diff", CONV, tensors(diff=CONV), added(".diff")),
        Case("diff", "diff-1d", (24,), tensors(diff=(24,)), added(".diff")),
        Case("norm", "norm", (24,), tensors(w_norm=(24,)), added(".w_norm")),
        Case("set_weight", "set", (24,), tensors(set_weight=(24,)), replaced(".set_weight")),
        Case("checkpoint", "checkpoint", LINEAR, tensors(weight=LINEAR), replaced(".weight")),
        Case("checkpoint", "checkpoint-conv", CONV, tensors(weight=CONV), replaced(".weight")),
    ]
