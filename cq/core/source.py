"""Where bytes come from: safetensors files, shard sets, and streams spooled to a temporary file.

Owns opening, identity (fingerprints) and positioned reads. Reads use `pread` into memory that the
caller owns, not a memory map: a map of a file that somebody truncates kills the process with
SIGBUS, a short `pread` is an error with a name; and mapped pages would count as this process's
memory. Never imports torch at module level.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cq.core import files
from cq.core import header as headers
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InputError, PlanError, ResourceError
from cq.core.header import Header
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".safetensors.index.json"
FINGERPRINT = ("nbytes", "header", "sample")
_SAMPLES = 64
_SAMPLE_BYTES = 1024
_CUT_ELEMENTS = 1 << 20
_CUT_ROWS = 128  # the tallest tile of any storage format, so that a cut never splits one


def cuts(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """The canonical cut of a tensor into row segments `(start, stop)`, about 2^20 elements each.

    A function of the spec alone: whoever computes or reads a tensor does it in these segments, so
    results cannot depend on workers, budgets, or on whether a stage read a file or another stage.
    0-d tensors are one segment `(0, 1)`.
    """
    if not spec.shape:
        yield 0, 1
        return
    rows = spec.shape[0]
    step = max(1, _CUT_ELEMENTS // max(1, spec.row_numel))
    if spec.row_numel * _CUT_ROWS <= 16 * _CUT_ELEMENTS:
        step = max(_CUT_ROWS, step // _CUT_ROWS * _CUT_ROWS)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def largest_cut(spec: TensorSpec) -> int:
    """Elements of the largest segment that `cuts` makes."""
    if len(spec.shape) == 1 and spec.shape[0] <= _CUT_ELEMENTS:
        return spec.shape[0]  # biases and norms: half of the tensors of a file
    first = next(cuts(spec), (0, 0))
    return (first[1] - first[0]) * spec.row_numel


class SourceFile:
    """One safetensors file, open for positioned reads from any thread.

    Raises: InputError if the file is missing, unreadable, or not a valid safetensors file.
    """

    def __init__(self, path: Path, *, shown: str | None = None) -> None:
        self.path = path
        self.shown = shown or str(path)
        try:
            self._fd = os.open(path, files.READ_FLAGS)
        except OSError as error:
            raise unreadable(self.shown, error) from error
        except ValueError as error:  # a NUL in the name
            raise not_a_name(self.shown) from error
        try:
            stat = os.fstat(self._fd)
            self.nbytes = stat.st_size
            self.mtime_ns = stat.st_mtime_ns
            prefix = self._peek(8, 0)
            length = headers.header_length(prefix, where=self.shown, nbytes_file=self.nbytes)
            raw = self._peek(length, 8)
            self.header: Header = headers.parse(raw, where=self.shown, nbytes_file=self.nbytes)
            self.header_digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        except OSError as error:
            self.close()
            raise unreadable(self.shown, error) from error
        except BaseException:
            self.close()
            raise

    def _peek(self, nbytes: int, offset: int) -> bytes:
        buffer = bytearray(nbytes)
        return bytes(buffer[: files.read_at(self._fd, memoryview(buffer), offset)])

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def fileno(self) -> int:
        """The file descriptor, for kernel copies."""
        return self._fd

    def same_file(self, path: Path) -> bool:
        """Whether `path` is this very file, through links as well."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except OSError:
            return False

    def read_into(self, buffer: memoryview, offset: int, *, tensor: str) -> None:
        """Fill `buffer` from `offset`, counted from the start of the file.

        Raises: InputError if the file has become shorter since it was opened.
        """
        done = 0
        while done < len(buffer):
            try:
                got = files.read_at(self._fd, buffer[done:], offset + done)
            except OSError as error:
                raise unreadable(self.shown, error) from error
            if got == 0:
                raise InputError(
                    f"`{self.shown}` ends inside tensor `{printable(tensor)}`:"
                    " it was cut while cq was reading it",
                    where=self.shown,
                    hint="restore the file and run the command again",
                    code="input.truncated",
                )
            done += got

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor in memory of its own; the whole of a 0-d tensor."""
        import torch

        entry = self.header.entries[name]
        spec = entry.spec
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        part = TensorSpec(spec.dtype, shape)
        dtype = torch_dtype(spec.dtype)
        raw = torch.empty(part.nbytes, dtype=torch.uint8)
        if part.nbytes:
            offset = self.header.data_start + entry.start
            if spec.shape:
                offset += TensorSpec(spec.dtype, (start, *spec.shape[1:])).nbytes
            self.read_into(raw.numpy().data, offset, tensor=name)
        return raw.view(dtype).view(shape) if part.nbytes else torch.empty(shape, dtype=dtype)

    @cached_property
    def _print(self) -> dict[str, Any]:
        sample = hashlib.sha256()
        span = max(0, self.header.nbytes_data - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            at = self.header.data_start + span * i // (_SAMPLES - 1)
            sample.update(self._peek(_SAMPLE_BYTES, at))
        return {
            "nbytes": self.nbytes,
            "header": self.header_digest,
            "sample": "sha256:" + sample.hexdigest(),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the file's contents: size, header digest, and a digest of 64 samples
        spread over the data.

        The samples tell fine-tunes of one model apart, whose headers are equal, at the cost of 64
        small reads, once.
        """
        return dict(self._print)


def not_a_name(shown: str) -> InputError:
    """The error for text that cannot be the name of a file."""
    return InputError(f"`{printable(shown)}` is not a file name", code="input.missing")


def unreadable(shown: str, error: OSError) -> InputError:
    """The error for a file that the system refuses to open or read."""
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"`{shown}` does not exist", where=shown, hint=_near_file(shown), code="input.missing"
        )
    if isinstance(error, IsADirectoryError):
        return InputError(f"`{shown}` is a directory", where=shown, code="input.directory")
    return InputError(
        f"cannot read `{shown}`: {(error.strerror or str(error)).lower()}",
        where=shown,
        code="input.unreadable",
    )


def _near_file(shown: str) -> str | None:
    import difflib

    with suppress(OSError):
        names = [
            p.name for p in Path(shown).parent.iterdir() if p.suffix in {".safetensors", ".json"}
        ]
        near = difflib.get_close_matches(Path(shown).name, names, n=3)
        if near:
            return "did you mean " + ", ".join(f"`{n}`" for n in near) + "?"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint on disk: a file, or the shards that an index names, as one set of tensors.

    A `spooled` one came through a pipe: nobody can open it again by its path.
    """

    path: Path
    files: tuple[SourceFile, ...]
    owner: Mapping[str, SourceFile]
    metadata: Mapping[str, str]
    shown: str
    spooled: bool = False

    @property
    def stem(self) -> str:
        """The name without directory and suffixes, for naming outputs."""
        name = self.path.name
        for suffix in (INDEX_SUFFIX, ".safetensors"):
            if name.endswith(suffix):
                return name[: -len(suffix)]
        return name

    def spec(self, name: str) -> TensorSpec:
        """The spec of the tensor `name`."""
        return self.owner[name].header.entries[name].spec

    def fingerprint(self) -> dict[str, Any]:
        """As `SourceFile.fingerprint`, over all shards."""
        if len(self.files) == 1:
            return self.files[0].fingerprint()
        prints = [file.fingerprint() for file in self.files]
        return {
            "nbytes": sum(p["nbytes"] for p in prints),
            "header": _digest_of(p["header"] for p in prints),
            "sample": _digest_of(p["sample"] for p in prints),
        }


def _digest_of(parts: Iterator[str] | Any) -> str:
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a safetensors file, a `*.safetensors.index.json`, or a directory that holds one of
    either.

    Raises: InputError for anything that cannot be read as a checkpoint.
    """
    resolved = Path(path)
    if os.path.isdir(resolved):  # never raises, whatever the name
        resolved = _in_directory(resolved)
    if resolved.name.endswith(".index.json"):
        return _open_index(resolved)
    file = SourceFile(resolved)
    return Source(
        path=resolved,
        files=(file,),
        owner=dict.fromkeys(file.header.entries, file),
        metadata=file.header.metadata,
        shown=file.shown,
    )


def _in_directory(directory: Path) -> Path:
    try:
        names = sorted(p.name for p in directory.iterdir())
    except OSError as error:
        raise unreadable(str(directory), error) from error
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        found = [n for n in names if n.endswith(suffix)]
        if len(found) == 1:
            return directory / found[0]
        if found:
            raise InputError(
                f"`{directory}` holds {len(found)} files that end in `{suffix}`",
                where=str(directory),
                hint="name one of them: " + ", ".join(f"`{n}`" for n in found[:5]),
                code="input.ambiguous",
            )
    raise InputError(
        f"`{directory}` holds no safetensors file and no `*{INDEX_SUFFIX}`",
        where=str(directory),
        code="input.missing",
    )


def _open_index(path: Path) -> Source:
    try:
        document = json.loads(files.read_document(path))
    except OSError as error:
        raise unreadable(str(path), error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"`{path}` is not JSON", where=str(path), code="input.index") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"`{path}` has no `weight_map`", where=str(path), code="input.index")
    names = set()
    for tensor, file_name in weight_map.items():
        if (
            not isinstance(file_name, str)
            or not file_name.endswith(".safetensors")
            or Path(file_name).name != file_name
        ):
            raise InputError(
                f"`{path}` puts tensor `{printable(tensor)}` into"
                f" `{printable(str(file_name))}`,"
                " which is not the name of a safetensors file beside it",
                where=str(path),
                code="input.index",
            )
        names.add(file_name)
    shards = {name: SourceFile(path.parent / name) for name in sorted(names)}
    owner: dict[str, SourceFile] = {}
    for tensor, file_name in sorted(weight_map.items()):
        if tensor not in shards[file_name].header.entries:
            raise InputError(
                f"`{path}` promises tensor `{printable(tensor)}` in `{file_name}`,"
                " which does not hold it",
                where=str(path),
                code="input.index",
            )
        owner[tensor] = shards[file_name]
    for file_name, file in shards.items():
        extra = next((t for t in file.header.entries if owner.get(t) is not file), None)
        if extra is not None:
            raise InputError(
                f"`{file_name}` holds tensor `{printable(extra)}`,"
                f" which `{path}` does not place there",
                where=str(path),
                hint="mend the index, or give the shard itself as the input",
                code="input.index",
            )
    metadata: dict[str, str] = {}
    for file in reversed(list(shards.values())):
        metadata.update(file.header.metadata)
    return Source(
        path=path,
        files=tuple(shards.values()),
        owner=owner,
        metadata=dict(sorted(metadata.items())),
        shown=str(path),
    )


def open_stream(stream: IO[bytes], first: bytes, *, shown: str) -> Source:
    """Open safetensors bytes that come from a pipe, through an unlinked temporary file.

    `first` is what was already read of `stream`; the rest is copied, so that it can be read in any
    order.

    Raises: InputError if the bytes are not a whole safetensors file, ResourceError if the disk is
    full.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="cq-", suffix=".safetensors") as spool:
            spool.write(first)
            while chunk := stream.read(1 << 20):
                spool.write(chunk)
            spool.flush()
            file = SourceFile(Path(spool.name), shown=shown)
    except OSError as error:
        raise ResourceError(
            f"cannot keep the bytes from {shown} in `{tempfile.gettempdir()}`:"
            f" {(error.strerror or str(error)).lower()}",
            hint="set TMPDIR to a directory with room for the checkpoint, or give a file",
            code="resource.disk",
        ) from error
    return Source(
        path=Path("stdin.safetensors"),
        files=(file,),
        owner=dict.fromkeys(file.header.entries, file),
        metadata=file.header.metadata,
        shown=shown,
        spooled=True,
    )


def check_unchanged(inputs: Iterable[SourceFile]) -> None:
    """Check that no input was written to since it was opened.

    Raises: InputError naming the first that was: what was made of it is a mixture.
    """
    for file in inputs:
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (file.nbytes, file.mtime_ns):
            raise InputError(
                f"`{file.shown}` was changed while cq was reading it",
                where=file.shown,
                hint="run the command again when nothing writes to it any more",
                code="input.changed",
            )


def check_fingerprint(source: Source, expected: Mapping[str, Any]) -> None:
    """Check that `source` is still the file that a manifest was made from.

    Raises: PlanError naming what differs.
    """
    actual = source.fingerprint()
    for key in FINGERPRINT:
        if key in expected and expected[key] != actual[key]:
            raise PlanError(
                f"`{source.shown}` has changed since the manifest was made (its {key} differs)",
                where=source.shown,
                hint="run the earlier step of the pipeline again",
                code="plan.source_changed",
            )
