"""Expressions of users: Python's own meaning, and an end in any case."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import make
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cq.core import expressions
from cq.core.errors import UsageError
from cq.core.expressions import Expression
from cq.core.select import matcher, select
from cq_edit.renaming import Renaming
from tests.processes import cq

ENDLESS = "(a|aa)+$"  # of `regex` too, which is quick with `(a+)+$`
NAME = "a" * 80 + ".b"
SIGNS = ("a", "b", "e", ".", "*", "+", "?", "(", ")", "|", "[", "]", "^", "$", r"\.", r"\d", "{")
SIGNS += ("}", "{1,2}", "{e}", "{e<=1}", "{i}", "{1<=e}", r"\{", "\\\\", "(?:", "(?!", "(?i)", "1")


@given(st.lists(st.sampled_from(SIGNS), max_size=8).map("".join), st.text("ab1e.{}<=", max_size=9))
def test_expression_means_what_it_means_to_python(text: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sets that may mean more one day
        try:
            python = re.compile(text)
        except re.error:
            with pytest.raises(UsageError):
                Expression(text)
            assume(False)
        found = Expression(text)
    assert found.is_in(name) is (python.search(name) is not None)
    assert found.replaced("-", name) == python.sub("-", name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_expression_that_would_take_years_is_one_error() -> None:
    pattern = f"re:{ENDLESS}"
    for asked in (
        lambda: matcher(pattern)(NAME),
        lambda: select([pattern], ["b", NAME], what="layer"),
        lambda: Renaming.parse(f"{pattern}=b").new(NAME),
    ):
        with pytest.raises(UsageError, match="takes too long on `aaa") as caught:
            asked()
        assert (caught.value.exit_code, caught.value.code) == (2, "usage.pattern")
        assert f"`{pattern}`" in caught.value.message


def test_time_is_that_of_all_names_together_but_for_quick_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, given_times = [0.0], list[float]()

    class Compiled:
        def search(self, name: str, timeout: float) -> None:
            given_times.append(timeout)
            now[0] += float(name)

    monkeypatch.setattr(expressions.time, "monotonic", lambda: now[0])
    slow = Expression("a")
    slow._compiled = Compiled()  # type: ignore[assignment]
    for name in ("1.0", "0.0005", "1.5", "0.0005", "1.0", "0.0005"):
        slow.is_in(name)
    assert given_times == pytest.approx([3.0, 2.0, 2.0, 0.5, 0.5, 0.01])


def test_replacement_by_a_group_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match="cannot stand for what `re:a` matches") as caught:
        Expression("a").replaced(r"\1", "bab")
    assert "first group" in (caught.value.hint or "")
    assert Expression("(a)").replaced(r"<\1>", "bab") == "b<a>b"


@pytest.mark.parametrize(
    "text",
    [
        "(?:(?:a{1000}){1000}){20}",
        "((?:a{400}|b){400}){2}",
        "(?=(a{1000}){1000})",
        "(?>(?:a{1000}){999})",
    ],
)
def test_repeats_within_repeats_are_refused_unread(text: str) -> None:
    """They would take gigabytes before the first name is looked at."""
    with pytest.raises(UsageError, match="repeats within repeats"):
        Expression(text)


@pytest.mark.parametrize("text", ["(a{1,50}){3}", "(?:a+)+b", "[a-z]{1000}", "(?:ab?){2,}"])
def test_usual_repeats_are_taken(text: str) -> None:
    Expression(text)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["only", "recipe"])
def test_command_ends_whatever_the_expression(where: str, tmp_path: Path) -> None:
    tensors = {f"blocks.0.{'a' * 60}.b.weight": make.weight(64, 64)}
    base = make.save(tmp_path / "m.safetensors", tensors)
    rules = [{"layers": f"re:{ENDLESS}", "skip": True}]
    (tmp_path / "r.json").write_text(json.dumps({"cq": 1, "kind": "recipe", "rules": rules}))
    words = {"only": ("--only", f"re:{ENDLESS}"), "recipe": ("--recipe", tmp_path / "r.json")}
    began = time.monotonic()
    done = cq("quant", base, *words[where], "-o", tmp_path / "o.safetensors")
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert "takes too long on `blocks.0.aaa" in done.err
    assert time.monotonic() - began < 60
    assert not list(tmp_path.glob("o.*"))


def test_only_an_expression_of_a_user_imports_the_library() -> None:
    script = (
        "import sys; from cq.core import families, recipe, select\n"
        "from cq_analyze.cli import analyze; from cq_quant import stage\n"
        "select.any_matcher(['re:^a', 'b*'])('a'); select.matcher('a*')('ab')\n"
        "assert 'regex' not in sys.modules; select.matcher('re:a'); assert 'regex' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
