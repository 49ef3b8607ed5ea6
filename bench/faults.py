"""Hard faults, struck at real processes: kill -9 at any moment of any command, and a full disk.

Owns the list of commands that write, how one is struck, and what must hold afterwards: every final
name holds what it held before or the whole output, and the same command, given again, makes the
very bytes of a run that nobody disturbed and leaves nothing else behind. `python -m bench.faults`
strikes as often as it is told; the test suite strikes a few times.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["cq.cli.main", "cq.core.shards", "cq_quant.stage", "cq_merge.stage", "torch"]
_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that runs in a directory with `base`, `tuned`, `lora` and a plan, and the
    names that it writes; those of `kept` are there before."""

    name: str
    words: str
    kept: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """The words of the command line."""
        return self.words.split()


COMMANDS = (
    Command("quant", "quant base.safetensors --optimizer rtn -o out.safetensors"),
    Command("quant quip", "quant base.safetensors --optimizer quip -o out.safetensors"),
    Command("quant nvfp4", "quant base.safetensors --format nvfp4 -o out.safetensors"),
    Command("merge", "merge base.safetensors lora.safetensors:0.5 -o out.safetensors"),
    Command(
        "extract",
        "merge --extract tuned.safetensors --from base.safetensors --rank 4 -o out.safetensors",
    ),
    Command("edit", "edit base.safetensors --remove-keys *.norm.* -o out.safetensors"),
    Command(
        "edit in place",
        "edit own.safetensors --remove-keys *.norm.* --in-place",
        ("own.safetensors",),
    ),
    Command("edit shards", "edit base.safetensors --max-shard-size 4MB -o out.safetensors"),
    Command(
        "edit replaces shards",
        "edit base.safetensors --max-shard-size 4MB -o sharded.safetensors --force",
    ),
    Command("run", "run plan.json -o out.safetensors"),
    Command("run replaces", "run plan.json -o own.safetensors --force", ("own.safetensors",)),
    Command("run a share", "run plan.json -o out.safetensors --shard 1/1"),
)


def prepare(directory: Path, *, blocks: int = 12, width: int = 512) -> Path:
    """Make the inputs of the commands in `directory`."""
    rng = torch.Generator().manual_seed(7)
    base: dict[str, torch.Tensor] = {}
    lora: dict[str, torch.Tensor] = {}
    for i in range(blocks):
        layer = f"blocks.{i}.linear"
        base[f"{layer}.weight"] = torch.randn(width, width, generator=rng).bfloat16() * 0.02
        base[f"blocks.{i}.norm.weight"] = torch.randn(width + i, generator=rng)
        lora[f"{layer}.lora_down.weight"] = torch.randn(4, width, generator=rng) * 0.1
        lora[f"{layer}.lora_up.weight"] = torch.randn(width, 4, generator=rng) * 0.1
    tuned = {n: t + (0.01 * t.float().sign()).to(t.dtype) for n, t in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned), ("lora", lora)):
        save_file(tensors, directory / f"{name}.safetensors")
    for words in (
        "quant base.safetensors --optimizer rtn --defer",
        "edit tuned.safetensors --max-shard-size 4MB -o sharded.safetensors",
    ):
        code, _, told = run(words.split(), directory)
        assert code == 0, told
    return directory


def _body(
    argv: Sequence[str], directory: str, told: Any, limit: int | None, ready: Any | None
) -> None:
    from cq.cli.main import run as run_line
    from cq.cli.output import Terminal

    os.chdir(directory)
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    out, err = io.StringIO(), io.StringIO()
    if ready is not None:
        ready.set()
    code = run_line(argv, Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    with contextlib.suppress(OSError, ValueError):
        told.send((out.getvalue(), err.getvalue()))
    os._exit(code)


def start(
    argv: Sequence[str], directory: Path, *, limit: int | None = None, ready: Any | None = None
) -> tuple[Any, Any]:
    """A process that runs one command line in `directory`, and the connection on which it tells
    what it printed. `limit` is what a file may grow to, in bytes."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_body, args=(list(argv), str(directory), there, limit, ready))
    process.start()
    there.close()
    return process, here


def run(argv: Sequence[str], directory: Path, *, limit: int | None = None) -> tuple[int, str, str]:
    """Run one command line to its end: the exit code, stdout and stderr. `--defer` prints the plan,
    which is kept as `plan.json`."""
    process, here = start(argv, directory, limit=limit)
    out, err = ("", "")
    with contextlib.suppress(EOFError):
        if here.poll(_TIMEOUT):
            out, err = here.recv()
    process.join(_TIMEOUT)
    code = process.exitcode
    if code is None:
        process.kill()
        raise TimeoutError(f"`cq {' '.join(argv)}` hangs")
    if "--defer" in argv:
        (directory / "plan.json").write_text(out)
    return code, out, err


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under `directory` by its name, less the inputs."""
    inputs = {"base.safetensors", "tuned.safetensors", "lora.safetensors", "plan.json"}
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in inputs
    }


@contextmanager
def workplace(inputs: Path, command: Command) -> Iterator[Path]:
    """A directory with links to the inputs, and with what the command finds there."""
    with tempfile.TemporaryDirectory(dir=inputs.parent, prefix="strike-") as name:
        directory = Path(name)
        for path in inputs.iterdir():
            (directory / path.name).hardlink_to(path)
        for kept in command.kept:
            shutil.copy2(inputs / "base.safetensors", directory / kept)
        yield directory


def undisturbed(inputs: Path, command: Command) -> tuple[dict[str, bytes], float]:
    """What the command writes when nobody disturbs it, and the seconds that it takes."""
    with workplace(inputs, command) as directory:
        started = time.monotonic()
        code, _, err = run(command.argv, directory)
        assert code == 0, f"{command.name}: {err}"
        return contents(directory), time.monotonic() - started


def strike(
    inputs: Path,
    command: Command,
    whole: Mapping[str, bytes],
    moment: float,
    *,
    again: int = 1,
    once_begun: bool = False,
) -> str:
    """Kill the command `moment` seconds after its start, or after it has begun to write, `again`
    times, and give it once more.

    What came of it: `before` (it had not begun), `resumed`, or `after` (it was done).
    Raises: AssertionError naming what does not hold.
    """
    with workplace(inputs, command) as directory:
        before = contents(directory)
        for _ in range(again):
            ready = _CONTEXT.Event()
            process, here = start(command.argv, directory, ready=ready)
            ready.wait(_TIMEOUT)
            while once_begun and process.is_alive() and not _begun(directory):
                time.sleep(0.0005)
            time.sleep(moment)
            process.kill()
            process.join(_TIMEOUT)
            here.close()
            found = contents(directory)
            for name, value in found.items():
                if ".partial" in name or ".shares" in name:
                    continue
                assert value in {before.get(name), whole.get(name)}, f"{name} is broken"
            _check_shards(found, before, whole)
            begun = _begun(directory)
            if not begun and all(found.get(name) == value for name, value in whole.items()):
                return "after"
        code, _, err = run(command.argv, directory)
        final = contents(directory)
        if (code == 4 and "exists already" in err) or "matches no" in err:
            # Killed between the name and tidying up: what lies there is whole.
            left = {name for name in final if name not in whole}
            assert all(name.endswith(".journal") or ".shares" in name for name in left), left
            final = {name: final[name] for name in whole}
            code = 0
        assert code == 0, f"given again, it fails: {err}"
        assert final == whole, f"other bytes or files: {sorted(final)} for {sorted(whole)}"
        return "resumed" if begun else "before"


def _check_shards(*states: Mapping[str, bytes]) -> None:
    """An index that is there speaks of the files that were there before, or that were made."""
    for index in (name for name in states[0] if name.endswith(".safetensors.index.json")):
        stem = index.removesuffix(".safetensors.index.json")
        own = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors|{re.escape(index)}")
        found, *sets = (
            {name: value for name, value in state.items() if own.fullmatch(name)}
            for state in states
        )
        assert found in sets, f"an index of mixed files: {sorted(found)}"


def _begun(directory: Path) -> bool:
    return any(".partial" in path.name or ".shares" in path.name for path in directory.iterdir())


def fill_disk(inputs: Path, command: Command, whole: Mapping[str, bytes], limit: int) -> bool:
    """Run the command where no file grows beyond `limit` bytes; whether it could not be done.

    Raises: AssertionError unless it is one error with exit code 5, and leaves what was there.
    """
    with workplace(inputs, command) as directory:
        before = contents(directory)
        code, _, err = run(command.argv, directory, limit=limit)
        if code == 0:
            assert contents(directory) == whole
            return False
        assert code == 5, f"{command.name} at {limit}: exit {code}: {err}"
        assert err.count("error:") == 1 and "Traceback" not in err, err
        left = contents(directory)
        assert left == before, f"left {sorted(left)}"
        return True


def _report(done: Mapping[str, Mapping[str, int]], failures: Sequence[str], seconds: float) -> int:
    document = {"seconds": round(seconds, 1), "commands": done, "failures": failures}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Strike, and tell as JSON how often and what came of it."""
    parser = argparse.ArgumentParser(prog="bench.faults", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("out/faults"))
    asked = parser.parse_args(argv)
    moments = random.Random(asked.seed)
    asked.dir.mkdir(parents=True, exist_ok=True)
    inputs = asked.dir / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    prepare(inputs, blocks=24)
    started = time.monotonic()
    expected = {command.name: undisturbed(inputs, command) for command in COMMANDS}
    done: dict[str, dict[str, int]] = {command.name: {} for command in COMMANDS}
    failures: list[str] = []
    for i in range(asked.kills + asked.full_disks):
        command = COMMANDS[i % len(COMMANDS)]
        whole, seconds = expected[command.name]
        try:
            if i < asked.kills:
                once_begun = moments.random() < 0.7
                moment = moments.uniform(0, seconds * (0.3 if once_begun else 1.1))
                again = moments.choice([1, 1, 2, 3])
                came = strike(inputs, command, whole, moment, again=again, once_begun=once_begun)
            else:
                largest = max(map(len, whole.values()))
                limit = int(largest * moments.uniform(0, 1.05))
                came = "full" if fill_disk(inputs, command, whole, limit) else "fitted"
            done[command.name][came] = done[command.name].get(came, 0) + 1
        except (AssertionError, TimeoutError) as error:
            failures.append(f"{command.name}: {error}")
    return _report(done, failures, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
