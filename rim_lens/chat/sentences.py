"""A chain of thought cut into sentences, and which tokens each sentence has.

The rules are plain ones for text that models write while thinking: a line break ends a sentence; so does ``.``, ``!``,
``?`` or ``…`` (with closing quotes and brackets) before whitespace, unless the piece so far is a list marker (``1.``), the
word is an abbreviation (``e.g.``) or an initial, or, after a full stop, the next word begins in lower case. Decimals
have no whitespace after the point and stay whole. Where the rules do not fit a model's language, pass another
``split``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rim_lens.chat.chat_format import ChatFormat
from rim_lens.chat.labelling import Segment, assign, character_ranges
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import SpanError

# A text → its sentences, which together are the text again, whitespace included.
Split = Callable[[str], list[str]]

_CLOSERS = "\"'”’»)\\]*_"
_END = re.compile(
    rf"(?P<stop>[.!?…]+[{_CLOSERS}]*)(?=\s)\s*|(?P<wide>[。！？]+[」』”’）]*)\s*|(?P<line>\s*\n\s*)"
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘«]+$")
_ABBREVIATIONS = frozenset(
    {"e.g.", "i.e.", "cf.", "vs.", "viz.", "mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "approx.", "resp."}
)
_BEFORE_A_NUMBER = frozenset(
    {"no.", "nos.", "fig.", "figs.", "eq.", "eqs.", "p.", "pp.", "sec.", "ch.", "vol.", "ca."}
)
_MARKER = re.compile(r"[\s*#>-]*(?:step\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})[.)]\**", re.IGNORECASE)
_LETTER = re.compile(r"(?:^|(?P<before>\S+)\s+)(?:[A-Z]\.\s*)*[A-HJ-Z]\.$")
# Before a single capital these say that it is a choice ("The answer is B. So"), not the initial of a name.
_CHOOSING = frozenset(
    {"is", "are", "was", "be", "answer", "option", "choice", "choose", "pick", "or", "and", "=", "letter"}
)


@dataclass(frozen=True)
class Sentences:
    """The sentences of each row's chain of thought.

    Attributes:
        index: Which sentence a token is in, counted from 0 in each row; −1 outside the chain of thought.
        texts: The sentences of each row, without the whitespace around them.
    """

    index: Int[Tensor, "prompt pos"]
    texts: tuple[tuple[str, ...], ...]

    def mask(self, sentence: int) -> Bool[Tensor, "prompt pos"]:
        """The tokens of one sentence; a row that has fewer sentences has none.

        Raises:
            SpanError: No row has so many sentences.
        """
        most = max(map(len, self.texts))
        if not 0 <= sentence < most:
            raise SpanError(
                f"sentence {sentence} was asked for; the longest of these chains of thought has {most}, counted from 0."
            )
        return self.index == sentence


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences; whitespace stays with the sentence before, so that they join to the text again.

    >>> split_sentences("It costs 3.5 euros, e.g. for two. So 7! Done.")
    ['It costs 3.5 euros, e.g. for two. ', 'So 7! ', 'Done.']
    """
    pieces, start = [], 0
    for end in _END.finditer(text):
        if not text[start : end.start()].strip() or not _ends(text, start, end):
            continue
        pieces.append(text[start : end.end()])
        start = end.end()
    if text[start:].strip() or not pieces:
        return [*pieces, text[start:]]
    return [*pieces[:-1], pieces[-1] + text[start:]]


def _ends(text: str, start: int, end: re.Match[str]) -> bool:
    if end["line"] is not None or end["wide"] is not None:
        return True
    said, following = text[start : end.end("stop")], text[end.end() : end.end() + 1]
    if "\n" in end.group():
        return not _MARKER.fullmatch(said.strip())
    if not said.rstrip("\"'”’»)]*_").endswith((".", "…")):
        return True
    if _MARKER.fullmatch(said.strip()) or following.islower():
        return False
    found = _LAST_WORD.search(said)
    word = found.group().lower() if found else ""
    if word in _ABBREVIATIONS or (word in _BEFORE_A_NUMBER and following.isdigit()):
        return False
    letter = _LETTER.search(said)
    initial = letter is not None and (letter["before"] or "").lower() not in _CHOOSING
    return not (initial and following.isupper())


def cot_sentences(chat: ChatFormat, batch: SpanBatch, split: Split = split_sentences) -> Sentences:
    """Cut each row's chain of thought into sentences and say which tokens they have.

    The text is that of the row's own tokens, given or written by the model; several think blocks are cut one by one.
    Every token of `cot` is in exactly one sentence. A token that two sentences share goes to the one whose visible
    character comes first in it; a token of whitespace only to the sentence before. A sentence that gets no token
    of its own is joined to the one before.

    Args:
        chat: The format the batch is in.
        batch: Prompts with a chain of thought in every row.
        split: How a text is cut, whitespace included; `split_sentences` by default.

    Raises:
        EmptySpan: Some row has no chain of thought.
        SpanError: The batch is of another format, or `split` does not give the text back.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> chat = ChatFormat.from_tokenizer(toy_tokenizer())
    >>> cot = chat.render("make bread please + 3 4 6", think="3 4 > 0 6 > 6")
    >>> steps = cot_sentences(chat, cot, split=lambda text: [piece + " >" for piece in text.split(" >")][:-1] + [" 6"])
    >>> steps.texts[0], [chat.decode(cot.tokens[0][steps.mask(i)[0]]) for i in range(3)]
    (('3 4 >', '0 6 >', '6'), ['3 4 >', '0 6 >', '6'])
    """
    if batch.format != chat.name:
        raise SpanError(
            f"the batch is in format {batch.format!r}, this is {chat.name!r}; use the format it came from."
        )
    inside = batch.spans.require("cot")
    index = torch.full(batch.tokens.shape, -1)
    pieces: dict[int, str] = {}
    texts: list[tuple[str, ...]] = []
    for row in range(len(batch)):
        said: list[str] = []
        for run in _runs(inside[row]):
            text, ranges = character_ranges(batch.tokens[row, run].tolist(), chat.decode, pieces)
            parts = split(text)
            if "".join(parts) != text:
                raise SpanError(
                    f"row {row}: split gave pieces that do not join to the text again: {parts!r} for {text!r}. It must keep"
                    " every character, whitespace too."
                )
            numbers = assign(
                [Segment(part, "cot") for part in parts], ranges, strict=False, where=f"row {row}"
            )
            owners = sorted(set(numbers))
            place = {number: len(said) + rank for rank, number in enumerate(owners)}
            index[row, run] = torch.tensor([place[number] for number in numbers])
            said += [
                "".join(parts[number:following]).strip()
                for number, following in zip([0, *owners[1:]], [*owners[1:], len(parts)], strict=True)
            ]
        texts.append(tuple(said))
    return Sentences(index, tuple(texts))


def _runs(mask: Bool[Tensor, " pos"]) -> list[Int[Tensor, " token"]]:
    """Positions of a mask, cut where they are not next to each other."""
    places = mask.nonzero().flatten()
    breaks = (places[1:] - places[:-1] > 1).nonzero().flatten() + 1
    return list(places.tensor_split(breaks.tolist()))
