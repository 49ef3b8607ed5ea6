"""Tables on terminals: no number and no name is broken as long as anything else can give way."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cq.cli import output
from cq.cli.output import Terminal

NAMES = ("layer", "SQNR dB", "max error", "mean shift", "reason")
RIGHT = [False, True, True, True, False]
ROWS = [
    ("double_blocks.0.txt_mod.lin", "2.43", "0.301", "-7.9e-05", "a linear layer of a block"),
    ("single_blocks.11.linear1", "11.19", "0.1127", "0.00069", "an input layer: it is kept"),
]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("COLUMNS", str(width))
    out, err = Screen(), io.StringIO()
    here = Terminal(stdin=io.StringIO(), stdout=out, stderr=err)
    columns = [f"{n}>" if right else n for n, right in zip(NAMES, RIGHT, strict=True)]
    here.table(columns, ROWS)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize("width", [60, 70, 80, 120, 200])
def test_names_and_numbers_stand_in_one_piece(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, said = drawn(width, monkeypatch)
    kept = 3 if "narrow" not in said else 3 - len(said.split(":")[1].split(","))
    assert kept >= 1
    for row in ROWS:
        assert all(word in shown for word in row[: 1 + kept])
    lines = [line for line in shown.splitlines() if "\x1b" not in line]
    assert all(len(line) <= width for line in lines)


def test_columns_that_are_left_out_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, said = drawn(60, monkeypatch)
    assert said.strip() == "the terminal is too narrow for: mean shift"
    assert "0.00069" not in shown and "0.1127" in shown
    assert drawn(120, monkeypatch)[1] == ""


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 200),
)
def test_only_numbers_are_left_out_and_only_where_they_do_not_fit(
    columns: list[tuple[int, bool]], width: int
) -> None:
    right = [on_the_right for _, on_the_right in columns]
    cells = ["x" * size for size, _ in columns]
    kept, _ = output._fitting([["n"] * len(cells), cells], right, width)
    gone = set(range(len(cells))) - set(kept)
    assert all(right[at] for at in gone)
    assert not any(right) or any(right[at] for at in kept)
    if gone:
        assert sum(len(c) + 2 for c in cells) - 2 > width
    first_gone = min(gone, default=len(cells))
    assert not any(right[at] for at in kept if at > first_gone)
