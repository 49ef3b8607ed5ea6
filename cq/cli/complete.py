"""Completion scripts made from the command tree: no Python runs when somebody presses TAB.

Owns what a shell needs to know (commands, options, values that are plug names or files) and its
rendering for bash, zsh and fish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from cq.cli.options import FILE_OPTIONS, PLUG_OPTIONS
from cq.core import catalog, families

SHELLS = {"bash": "cq.bash", "zsh": "_cq", "fish": "cq.fish"}


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its spellings, its help, and what its value completes to (words, files, or
    none)."""

    spellings: tuple[str, ...]
    help: str
    takes_value: bool
    words: tuple[str, ...]
    files: bool


@dataclass(frozen=True, slots=True)
class Command:
    """One command with its first sentence of help, and whether its arguments are files."""

    name: str
    help: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    files: bool


def commands(app: typer.Typer) -> list[Command]:
    """The command tree as completion sees it."""
    group: Any = typer.main.get_command(app)
    found = []
    for name, command in sorted(group.commands.items()):
        options: list[Option] = []
        words: tuple[str, ...] = ()
        files = False
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                words = tuple(SHELLS) if name == "completions" else ()
                files = not words
            else:
                options.append(_option(parameter))
        summary = (command.help or "").split("\n")[0].rstrip(".")
        found.append(Command(name, summary, tuple(options), words, files))
    return found


def _option(parameter: Any) -> Option:
    spellings = tuple(sorted([*parameter.opts, *parameter.secondary_opts]))
    plugs = next((PLUG_OPTIONS[s] for s in spellings if s in PLUG_OPTIONS), None)
    # Words in capitals stand for something else, such as NAME.
    choices = (parameter.metavar or "").split("|")
    words = tuple(getattr(parameter.type, "choices", ())) or tuple(
        word.partition("[")[0] for word in choices if len(choices) > 1 and not word.isupper()
    )
    words += _plug_words(plugs) if plugs else ()
    return Option(
        spellings=spellings,
        help=(parameter.help or "").split("\n")[0],
        takes_value=not parameter.is_flag,
        words=words,
        files=any(s in FILE_OPTIONS for s in spellings),
    )


def _plug_words(kind: str) -> tuple[str, ...]:
    """The names by which plugs of a kind can be asked for."""
    if kind == "models":
        return (*families.names(), *families.aliases())
    return catalog.names(kind)


def script(shell: str, app: typer.Typer) -> str:
    """The completion script for `shell`, one of `SHELLS`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands(app))


_HEADER = "# Made by `cq completions {shell}`; run it again after installing plugs."


def _bash(tree: list[Command]) -> str:
    lines = [_HEADER.format(shell="bash"), "_cq() {"]
    lines += [
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}",
        "  local command=${COMP_WORDS[1]} words= files=",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    words='{' '.join(c.name for c in tree)} --help --version'",
        "  else",
        "    case $command:$before in",
    ]
    for command in tree:
        for option in command.options:
            if option.takes_value:
                pattern = "|".join(f"{command.name}:{s}" for s in option.spellings)
                action = f"words='{' '.join(option.words)}'" if option.words else "words="
                lines.append(f"      {pattern}) {action}{' files=1' if option.files else ''} ;;")
    lines += ["      *) case $command in"]
    for command in tree:
        spellings = [s for o in command.options for s in o.spellings]
        words = " ".join([*command.words, *spellings, "--help"])
        lines.append(
            f"        {command.name}) words='{words}'{' files=1' if command.files else ''} ;;"
        )
    lines += [
        "      esac ;;",
        "    esac",
        "  fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "  local IFS=$'\\n'  # names of files may hold spaces",
        '  [ -n "$files" ] && [ "${word#-}" = "$word" ] && COMPREPLY+=($(compgen -f -- "$word"))',
        "}",
        "complete -o filenames -F _cq cq",
    ]
    return "\n".join(lines) + "\n"


def _zsh(tree: list[Command]) -> str:
    lines = [
        "#compdef cq",
        _HEADER.format(shell="zsh"),
        "_cq() {",
        "  local -a commands",
        "  commands=(",
    ]
    lines += [f"    '{c.name}:{_quoted(c.help)}'" for c in tree]
    lines += [
        "  )",
        "  if (( CURRENT == 2 )); then",
        "    _describe command commands",
        "    return",
        "  fi",
        "  local command=$words[2]",
        "  shift words; (( CURRENT-- ))",
        "  case $command in",
    ]
    for command in tree:
        lines.append(f"    {command.name}) _arguments -s \\")
        for option in command.options:
            value = ""
            if option.takes_value:
                values = f"({' '.join(option.words)})" if option.words else ""
                value = f":value:{'_files' if option.files else values}"
            text = _quoted(option.help).replace("[", "(").replace("]", ")").replace(":", "\\:")
            lines += [f"      '*{s}[{text}]{value}' \\" for s in option.spellings]
        rest = f":word:({' '.join(command.words)})" if command.words else ":file:_files"
        lines.append(f"      '*{rest}' ;;" if command.words or command.files else "      ;;")
    lines += ["  esac", "}", '_cq "$@"']
    return "\n".join(lines) + "\n"


def _fish(tree: list[Command]) -> str:
    lines = [_HEADER.format(shell="fish"), "complete -c cq -f"]
    for command in tree:
        lines.append(
            f"complete -c cq -n __fish_use_subcommand -a {command.name}"
            f" -d '{_quoted(command.help)}'"
        )
    for command in tree:
        seen = f"-n '__fish_seen_subcommand_from {command.name}'"
        if command.files:
            lines.append(f"complete -c cq {seen} -F")
        if command.words:
            lines.append(f"complete -c cq {seen} -a '{' '.join(command.words)}'")
        for option in command.options:
            spelt = " ".join(
                f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in option.spellings
            )
            value = ""
            if option.takes_value:
                value = " -r" + (" -F" if option.files else "")
                value += f" -a '{' '.join(option.words)}'" if option.words else ""
            lines.append(f"complete -c cq {seen} {spelt}{value} -d '{_quoted(option.help)}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("'", "’")
