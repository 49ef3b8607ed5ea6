"""Writes the key `layers` of the families' files: the layers of their skeletons, names folded.

Run by hand after a skeleton or a family is added: `.venv/bin/python docs/family_layers.py`. A test
holds the files against what this makes.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from cq.core import families
from cq.core.dtypes import TensorSpec
from cq.core.text import folded

ROOT = Path(__file__).resolve().parent.parent
SKELETONS = ROOT / "tests" / "skeletons"
MODELS = ROOT / "cq" / "core" / "models"
_KEY = re.compile(r"^layers = '''\n.*?'''\n", re.MULTILINE | re.DOTALL)


def layers() -> dict[str, list[str]]:
    """The folded names of all layers with a weight of two dimensions or more, by family."""
    found: dict[str, set[str]] = {name: set() for name in families.names()}
    for path in sorted(SKELETONS.glob("*.json.gz")):
        tensors = json.loads(gzip.decompress(path.read_bytes()))
        specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
        match = families.detect(specs).match
        assert match is not None, path.name
        found[match.family.name] |= {
            folded(name.removesuffix(".weight"))
            for name, spec in specs.items()
            if name.endswith(".weight") and len(spec.shape) >= 2
        }
    return {name: sorted(own) for name, own in found.items()}


def written(text: str, names: list[str]) -> str:
    """A family's file with `names` as its `layers`, before its first table."""
    key = "layers = '''\n" + "".join(f"{name}\n" for name in names) + "'''\n"
    plain = _KEY.sub("", text)
    at = plain.index("\n[")
    return plain[: at + 1] + key + plain[at + 1 :]


def main() -> None:
    """Write the files."""
    for name, own in layers().items():
        path = MODELS / f"{name}.toml"
        path.write_text(written(path.read_text(encoding="utf-8"), own), encoding="utf-8")


if __name__ == "__main__":
    main()
