"""Safetensors headers: parse and validate any bytes, lay a file out from specs alone, emit it
byte-stably.

Owns the format's rules. Knows nothing of files on disk (`cq.core.source` reads, `cq.core.sink`
writes) and never torch. The writer is our own because safetensors' writes metadata in hash order,
so equal runs give different files; for at most one metadata entry the bytes are equal to
safetensors' own.

Source: https://github.com/huggingface/safetensors (`safetensors/src/tensor.rs`: `prepare`,
`Metadata::validate`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import orjson

from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.errors import InputError
from cq.core.text import printable

MAX_HEADER_BYTES = 100_000_000  # safetensors refuses more, so a file beyond it loads nowhere
_MAX_FILE_BYTES = 1 << 62  # offsets must fit a signed 64-bit file position
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_Placed = tuple[str, TensorSpec, tuple[int, int]]  # a tensor's name, spec and byte range
_Specs = dict[tuple[object, ...], TensorSpec]  # those that were met, by dtype and sizes


class Entry(NamedTuple):
    """One tensor's place: its spec and its byte range, counted from the start of the data area."""

    spec: TensorSpec
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A valid header: every tensor's entry in file order, the metadata, and where the data
    begins."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    nbytes_data: int

    @property
    def nbytes_file(self) -> int:
        """Size in bytes of the whole file."""
        return self.data_start + self.nbytes_data


def header_length(prefix: bytes, *, where: str, nbytes_file: int | None) -> int:
    """Length of the JSON header announced by a file's first 8 bytes.

    Raises: InputError if the prefix is short, the length is over 100 MB, or longer than the file.
    """
    if len(prefix) < 8:
        raise InputError(
            f"`{where}` is not a safetensors file: it has {len(prefix)} bytes, less than a header",
            where=where,
            code="input.truncated",
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"`{where}` is not a safetensors file: its header would be {length} bytes long,"
            f" over the format's limit of {MAX_HEADER_BYTES}",
            where=where,
            hint=_other_format(prefix),
            code="input.header",
        )
    if nbytes_file is not None and 8 + length > nbytes_file:
        raise InputError(
            f"`{where}` is truncated: its header needs {8 + length} bytes,"
            f" the file has {nbytes_file}",
            where=where,
            hint="download or copy the file again",
            code="input.truncated",
        )
    return length


def _other_format(prefix: bytes) -> str | None:
    if prefix.startswith(b"GGUF"):
        return "this is a GGUF file; cq reads safetensors"
    if prefix.startswith(b"PK"):
        return "this looks like a PyTorch pickle archive; convert it to safetensors first"
    if prefix.lstrip().startswith((b"<", b"version ")):
        return "this looks like a web page or a git-lfs pointer; download the file itself"
    if prefix.startswith(b'{"'):
        return "this looks like JSON; give a manifest itself, or the file that it names"
    if prefix.startswith(b"\x80"):
        return "this looks like a Python pickle; cq never opens pickles"
    return "cq reads safetensors files, shard indexes and its own manifests"


def parse(raw: bytes, *, where: str, nbytes_file: int | None) -> Header:
    """Parse and validate the JSON header `raw` (without its 8 length bytes).

    Total validation: UTF-8, JSON, duplicate names, known dtypes, integer shapes, sizes that equal
    shape x dtype, and data that covers the rest of the file exactly, without gaps or overlaps.
    `nbytes_file` None skips the comparison with the file's size (for a stream whose length is not
    known).

    Raises: InputError naming `where` and, where one is at fault, the tensor.
    """
    document = _quickly(raw)
    if document is None:
        document = _load_json(raw, where)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid(where, "`__metadata__` is not an object of strings")
    specs: _Specs = {}
    found = [(name, _entry(name, value, where, specs)) for name, value in document.items()]
    found.sort(key=lambda item: (item[1][1:], item[0]))
    entries = dict(found)
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            what = (
                "overlaps the tensor before it"
                if entry.start < position
                else "leaves a gap before it"
            )
            raise _invalid(
                where,
                f"tensor `{printable(name)}` {what}"
                f" (starts at byte {entry.start}, expected {position})",
            )
        position = entry.end
    data_start = 8 + len(raw)
    header = Header(
        entries=entries,
        metadata=dict(sorted(metadata.items())),
        data_start=data_start,
        nbytes_data=position,
    )
    if nbytes_file is not None and nbytes_file != header.nbytes_file:
        if nbytes_file < header.nbytes_file:
            last = next(n for n, e in entries.items() if data_start + e.end > nbytes_file)
            raise InputError(
                f"`{where}` is truncated: {header.nbytes_file - nbytes_file} bytes are missing,"
                f" from tensor `{printable(last)}` on",
                where=where,
                hint="download or copy the file again",
                code="input.truncated",
            )
        raise _invalid(
            where,
            f"{nbytes_file - header.nbytes_file} bytes follow the last tensor that no tensor owns",
        )
    return header


def _quickly(raw: bytes) -> dict[str, object] | None:
    """The header's document by a parser that is faster but says less; None for what `_load_json`
    must look at.

    A name that is there twice is seen by counting: without escapes every quote is an end of a text,
    and a document whose entries are all well-formed has ten for each tensor.
    """
    if not raw.startswith(b"{") or b"\\" in raw or b"-0" in raw:
        return None
    try:
        document: dict[str, object] = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    metadata = document.get("__metadata__")
    tensors, quotes = len(document), 0
    if metadata is not None:
        tensors -= 1
        quotes = 2 + 4 * len(metadata) if isinstance(metadata, dict) else -1
    return document if raw.count(b'"') == quotes + 10 * tensors else None


def _load_json(raw: bytes, where: str) -> dict[str, object]:
    # The standard parser, not orjson: only its pairs hook shows a name that is there twice.
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated.extend(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        return result

    def no_constant(text: str) -> object:
        raise ValueError(f"`{text}` is not JSON")

    def no_minus_zero(text: str) -> int:
        if text == "-0":  # which safetensors does not take for a size
            raise ValueError("`-0` is not a size")
        return int(text)

    if not raw.startswith(b"{"):
        raise _invalid(where, "its header does not begin with `{`")
    try:
        text = raw.decode("utf-8")
        document = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=no_constant,
            # A function of ours for each number is a third of the parsing.
            parse_int=no_minus_zero if "-0" in text else None,
        )
        if repeated:
            raise _invalid(where, f"`{printable(repeated[0])}` is in the header twice")
        _all_text(document)
    except (UnicodeError, ValueError, RecursionError) as error:
        raise _invalid(where, f"its header is not JSON ({printable(str(error))})") from error
    assert isinstance(document, dict)  # it begins with `{`
    return document


def _all_text(document: dict[str, object]) -> None:
    # A lone surrogate escape parses, but is not text. Raises: UnicodeEncodeError.
    words = list(document)
    metadata = document.get("__metadata__")
    if isinstance(metadata, dict):
        words += [word for item in metadata.items() for word in item if isinstance(word, str)]
    "".join(words).encode("utf-8")


def _entry(name: str, value: object, where: str, specs: _Specs) -> Entry:
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise _bad(where, name, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(where, name, f"has the unknown dtype `{printable(str(dtype))}`")
    if not _are_sizes(shape):
        raise _bad(where, name, "has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(where, name, "has data_offsets that are not two byte positions")
    start, end = offsets
    # Tensors by the thousand have the same spec: they share one, and what is computed of it.
    spec = specs.get((dtype, *shape))
    if spec is None:
        spec = specs[dtype, *shape] = _spec(name, dtype, shape, where)
    if end - start != spec.nbytes or spec.numel * DTYPES[dtype].bits % 8:
        nbytes = spec.numel * DTYPES[dtype].bits / 8
        raise _bad(
            where,
            name,
            f"is {dtype}{shape}, which is {nbytes:g} bytes, but its offsets span {end - start}",
        )
    return Entry(spec, start, end)


def _spec(name: str, dtype: str, shape: list[int], where: str) -> TensorSpec:
    numel = 1
    for size in shape:
        numel *= size
        if numel > _MAX_FILE_BYTES:
            raise _bad(where, name, "has a shape whose size overflows")
    return TensorSpec(dtype, tuple(shape))


def _are_sizes(value: object) -> bool:
    if type(value) is not list:
        return False
    # A list, since two generators for each tensor would take as long as all else here.
    return not [s for s in value if type(s) is not int or not 0 <= s <= _MAX_FILE_BYTES]


def _bad(where: str, name: str, what: str) -> InputError:
    return _invalid(where, f"tensor `{printable(name)}` {what}")


def _invalid(where: str, what: str) -> InputError:
    return InputError(
        f"`{where}` is not a valid safetensors file: {what}", where=where, code="input.header"
    )


def lay_out(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Lay a file out: its first bytes (length and padded JSON) and where every tensor goes.

    Tensors are ordered as safetensors orders them (dtype rank descending, then name), metadata by
    key. Equal arguments give equal bytes on every machine.
    """
    placed = _placed(specs)
    head = _head(placed, metadata)
    return head, Header(
        entries={name: Entry(spec, *span) for name, spec, span in placed},
        metadata=dict(sorted(metadata.items())),
        data_start=len(head),
        nbytes_data=total_nbytes(specs.values()),
    )


def nbytes_laid_out(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """Size in bytes of the file that `lay_out` lays out."""
    placed = _placed(specs)
    nbytes = placed[-1][2][1] if placed else 0
    return len(_head(placed, metadata)) + nbytes


def _head(placed: Iterable[_Placed], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    document |= {
        name: {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        for name, spec, span in placed
    }
    raw = orjson.dumps(document)
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise InputError(
            f"the output's header would be {len(raw)} bytes,"
            f" over the format's limit of {MAX_HEADER_BYTES}",
            hint="remove metadata entries or split the checkpoint",
            code="input.header",
        )
    return len(raw).to_bytes(8, "little") + raw


def _placed(specs: Mapping[str, TensorSpec]) -> list[_Placed]:
    """Every tensor in file order with its byte range."""
    by_dtype: dict[str, list[str]] = {}
    for name, spec in specs.items():
        by_dtype.setdefault(spec.dtype, []).append(name)
    ordered = sorted(by_dtype, key=lambda dtype: -DTYPES[dtype].rank)
    names = [n for dtype in ordered for n in sorted(by_dtype[dtype])]  # as in UTF-8
    found = [specs[name] for name in names]
    ends = [*accumulate([spec.nbytes for spec in found], initial=0)]
    return [*zip(names, found, pairwise(ends), strict=True)]


def total_nbytes(specs: Iterable[TensorSpec]) -> int:
    """Sum of the tensors' sizes in bytes."""
    return sum(spec.nbytes for spec in specs)
