"""Patterns: globs match whole names, `re:` anywhere, and a pattern for nothing is an error."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cq.core.errors import PlanError, UsageError
from cq.core.select import matcher, nearest, select

NAMES = [f"double_blocks.{i}.{n}" for i in (0, 1, 10) for n in ("img_attn.qkv", "img_mlp.0")]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "aXb", False),
        ("a.b", "a.b.c", False),
        ("b", "a.b", False),
        ("a.*", "a.b.c", True),
        ("*", "", True),
        ("", "", True),
        ("", "a", False),
        ("a?c", "abc", True),
        ("a[0-9]", "a7", True),
        ("a[!0-9]", "a7", False),
        ("A.b", "a.b", False),
        ("a.*", "a.b\nc", True),
        ("re:b", "abc", True),
        ("re:^b", "abc", False),
        ("re:", "anything", True),
        (r"re:blocks\.1\.", "blocks.10.x", False),
        ("re:(?i)ABC", "xabcx", True),
        (" re:b", "abc", False),
    ],
)
def test_matcher_matches(pattern: str, name: str, expected: bool) -> None:
    assert expected is matcher(pattern)(name)


@given(st.text(alphabet="ab.*?[]!-", max_size=8), st.text(alphabet="ab.", max_size=8))
def test_matcher_takes_any_text_as_a_glob(pattern: str, name: str) -> None:
    assert fnmatch.fnmatchcase(name, pattern) is matcher(pattern)(name)


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:*", "re:(?P<n>a)(?P<n>b)", "re:\\"])
def test_matcher_refuses_a_bad_expression(pattern: str) -> None:
    with pytest.raises(UsageError, match="is not a regular expression") as caught:
        matcher(pattern)
    assert (caught.value.exit_code, caught.value.code) == (2, "usage.pattern")
    assert f"`{pattern}`" in caught.value.message


@pytest.mark.parametrize("pattern", ["re:a{99999999999999999999}", "re:" + "(" * 5000])
def test_matcher_refuses_an_expression_that_is_too_large(pattern: str) -> None:
    with pytest.raises(UsageError):
        matcher(pattern)


def test_select_gives_each_name_its_first_pattern() -> None:
    patterns = ["*.qkv", "re:blocks[.]1[.]", "double_blocks.*"]
    found = select(patterns, NAMES, what="layer")
    assert list(found) == NAMES
    assert found["double_blocks.1.img_attn.qkv"] == "*.qkv"
    assert found["double_blocks.1.img_mlp.0"] == "re:blocks[.]1[.]"
    assert found["double_blocks.10.img_mlp.0"] == "double_blocks.*"


def test_select_keeps_the_order_of_the_names() -> None:
    assert list(select(["*0"], reversed(NAMES), what="layer")) == [
        name for name in reversed(NAMES) if name.endswith("0")
    ]


def test_select_of_no_patterns_is_empty() -> None:
    assert select([], NAMES, what="layer") == {}


@pytest.mark.parametrize("pattern", ["double_blocks.0.img_attn.qvk", "*.img_atn.qkv", "re:qvk$"])
def test_select_refuses_a_pattern_that_matches_nothing_with_near_names(pattern: str) -> None:
    with pytest.raises(PlanError) as caught:
        select(["*", pattern], NAMES, what="layer")
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.pattern")
    assert f"the pattern `{pattern}` matches no layer" == caught.value.message
    if not pattern.startswith("re:"):
        assert "img_attn.qkv`" in (caught.value.hint or "")


def test_nearest_offers_nothing_when_nothing_is_near() -> None:
    assert nearest("zzz", NAMES) is None
    assert nearest("zzz", []) is None


@pytest.mark.parametrize("word", ["img_attn", "*img_attn*", "re:img_attn"])
def test_nearest_offers_names_that_contain_the_word(word: str) -> None:
    assert "`double_blocks.0.img_attn.qkv`" in (nearest(word, NAMES) or "")
