from __future__ import annotations

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rim_lens.views.text import markdown_block, markdown_code, markdown_text, plotly_text, visible


@given(st.text())
def test_what_is_shown_is_printable(text: str) -> None:
    shown = visible(text)
    assert all(character.isprintable() or character == "\u200d" for character in shown)


@given(st.text())
def test_nothing_vanishes(text: str) -> None:
    # At least as many characters are shown as were given, each printable one as itself.
    shown = visible(text)
    assert len(shown) >= len(text)
    assert [c for c in text if c.isprintable()] == [c for c in text if c.isprintable() and c in shown]


@pytest.mark.parametrize(
    "character", ["\u202e", "\u200b", "\ufeff", "\x00", "\x1b", "\x85", "\u2028", "\ud800"]
)
def test_unseen_characters_are_written_out(character: str) -> None:
    shown = visible(f"a{character}b")
    assert character not in shown
    assert f"{ord(character):02x}" in shown


def test_a_joiner_is_kept_where_it_joins_and_shown_where_it_stands_alone() -> None:
    family = "\U0001f468\u200d\U0001f469"
    assert visible(family) == family
    assert visible("\u200d") == visible("a\u200d")[1:] == "\\u200d"


@given(st.text())
def test_plotly_reads_no_tag_and_gives_the_text_back(text: str) -> None:
    escaped = plotly_text(text)
    assert "<" not in escaped
    assert html.unescape(escaped) == visible(text) or "&" in text


@given(st.text(alphabet="`|<&a \u202e", min_size=1))
def test_a_code_span_ends_where_it_should(text: str) -> None:
    code = markdown_code(text)
    fence = code[: len(code) - len(code.lstrip("`"))]
    inside = code[len(fence) : -len(fence)]
    assert code.endswith(fence)
    assert all(len(run) != len(fence) for run in _runs(inside))


def test_a_block_holds_fences() -> None:
    assert markdown_block("a\n```\n<b>").splitlines() == ["````", "a", "```", "<b>", "````"]


def test_markdown_opens_no_tag() -> None:
    assert markdown_text("</script><img onerror=x>") == "&lt;/script>&lt;img onerror=x>"


def _runs(text: str) -> list[str]:
    runs, current = [], ""
    for character in text + " ":
        if character == "`":
            current += character
        elif current:
            runs.append(current)
            current = ""
    return runs


def test_right_to_left_letters_stay_letters() -> None:
    hebrew = "\u05e9\u05dc\u05d5\u05dd"
    assert visible(hebrew) == hebrew
    assert unicodedata.bidirectional(hebrew[0]) == "R"
