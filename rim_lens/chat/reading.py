"""From token ids back to text segments: where a turn's think blocks, answer and request lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rim_lens.chat.formats import FormatSpec
from rim_lens.chat.labelling import Range, Segment, merge
from rim_lens.errors import SpanError


class Turn(NamedTuple):
    """An assistant's turn taken apart.

    Attributes:
        segments: Its text, piece by piece.
        cot: What stands inside think blocks, stripped; blocks joined by a newline.
        answer: What stands outside, stripped, without scaffold.
        empty: Every think block that was closed is empty, and there is one.
        finished: No think block is left open, and one was closed or an answer began.
    """

    segments: list[Segment]
    cot: str
    answer: str
    empty: bool
    finished: bool


class Head(NamedTuple):
    """A sequence up to and with the role word of its last assistant turn.

    Attributes:
        segments: Its text, piece by piece.
        request: The user's words of the last user turn.
        stop: Where in the text the assistant's turn goes on.
    """

    segments: list[Segment]
    request: str
    stop: int


class Reader:
    """Takes a text apart by its control strings.

    A tag (or other control string) that is one token of the vocabulary counts only as that token: the same characters
    spelled in several tokens are words. A tag that the vocabulary lacks is found by its text.
    """

    def __init__(self, spec: FormatSpec, single_tokens: frozenset[str]) -> None:
        self.spec = spec
        self.single_tokens = single_tokens
        stops = [token for token in (spec.answer_end, *spec.stops) if token]
        kinds = {
            "open": re.escape(spec.think_open),
            "close": re.escape(spec.think_close),
            "stop": "|".join(map(re.escape, stops)),
            "scaffold": spec.scaffold,
        }
        self._marks = re.compile(
            "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in kinds.items() if pattern), re.DOTALL
        )

    def _solid(self, text: str, ranges: Sequence[Range]) -> set[Range]:
        """Places in the text where a single token spells a control string."""
        places = set()
        for start, stop in ranges:
            word = text[start:stop].strip()
            if word in self.single_tokens:
                at = text.index(word, start)
                places.add((at, at + len(word)))
        return places

    def _is_real(self, text: str, start: int, stop: int, solid: set[Range]) -> bool:
        """Whether every control string in ``text[start:stop]`` that the vocabulary has is spelled by its own token."""
        return all(
            (found.start() + start, found.end() + start) in solid
            for token in self.single_tokens
            for found in re.finditer(re.escape(token), text[start:stop])
        )

    def read_turn(self, text: str, ranges: Sequence[Range]) -> Turn:
        """Take a turn apart.

        Args:
            text: The turn after the role word.
            ranges: Characters of that text that each token covers.
        """
        solid = self._solid(text, ranges)
        header = self.spec.assistant[2]
        start = next((len(end) for end in (header, header.rstrip()) if text.startswith(end)), 0)
        pieces = [Segment(text[:start], "template")]
        cots: list[str] = []
        answers: list[str] = []
        place, inside, blocks, stopped = start, False, 0, False

        def outside(words: str) -> None:
            lead = len(words) - len(words.lstrip())
            pieces.append(Segment(words[:lead], "template"))
            pieces.append(Segment(words[lead:], "answer"))
            answers.append(words.strip())

        def block(words: str) -> None:
            pieces.append(Segment(words, "cot" if words.strip() else "gap"))
            cots.append(words.strip())

        for mark in self._marks.finditer(text, start):
            if stopped or not self._is_real(text, mark.start(), mark.end(), solid):
                continue
            kind, words = mark.lastgroup, text[place : mark.start()]
            if inside and kind in ("open", "scaffold"):
                continue  # an opening tag inside a block is part of the reasoning
            if inside:
                block(words)
            elif kind == "close" and self.spec.lone_close and not blocks:
                del pieces[1:]
                answers.clear()
                block(text[start : mark.start()])
            else:
                outside(words)
            if kind == "close" and (inside or self.spec.lone_close):
                pieces.append(Segment(mark.group(), "think_close"))
                blocks += 1
                inside = False
            elif kind == "open":
                pieces.append(Segment(mark.group(), "think_open"))
                inside = True
            else:
                pieces.append(Segment(mark.group(), "template"))
                stopped = kind == "stop"
            place = mark.end()
        if stopped:
            pieces.append(Segment(text[place:], "template"))
        else:
            (block if inside else outside)(text[place:])
        answer = "\n".join(filter(None, answers))
        return Turn(
            segments=merge(pieces) or [Segment("", "template")],
            cot="\n".join(filter(None, cots)),
            answer=answer,
            empty=bool(blocks) and not any(cots),
            finished=not inside and bool(blocks or answer),
        )

    def read_head(self, text: str, ranges: Sequence[Range], system: str | None, where: str) -> Head:
        """Find the last user turn that an assistant header follows, and the system words.

        Args:
            text: A whole sequence.
            ranges: Characters of that text that each token covers.
            system: The system words, where they stand in the user's turn and are to be told from the user's.
            where: What to call the row in an error.

        Raises:
            SpanError: There is no such turn.
        """
        spec = self.spec
        before_role, role, after_role = spec.assistant
        header_text = before_role + role + after_role
        solid = self._solid(text, ranges)
        headers = self._places(text, header_text, solid)
        users = [place for place in self._places(text, spec.user, solid) if headers and place < headers[-1]]
        if not users:
            raise SpanError(
                f"{where}: no user turn ({spec.user!r}) followed by an assistant header ({header_text!r}) in"
                f" {text[:200]!r}; is this sequence in format {spec.name!r}?"
            )
        start = users[-1] + len(spec.user)
        header = next(place for place in headers if place >= start)
        end = header - len(spec.between) * text.endswith(spec.between, start, header)
        words_end = end - len(spec.turn_end) * text.endswith(spec.turn_end, start, end)
        system_words = self._system_words(text, users[0], system)
        start = max(start, system_words[2])
        named = [
            (*system_words[:2], "system"),
            (start, words_end, "request"),
            (words_end, end, "turn_end"),
            (header + len(before_role), header + len(before_role) + len(role), "assistant"),
        ]
        pieces, place = [], 0
        for first, last, atom in named:
            pieces += [Segment(text[place:first], "template"), Segment(text[first:last], atom)]
            place = last
        words = text[start:words_end]
        return Head(pieces, words.strip() if spec.separator else words, place)

    def _system_words(self, text: str, first_user: int, system: str | None) -> tuple[int, int, int]:
        """Where the system words begin and end, and where the scaffold after them ends (all 0: there are none)."""
        spec = self.spec
        if spec.system_in_user:
            before, after = spec.system or ("", "")
            start = first_user + len(spec.user + before)
            if system is None or not text.startswith(before + system + after, start - len(before)):
                return 0, 0, 0
            return start, start + len(system), start + len(system + after)
        bos = len(spec.bos) * text.startswith(spec.bos)
        for before, after in filter(None, (spec.system, spec.injected)):
            start, stop = bos + len(before), first_user - len(after)
            if start < stop and text.startswith(before, bos) and text.startswith(after, stop):
                return start, stop, first_user
        return 0, 0, 0

    def _places(self, text: str, literal: str, solid: set[Range]) -> list[int]:
        found = (match.start() for match in re.finditer(re.escape(literal), text))
        return [place for place in found if self._is_real(text, place, place + len(literal), solid)]
