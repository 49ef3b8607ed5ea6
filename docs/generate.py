"""Writes what is generated from the code: `docs/reference/cli.md`, `docs/findings.md` and
`completions/`.

`--check` writes nothing and fails, naming the files, if any is out of date.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from cq.cli import complete, main
from cq.cli.output import Terminal
from cq.core import catalog
from cq_analyze import findings

ROOT = Path(__file__).resolve().parent.parent
# Help is wrapped to the terminal; the reference must not depend on whose.
WIDTH = "90"


def help_text(*argv: str) -> str:
    """What `cq ARGV --help` prints."""
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        main.run([*argv, "--help"], Terminal(stdout=sys.stdout))
        return sys.stdout.getvalue()
    finally:
        sys.stdout = before


def reference() -> str:
    """The command line's reference page."""
    lines = [
        "# The command line",
        "",
        "Generated from `--help` by `make docs`. JSON documents are described by the schemas in",
        "[schemas](schemas).",
        "",
        "```",
        help_text().rstrip(),
        "```",
    ]
    for name in catalog.names("commands"):
        lines += ["", f"## cq {name}", "", "```", help_text(name).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every generated file's path and text."""
    app = main.make_app()
    files = {
        ROOT / "completions" / name: complete.script(shell, app)
        for shell, name in complete.SHELLS.items()
    }
    files[ROOT / "docs" / "findings.md"] = findings.markdown()
    return {**files, ROOT / "docs" / "reference" / "cli.md": reference()}


def run(argv: list[str]) -> int:
    """Write the files, or check that they are up to date."""
    os.environ.update(COLUMNS=WIDTH, TERMINAL_WIDTH=WIDTH)
    stale = [
        path
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in argv:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: run `make docs`\n")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(generated()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
