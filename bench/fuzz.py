"""A coverage-guided fuzzer over everything that cq reads from outside (`bench.hostile`).

Owns the loop: atheris (libFuzzer over Python's bytecode) makes cases from bytes and from JSON, each
target in processes of its own, under a limit of time, of memory, and of what a case may allocate:
twice its size and a constant. A finding is anything but a `CqError`; each kind is kept once, as a
file, and does not stop the run. `make fuzz` installs atheris.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SECONDS_PER_CASE = 10
_RSS_MB = 3000
_CONSTANT_BYTES = 24 << 20  # modules and tables that the first cases load stay, and count
_MEASURED_ONE_IN = 64
_LONGEST = 1 << 14
_NOTE_EVERY = 500
_WORDS = (
    *("F32", "BF16", "I8", "F8_E4M3", "F4", "shape", "dtype", "data_offsets", "__metadata__"),
    *("path", "op", "format", "nvfp4", "re:(a", "*", "", "\ud800", "\0", "../x.safetensors"),
    *("blocks.0", ".weight", "lora_up", "comfy_quant", "a" * 300, "NaN", "alpha", "rules"),
)
_NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, True, None)


def mutate_json(raw: bytes, rng: random.Random) -> bytes:
    """The JSON document `raw` with a few values changed, dropped, doubled or moved; `raw` itself
    if it is none."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    for _ in range(rng.randint(1, 3)):
        document = _changed(document, rng)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return raw


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        return _changed_inside(value, rng)
    how = rng.randrange(6)
    if how == 0:
        return rng.choice(_NUMBERS)
    if how == 1:
        return rng.choice(_WORDS)
    if how == 2:
        return [value] if rng.random() < 0.5 else {rng.choice(_WORDS): value}
    if how == 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value + rng.choice([-1, 1, 8, -8, 64]) if rng.random() < 0.7 else -value
    if how == 4 and isinstance(value, str):
        at = rng.randint(0, len(value))
        return value[:at] + rng.choice(_WORDS) + value[at:]
    return rng.choice([[], {}, "", None, False])


def _changed_inside(value: Any, rng: random.Random) -> Any:
    how = rng.randrange(8)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {**value, rng.choice(_WORDS): value[key]}
        if how == 2:
            other = rng.choice(_WORDS) + key if rng.random() < 0.5 else rng.choice(_WORDS)
            return {other if k == key else k: v for k, v in value.items()}
        if how == 3:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _changed(value[key], rng)}
    at = rng.randrange(len(value))
    if how == 0:
        return value[:at] + value[at + 1 :]
    if how == 1:
        return [*value, value[at]]
    return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]


class Watch:
    """What is seen of the cases of one process: counts, and each kind of finding once."""

    def __init__(self, target: Any, findings: Path, note: Path) -> None:
        self._target, self._findings, self._note = target, findings, note
        self._place = Path(tempfile.mkdtemp(prefix="cq-fuzz-"))
        self._rng = random.Random(0)
        self.cases = self.errors = self.slowest_ms = self.most_bytes = 0
        self._kinds: dict[str, int] = {}

    def case(self, raw: bytes) -> None:
        """Run one case, and remember what is wrong with it."""
        measured = self._rng.randrange(_MEASURED_ONE_IN) == 0
        if measured:
            tracemalloc.start(1)
        started = time.perf_counter()
        try:
            self.errors += self._target.knock(raw, self._place) is not None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._found(_kind(error), raw, traceback.format_exc())
        if measured:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.most_bytes = max(self.most_bytes, peak)
            if peak > 2 * len(raw) + _CONSTANT_BYTES:
                self._found(f"allocates {self._target.name}", raw, f"{peak} bytes of {len(raw)}")
        self.slowest_ms = max(self.slowest_ms, int((time.perf_counter() - started) * 1e3))
        self.cases += 1
        if self.cases % _NOTE_EVERY == 0:
            self.tell()

    def _found(self, kind: str, raw: bytes, told: str) -> None:
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if self._kinds[kind] == 1:
            name = f"{self._target.name}-{hashlib.sha256(kind.encode()).hexdigest()[:10]}"
            (self._findings / f"{name}.input").write_bytes(raw)
            (self._findings / f"{name}.txt").write_text(f"{kind}\n\n{told}", errors="replace")

    def tell(self) -> None:
        """Write the counts down; the process may end at any time."""
        found = {
            "cases": self.cases,
            "errors": self.errors,
            "slowest_ms": self.slowest_ms,
            "most_bytes": self.most_bytes,
            "findings": self._kinds,
        }
        self._note.write_text(json.dumps(found))


def _memory_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _kind(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/cq" in f.filename and "site-packages" not in f.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {where}"


def _work(name: str, findings: Path, note: Path, seconds: float, seed: int) -> None:
    """In a process of its own: fuzz the target `name`. Does not return."""
    import atheris

    with atheris.instrument_imports(
        include=["cq", "cq_analyze", "cq_edit", "cq_merge", "cq_quant"],
        enable_loader_override=False,
    ):
        import cq_quant.stage  # noqa: F401 - what the targets run
        from bench import hostile
        from cq.core import catalog

        for kind in ("formats", "optimizers", "adapters", "methods", "models", "stages", "checks"):
            for plug in catalog.names(kind):
                catalog.load(kind, plug)
    seeds = Path(tempfile.mkdtemp(prefix="cq-seeds-"))
    target = next(t for t in hostile.targets(seeds) if t.name == name)
    corpus = Path(tempfile.mkdtemp(prefix="cq-corpus-"))
    for i, raw in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(raw)
    watch = Watch(target, findings, note)
    for raw in target.seeds:
        watch.case(raw)
    watch.tell()

    def mutated(raw: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        made = mutate_json(raw, rng) if rng.random() < 0.7 else raw
        if made == raw:
            made = atheris.Mutate(raw, longest)
        return bytes(made[:longest])

    options = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={_SECONDS_PER_CASE}",
        f"-rss_limit_mb={_RSS_MB}",
        f"-max_len={_LONGEST}",
        f"-seed={seed}",
        f"-artifact_prefix={findings}/{name.replace(' ', '-')}-",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], watch.case, custom_mutator=mutated)
    atheris.Fuzz()


def _names() -> list[str]:
    from bench import hostile

    with tempfile.TemporaryDirectory() as place:
        return [target.name for target in hostile.targets(Path(place))]


def _run_one(name: str, seconds: float, findings: Path, seed: int) -> dict[str, Any]:
    note = findings / f"{name}.json"
    with tempfile.TemporaryDirectory(prefix="cq-fuzz-", dir=_memory_directory()) as place:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.fuzz", "--work", name, "--seconds", str(seconds)),
                *("--dir", str(findings.parent), "--seed", str(seed)),
            ],
            capture_output=True,
            env={**os.environ, "TMPDIR": place},
            check=False,
        )
    counts: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"cases": 0}
    if done.returncode:  # a hang, too much memory, or a crash of Python itself
        tail = done.stderr.decode(errors="replace")[-3000:]
        counts["ended"] = [done.returncode, tail]
    return counts


def run(
    names: Sequence[str], seconds: float, least: int, directory: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Fuzz `names` in turn, `seconds` together, and on until there were `least` cases."""
    findings = directory / "findings"
    shutil.rmtree(findings, ignore_errors=True)
    findings.mkdir(parents=True)
    found: dict[str, Any] = {}
    total, turn = 0, 0
    while turn == 0 or total < least:
        for name in names:
            counts = _run_one(name, seconds / len(names), findings, seed=turn + 1)
            before = found.setdefault(name, {"cases": 0, "findings": {}, "ended": []})
            before["cases"] += counts["cases"]
            before["findings"] |= counts.get("findings", {})
            if "ended" in counts:
                before["ended"].append(counts["ended"])
            for key in ("slowest_ms", "most_bytes"):
                before[key] = max(before.get(key, 0), counts.get(key, 0))
            total += counts["cases"]
            tell(f"{name}: {counts['cases']} cases, {len(counts.get('findings', {}))} findings")
        turn += 1
    return {"cases": total, "targets": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz every target and print the counts as JSON; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="bench.fuzz", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--dir", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.work:
        findings = asked.dir / "findings"
        _work(asked.work, findings, findings / f"{asked.work}.json", asked.seconds, asked.seed)
    names = asked.only or _names()
    found = run(names, asked.seconds, asked.cases, asked.dir.resolve(), print)
    print(json.dumps(found, indent=1))
    bad = any(t["findings"] or t["ended"] for t in found["targets"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
