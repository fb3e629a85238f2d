"""Tokens as they are shown: one text for each, nothing in it invisible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rim_lens.chat.labelling import character_ranges
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat

GOES_ON = "⁺"  # in place of a token that only goes on with the character of the one before


def token_texts(chat: ChatFormat, ids: Sequence[int]) -> list[str]:
    """The text of each token, control characters and the like written out; it is not safe in HTML.

    A character made of several tokens stands at the first of them, and the others read ``⁺``.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> from rim_lens.chat import ChatFormat
    >>> chat = ChatFormat.from_tokenizer(toy_tokenizer())
    >>> token_texts(chat, chat.render("make bread please", think="off").tokens[0].tolist())[-2:]
    [' <think>', ' </think>']
    """
    text, ranges = character_ranges(ids, chat.decode, {})
    shown, reached = [], 0
    for start, stop in ranges:
        shown.append(visible(text[max(start, reached) : stop]) if stop > reached else GOES_ON)
        reached = max(reached, stop)
    return shown
