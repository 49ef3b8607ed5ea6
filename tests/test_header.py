"""Headers: byte-equal to safetensors' writer, golden bytes, hostile bytes refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import make
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cq.core.header as header_module
from cq.core.dtypes import DTYPES, TensorSpec, spec_of
from cq.core.errors import InputError
from cq.core.header import Header, header_length, lay_out, parse, printable, total_nbytes

WHERE = "models/base.safetensors"


def read(raw: bytes) -> Header:
    """Parse a whole file's bytes as a source does."""
    length = header_length(raw[:8], where=WHERE, nbytes_file=len(raw))
    return parse(raw[8 : 8 + length], where=WHERE, nbytes_file=len(raw))


def refused(raw: bytes) -> InputError:
    """The error for `raw`, which must name the file and exit with 3."""
    with pytest.raises(InputError) as caught:
        read(raw)
    assert caught.value.exit_code == 3
    assert WHERE in caught.value.message
    assert caught.value.where == WHERE
    return caught.value


def spec_map(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def whole_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    head, header = lay_out(spec_map(tensors), metadata)
    return head + b"".join(make.bits(tensors[name]) for name in header.entries)


# Laying out -------------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from('"\\/\x00\x01\b\t\n\f\r\x1b\x7f\u2028éß漢😀'),
    ),
    max_size=12,
)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
SPECS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(make.TORCH_DTYPES), SHAPES), max_size=8
).map(lambda found: {name: TensorSpec(*spec) for name, spec in found.items()})


@given(SPECS, st.dictionaries(TEXT, TEXT, max_size=1))
@settings(max_examples=200)
def test_lay_out_gives_the_bytes_of_safetensors(
    specs: dict[str, TensorSpec], metadata: dict[str, str]
) -> None:
    tensors = {name: make.noise(spec.dtype, spec.shape, name) for name, spec in specs.items()}
    expected = safetensors.torch.save(tensors, metadata=metadata or None)
    assert expected == whole_file(tensors, metadata)


@pytest.mark.parametrize("dtype", make.TORCH_DTYPES)
def test_lay_out_gives_the_bytes_of_safetensors_for_every_dtype(dtype: str) -> None:
    tensors = {
        "layer.weight": make.noise(dtype, (3, 5)),
        "a": make.noise(dtype, ()),
        "empty": make.noise(dtype, (0, 7)),
        "byte": torch.tensor([7], dtype=torch.uint8),
    }
    assert safetensors.torch.save(tensors) == whole_file(tensors, {})


@given(SPECS, st.dictionaries(TEXT, TEXT, max_size=4))
def test_parse_returns_what_lay_out_laid_out(
    specs: dict[str, TensorSpec], metadata: dict[str, str]
) -> None:
    head, header = lay_out(specs, metadata)
    assert len(head) == header.data_start
    assert total_nbytes(specs.values()) == header.nbytes_data
    again = parse(head[8:], where=WHERE, nbytes_file=header.nbytes_file)
    assert header.entries == again.entries
    assert dict(sorted(metadata.items())) == again.metadata
    assert (header.data_start, header.nbytes_data) == (again.data_start, again.nbytes_data)


def test_lay_out_gives_golden_bytes() -> None:
    tensors = {
        "b": torch.tensor([1, 2], dtype=torch.uint8),
        "a": torch.tensor([[-1.0]]),
    }
    expected = (
        b"\xa0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt","title":"tiny"},'
        b'"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
        b"      "
        b"\x00\x00\x80\xbf"
        b"\x01\x02"
    )
    assert expected == whole_file(tensors, {"title": "tiny", "format": "pt"})


def test_lay_out_of_nothing_gives_golden_bytes() -> None:
    head, header = lay_out({}, {})
    assert head == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "
    assert {} == read(head).entries == header.entries


def test_dtype_table_has_the_order_of_safetensors() -> None:
    """safetensors sorts a file by its enum's order: one tensor of each dtype shows that order."""
    tensors = {name: make.noise(name, (8,)) for name in make.TORCH_DTYPES}
    packed = getattr(torch, "float4_e2m1fn_x2", None)
    if packed is not None:
        tensors["F4"] = torch.zeros(4, dtype=torch.uint8).view(packed)
    raw = safetensors.torch.save(tensors)
    written = list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))
    assert [name for name in reversed(DTYPES) if name in tensors] == written


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_table_is_one_of_safetensors(name: str) -> None:
    dtype = DTYPES[name]
    raw = make.file_bytes({"t": make.entry(name, [8], 0, dtype.bits)}, bytes(dtype.bits))
    assert [("t", name)] == [(n, t["dtype"]) for n, t in safetensors.deserialize(raw)]
    assert TensorSpec(name, (8,)) == read(raw).entries["t"].spec


def test_lay_out_sorts_metadata_by_key() -> None:
    entries = {"zebra": "1", "apple": "2", "Ápple": "3", "10": "4", "9": "5"}
    head, _ = lay_out({}, entries)
    document = json.loads(head[8:])
    assert sorted(entries) == list(document["__metadata__"])
    assert head == lay_out({}, dict(reversed(entries.items())))[0]


def test_lay_out_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; from cq.core.header import lay_out; from cq.core.dtypes import TensorSpec;"
        "names = {f'layer.{i}' for i in range(40)};"
        "specs = {n: TensorSpec('F32' if n.endswith('1') else 'I8', (2,)) for n in names};"
        "meta = {m: 'x' for m in {f'key {i}' for i in range(40)}};"
        "sys.stdout.buffer.write(lay_out(specs, meta)[0])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2026")
    }
    assert len(outputs) == 1


def test_lay_out_does_not_depend_on_the_order_of_its_arguments() -> None:
    specs = {f"t{i}": TensorSpec(("F32", "I8", "BF16")[i % 3], (i,)) for i in range(9)}
    assert lay_out(specs, {})[0] == lay_out(dict(reversed(specs.items())), {})[0]


def test_lay_out_aligns_data_to_8_bytes() -> None:
    for length in range(1, 20):
        head, _ = lay_out({"x" * length: TensorSpec("F64", (1,))}, {})
        assert len(head) % 8 == 0


def test_lay_out_refuses_a_header_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cq.core.header.MAX_HEADER_BYTES", 100)
    with pytest.raises(InputError, match="over the format's limit"):
        lay_out({}, {"note": "x" * 100})


# Hostile bytes ----------------------------------------------------------------------------------

TINY = make.file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": make.entry("F32", [2], 0, 8),
        "b": make.entry("I8", [3], 8, 11),
    },
    bytes(11),
)


@pytest.mark.parametrize("length", range(len(TINY)))
def test_parse_refuses_a_file_truncated_at_any_byte(length: int) -> None:
    assert refused(TINY[:length]).code == "input.truncated"


def test_parse_names_the_first_tensor_that_a_truncated_file_lacks() -> None:
    assert "`a`" in refused(TINY[:-4]).message
    assert "`b`" in refused(TINY[:-1]).message
    assert "1 bytes are missing" in refused(TINY[:-1]).message


def announced(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(announced(0), id="length-0"),
        pytest.param(announced(1), id="length-1"),
        pytest.param(announced(3), id="length-past-the-end"),
        pytest.param(announced(100_000_001), id="length-100-MB-and-1"),
        pytest.param(announced(2**62), id="length-2-62"),
        pytest.param(announced(2**64 - 1), id="length-2-64"),
        pytest.param(b"", id="empty-file"),
        pytest.param(b"\x00" * 64, id="zeros"),
        pytest.param(make.file_bytes(b"not json"), id="not-json"),
        pytest.param(make.file_bytes(b"[]"), id="array"),
        pytest.param(make.file_bytes(b'"text"'), id="string"),
        pytest.param(make.file_bytes(b"null"), id="null"),
        pytest.param(make.file_bytes(b" {}"), id="leading-space"),
        pytest.param(make.file_bytes(b"\xef\xbb\xbf{}"), id="byte-order-mark"),
        pytest.param(make.file_bytes(b"{} {}"), id="two-documents"),
        pytest.param(make.file_bytes(b"{}\0\0\0"), id="padded-with-nul"),
        pytest.param(make.file_bytes(b'{"a":1'), id="unclosed"),
        pytest.param(make.file_bytes(b"{'a':1}"), id="single-quotes"),
        pytest.param(make.file_bytes(b'{"a\xff":1}'), id="not-utf-8"),
        pytest.param(make.file_bytes(b'{"\xed\xa0\x80":1}'), id="utf-8-surrogate"),
        pytest.param(make.file_bytes(b'{"a\nb":1}'), id="raw-control-character"),
        pytest.param(make.file_bytes(b'{"a":NaN}'), id="nan"),
        pytest.param(make.file_bytes(b'{"a":-Infinity}'), id="infinity"),
        pytest.param(make.file_bytes(b'{"a":' * 50_000), id="deep-objects"),
        pytest.param(make.file_bytes(b'{"a":' + b"[" * 100_000), id="deep-arrays"),
        pytest.param(
            make.file_bytes(b'{"a":' * 5000 + b"1" + b"}" * 5000), id="deep-and-well-formed"
        ),
        pytest.param(make.file_bytes(b'{"a":' + b"9" * 5000 + b"}"), id="5000-digits"),
    ],
)
def test_parse_refuses(raw: bytes) -> None:
    refused(raw)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (make.entry("F33", [2], 0, 8), "`F33`"),
        (make.entry("f32", [2], 0, 8), "`f32`"),
        (make.entry(32, [2], 0, 8), "dtype"),
        (make.entry(None, [2], 0, 8), "dtype"),
        (make.entry(["F32"], [2], 0, 8), "dtype"),
        (make.entry("F32", [-2], 0, 8), "shape"),
        (make.entry("F32", [2.0], 0, 8), "shape"),
        (make.entry("F32", [True], 0, 4), "shape"),
        (make.entry("F32", ["2"], 0, 8), "shape"),
        (make.entry("F32", [2**64], 0, 8), "shape"),
        (make.entry("F32", [2**63], 0, 8), "shape"),
        (make.entry("F32", 2, 0, 8), "shape"),
        (make.entry("F32", {"0": 2}, 0, 8), "shape"),
        (make.entry("F32", None, 0, 8), "shape"),
        (make.entry("F32", [2**31, 2**31, 2**31], 0, 8), "overflow"),
        (make.entry("F32", [2**62, 4], 0, 8), "overflow"),
        (make.entry("F32", [2], 0, 7), "offsets span 7"),
        (make.entry("F32", [3], 0, 8), "12 bytes"),
        (make.entry("F32", [2], 8, 0), "span -8"),
        (make.entry("F32", [2], -8, 0), "data_offsets"),
        (make.entry("F32", [2], 0, -8), "data_offsets"),
        (make.entry("F32", [2], 0, 8.0), "data_offsets"),
        (make.entry("F32", [1], False, 4), "data_offsets"),
        (make.entry("F32", [2], 2**64, 2**64 + 8), "data_offsets"),
        (make.entry("F32", [2], "0", "8"), "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": {}}, "data_offsets"),
        ({"dtype": "F32", "shape": [2]}, "exactly dtype, shape and data_offsets"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "exactly dtype, shape and data_offsets"),
        ({"shape": [2], "data_offsets": [0, 8]}, "exactly dtype, shape and data_offsets"),
        ({**make.entry("F32", [2], 0, 8), "stride": [1]}, "exactly dtype"),
        ([], "exactly dtype"),
        (None, "exactly dtype"),
        ("F32", "exactly dtype"),
        (make.entry("F4", [3], 0, 1), "1.5 bytes"),
        (make.entry("F4", [3], 0, 2), "1.5 bytes"),
        (make.entry("F6_E2M3", [1], 0, 1), "0.75 bytes"),
    ],
)
def test_parse_refuses_an_entry_and_names_its_tensor(entry: Any, words: str) -> None:
    error = refused(make.file_bytes({"layer.weight": entry}, bytes(8)))
    assert "`layer.weight`" in error.message
    assert words in error.message


@pytest.mark.parametrize(
    "sizes", [b'"shape":[-0],"data_offsets":[0,0]', b'"shape":[0],"data_offsets":[-0,0]']
)
def test_parse_refuses_negative_zero(sizes: bytes) -> None:
    """Python reads `-0` as the integer 0; safetensors refuses the file."""
    refused(make.file_bytes(b'{"a":{"dtype":"I8",%s}}' % sizes))


def test_parse_takes_packed_tensors_of_whole_bytes() -> None:
    raw = make.file_bytes(
        {"four": make.entry("F4", [3, 2], 0, 3), "six": make.entry("F6_E3M2", [4], 3, 6)}, bytes(6)
    )
    assert [(n, e.spec.nbytes) for n, e in read(raw).entries.items()] == [("four", 3), ("six", 3)]


def test_parse_refuses_a_tensor_named_twice() -> None:
    entry = json.dumps(make.entry("F32", [1], 0, 4)).encode()
    raw = make.file_bytes(b'{"a":' + entry + b',"b":' + entry + b',"a":' + entry + b"}", bytes(4))
    assert "`a` is in the header twice" in refused(raw).message


def test_parse_refuses_a_key_named_twice_in_an_entry() -> None:
    raw = b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}'
    assert "`shape` is in the header twice" in refused(make.file_bytes(raw, bytes(4))).message


def test_parse_refuses_a_metadata_key_named_twice() -> None:
    raw = b'{"__metadata__":{"format":"pt","format":"np"}}'
    assert "`format` is in the header twice" in refused(make.file_bytes(raw)).message


def test_parse_refuses_a_double_name_beside_an_entry_that_lacks_as_many_texts() -> None:
    """Counting quotes cannot tell: what is doubled makes up for what is missing."""
    entry = json.dumps(make.entry("U8", [0], 0, 0)).encode()
    raw = (
        b'{"a":'
        + entry
        + b',"a":'
        + entry
        + b',"b":{"shape":[0],"data_offsets":[0,0]},"c":{"shape":[0]}}'
    )
    assert raw.count(b'"') == 10 * 3
    refused(make.file_bytes(raw))


@given(
    st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"), st.integers(0, 3), max_size=4
    ),
    st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    st.booleans(),
)
def test_parse_reads_the_same_by_either_parser(
    tensors: dict[str, int], metadata: dict[str, str] | None, escaped: bool
) -> None:
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, size in tensors.items():
        document[name] = make.entry("U8", [size], at, at := at + size)
    raw = json.dumps(document, ensure_ascii=escaped).encode()
    slow = header_module._load_json(raw, WHERE)
    assert header_module._quickly(raw) in (None, slow)
    assert (header_module._quickly(raw) is None) == (b"\\" in raw or b"-0" in raw)


@pytest.mark.parametrize(
    ("second", "nbytes", "words"),
    [
        (make.entry("F32", [2], 0, 8), 8, "overlaps"),
        (make.entry("F32", [2], 4, 12), 12, "overlaps"),
        (make.entry("F32", [2], 12, 20), 20, "gap"),
    ],
)
def test_parse_refuses_overlaps_and_gaps(second: Any, nbytes: int, words: str) -> None:
    raw = make.file_bytes({"a": make.entry("F32", [2], 0, 8), "z": second}, bytes(nbytes))
    message = refused(raw).message
    assert "tensor `z`" in message
    assert words in message


def test_parse_refuses_a_gap_before_the_first_tensor() -> None:
    raw = make.file_bytes({"a": make.entry("F32", [2], 4, 12)}, bytes(12))
    assert "tensor `a` leaves a gap" in refused(raw).message


def test_parse_refuses_an_empty_tensor_in_a_gap() -> None:
    raw = make.file_bytes(
        {"a": make.entry("F32", [1], 0, 4), "b": make.entry("F32", [0], 8, 8)}, bytes(8)
    )
    assert "tensor `b` leaves a gap" in refused(raw).message


def test_parse_refuses_bytes_that_no_tensor_owns() -> None:
    assert "3 bytes follow the last tensor" in refused(TINY + b"abc").message


@pytest.mark.parametrize("metadata", [[], "pt", 1, {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_parse_refuses_metadata_that_is_not_strings(metadata: Any) -> None:
    raw = make.file_bytes({"__metadata__": metadata})
    assert "`__metadata__` is not an object of strings" in refused(raw).message


LONE = b"\\ud800"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(
            b'{"%s":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}' % LONE, id="tensor-name"
        ),
        pytest.param(b'{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,1]}}' % LONE, id="dtype"),
        pytest.param(b'{"__metadata__":{"%s":"x"}}' % LONE, id="metadata-key"),
        pytest.param(b'{"__metadata__":{"x":"%s"}}' % LONE, id="metadata-value"),
    ],
)
def test_parse_refuses_lone_surrogates(header: bytes) -> None:
    """Such text cannot be written again: no output could carry it."""
    refused(make.file_bytes(header, b"\0" if b"shape" in header else b""))


@pytest.mark.parametrize(
    ("entries", "nbytes"),
    [
        ({"evil\n\x1b[2Jname": make.entry("F99", [1], 0, 1)}, 1),
        ({"a": make.entry("I8", [1], 0, 1), "evil\n\x1b[2Jname": make.entry("I8", [1], 0, 1)}, 1),
        ({"a": make.entry("I8", [1], 0, 1), "evil\n\x1b[2Jname": make.entry("I8", [1], 2, 3)}, 3),
        ({"evil\n\x1b[2Jname": make.entry("I8", [5], 0, 5)}, 2),
        ({"a": make.entry("evil\n\x1b[2Jname", [1], 0, 1)}, 1),
    ],
    ids=["entry", "overlap", "gap", "truncated", "dtype"],
)
def test_parse_messages_carry_no_control_characters(entries: Any, nbytes: int) -> None:
    """A file's names must not be able to move the cursor of the terminal that shows the error."""
    message = refused(make.file_bytes(entries, bytes(nbytes))).message
    assert message.isprintable()


def test_printable_shortens_and_escapes() -> None:
    assert printable("a\x1b\n\ud800") == "a\\x1b\\n\\ud800"
    assert len(printable("x" * 50, limit=20)) == 20
    assert printable("x" * 50, limit=20).endswith("…")


MUTANT = make.file_bytes(
    {
        "__metadata__": {"format": "pt", "ключ": "значение"},
        "blocks.0.weight": make.entry("BF16", [2, 3], 0, 12),
        "blocks.0.bias": make.entry("F32", [], 12, 16),
        "codes": make.entry("F4", [2], 16, 17),
        "none": make.entry("I8", [0, 4], 17, 17),
    },
    bytes(17),
)


@given(st.data())
@settings(max_examples=700)
def test_parse_gives_a_header_or_an_input_error(data: st.DataObject) -> None:
    """Whatever the bytes; and what cq takes for a file, safetensors loads as the same tensors."""
    raw = bytearray(MUTANT)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "delete", "insert", "digit", "copy"]))
        if how == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "delete":
            del raw[at : at + data.draw(st.integers(1, 8))]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif how == "digit":
            raw[at] = data.draw(st.sampled_from(b'0123456789-.eE"[]{},:'))
        else:
            source = data.draw(st.integers(8, len(raw)))
            raw[at:at] = raw[source : source + data.draw(st.integers(1, 60))]
        if len(raw) < 2:
            break
    if data.draw(st.booleans()) and len(raw) > 25:  # let most mutants past the length check
        raw[:8] = (len(raw) - 8 - 17).to_bytes(8, "little")
    try:
        header = read(bytes(raw))
    except InputError:
        return
    loaded = {
        name: (t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(bytes(raw))
    }
    assert loaded == {name: (e.spec.dtype, e.spec.shape) for name, e in header.entries.items()}


@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=4),
            st.sampled_from(["F32", "I8", "dtype", "shape", "data_offsets"]),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(
                    st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]),
                    st.text(max_size=3),
                ),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
@settings(max_examples=150)
def test_parse_gives_a_header_or_an_input_error_for_any_json(document: Any) -> None:
    raw = make.file_bytes(json.dumps({"t": document, "__metadata__": document}).encode(), bytes(8))
    try:
        read(raw)
    except InputError as error:
        assert WHERE in error.message
