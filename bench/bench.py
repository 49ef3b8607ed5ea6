"""Time `cq` against `cp` of the same file and against the peer `convert-to-quant`, in one run.

Every command is a real process, or a pipeline of them, measured by what the system says of it. The
rounds go through all commands in turn, so that a slow minute of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from bench.jobs import JOBS, STARTUP, chosen
from bench.measuring import Bench, Model, say
from bench.rendering import to_json, to_markdown

ROOT = Path(__file__).resolve().parent.parent
MAKE_MODEL = ROOT / "bench" / "make_model.py"
TINY_HIDDEN = 128  # a model so small that a command on it is all start-up


def make_model(folder: Path, size: float, hidden: int, seed: int) -> Model:
    """Make a model, unless it is there.

    In a process of its own: a child's peak memory begins with that of the process that started it,
    so this one must stay small and import no torch.
    """
    name = f"flux-{size:g}gb-{hidden}"
    model = Model(folder / f"{name}.safetensors", folder / f"{name}-lora.safetensors")
    command = [sys.executable, str(MAKE_MODEL), str(model.path), "--lora", str(model.lora)]
    options = ["--size", str(size), "--hidden", str(hidden), "--seed", str(seed)]
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)
    return model


def machine_facts(folder: Path, peer_python: Path | None) -> dict[str, Any]:
    """What the numbers depend on."""
    file_system = _output(["stat", "-f", "-c", "%T", str(folder)])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system() + " " + platform.release(),
        "file_system": file_system or "unknown",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "cq")},
        "peer": _peer_versions(peer_python) if peer_python else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _peer_versions(python: Path) -> str:
    code = (
        "from importlib.metadata import version as v;"
        "print('convert-to-quant', v('convert-to-quant'), 'with torch', v('torch'))"
    )
    return _output([str(python), "-c", code]) or "convert-to-quant of unknown version"


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stop(text: str) -> NoReturn:
    """End with a message."""
    say(f"error: {text}")
    raise SystemExit(2)


def find_peer(text: str | None) -> tuple[Path, Path] | None:
    """The peer's command and its Python, given either; those that `make` installs if neither."""
    if text is None and not (ROOT / ".venv-peer/bin/ctq").exists():
        return None
    given = ROOT / ".venv-peer/bin/ctq" if text is None else Path(text).absolute()
    command = given.with_name("ctq") if given.name.startswith("python") else given
    if not os.access(command, os.X_OK):
        stop(f"`{command}` is not a program")
    return command, command.with_name("python")


def check_space(folder: Path, sizes: Sequence[float]) -> None:
    """End if the disk cannot hold models, merged references, and what one run writes."""
    models = sum(s for s in sizes if not any(folder.glob(f"flux-{s:g}gb-*"))) * 1e9
    needed = 1.15 * (models + sum(sizes) * 1e9 + 2.5 * max(sizes) * 1e9)
    free = shutil.disk_usage(folder).free
    if free < needed:
        stop(f"`{folder}` has {free / 1e9:.1f} GB free, the bench needs {needed / 1e9:.1f} GB")


def patterns_of(text: str) -> list[str]:
    """Patterns from a comma-separated list. Raises: ArgumentTypeError if one chooses nothing."""
    patterns = [word for word in text.split(",") if word]
    for pattern in patterns:
        if not chosen((*JOBS, *STARTUP), [pattern]):
            names = ", ".join(f"`{job.name}`" for job in (*JOBS, *STARTUP))
            raise argparse.ArgumentTypeError(f"`{pattern}` matches none of {names}")
    return patterns


def sizes_of(text: str) -> list[float]:
    """Sizes in GB from a comma-separated list, smallest first."""
    return sorted(float(word) for word in text.split(",") if word)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=sizes_of, default=[1.0, 2.0], metavar="GB,…")
    parser.add_argument(
        "--only",
        type=patterns_of,
        default=[],
        metavar="GLOB,…",
        help="time these commands alone, by name (`quant nvfp4*`), or `formats`",
    )
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--dir", type=Path, default=Path("out/bench"), help="models and outputs")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer", metavar="PATH", help="the peer's `ctq`, or the Python beside it")
    peer.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-sizes", type=sizes_of, default=[1.0], metavar="GB,…")
    parser.add_argument("--peer-runs", type=int, default=1, help="it is slow (default 1)")
    parser.add_argument("--no-verify", action="store_true", help="measure no quality")
    parser.add_argument("--hidden", type=int, default=3072, help="narrower models, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default DIR/results.json")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the page there as well"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, and report on stdout. 1 if a command of `cq` failed."""
    args = arguments()
    results = args.json or args.dir / "results.json"
    for folder in (args.dir, results.parent, (args.markdown or results).parent):
        folder.mkdir(parents=True, exist_ok=True)  # now, not after all the work
    check_space(args.dir, args.sizes)
    programs = {"cq": str(Path(sys.executable).with_name("cq")), "python": sys.executable}
    missing: dict[str, str] = {}
    peer = None if args.no_peer else find_peer(args.peer)
    if peer is None:
        missing["the peer"] = "--no-peer" if args.no_peer else "none was given (--peer)"
    else:
        programs["ctq"] = str(peer[0])
        for size in set(args.sizes) - set(args.peer_sizes):
            missing[f"the peer at {size:g} GB"] = "not among --peer-sizes"
    if args.no_verify:
        missing["SQNR"] = "--no-verify"
    if args.only:
        missing["all other commands"] = f"--only {','.join(args.only)}"
    facts = machine_facts(args.dir, peer and peer[1])
    models = {s: make_model(args.dir, s, args.hidden, args.seed) for s in args.sizes}
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="scratch-") as scratch:
        bench = Bench(
            programs=programs,
            tiny=make_model(args.dir, 0, TINY_HIDDEN, args.seed),
            models=list(models.values()),
            scratch=Path(scratch),
            peer_sizes=frozenset(models[s].path for s in args.peer_sizes if s in models),
            runs=args.runs,
            peer_runs=args.peer_runs,
            verify=not args.no_verify,
            jobs=chosen(JOBS, args.only),
            startup_jobs=chosen(STARTUP, args.only),
            missing=missing,
        )
        bench.measure_startup()
        bench.measure()
    page = to_markdown(bench, facts)
    results.write_text(json.dumps(to_json(bench, facts), indent=1, ensure_ascii=False) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(page)
    print(page, end="")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
