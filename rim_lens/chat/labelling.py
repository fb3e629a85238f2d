"""From text segments to token labels, and the characters that token ids cover.

Rule for a token that two spans share, stated once and used everywhere:

1. The think tags are whole: a token that holds a visible character of a tag is the tag's (of two tags, the first's).
   So where BPE merges ``>`` with the newlines after it, the tag has them and an empty block may have no gap token.
2. Else the token is the span's whose visible character it holds; whitespace goes along.
3. A token of whitespace only is scaffold (`template`) where scaffold has part in it, else the earlier span's.

When rim_lens renders a prompt itself, a token that holds visible characters of two spans is refused (`SpanError`): the
text can be changed. In what a model wrote it is assigned by the rule, as it cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rim_lens.errors import SpanError

TAGS = ("think_open", "think_close")
Range = tuple[int, int]
# A character takes at most four bytes, and a byte-level token at least one; twice that is safe.
MAX_TOKENS_PER_CHARACTER = 8
NOT_A_CHARACTER = "\ufffd"


class Segment(NamedTuple):
    """A piece of rendered text and the atom it belongs to."""

    text: str
    atom: str


def joined(segments: Sequence[Segment]) -> str:
    """The text of consecutive segments."""
    return "".join(segment.text for segment in segments)


def merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbours of the same atom and leave out empty pieces."""
    merged: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if merged and merged[-1].atom == segment.atom:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.atom)
        else:
            merged.append(segment)
    return merged


def separate(segments: Sequence[Segment], separator: str) -> list[Segment]:
    """Put the separator between pieces; each takes the one before it along."""
    pieces = [segment for segment in segments if segment.text]
    return [
        Segment(separator + piece.text if index else piece.text, piece.atom)
        for index, piece in enumerate(pieces)
    ]


def assign(segments: Sequence[Segment], ranges: Sequence[Range], strict: bool, where: str) -> list[int]:
    """Return, for each token, the number of the segment it belongs to.

    Args:
        segments: Consecutive pieces of a text.
        ranges: Characters of that text that each token covers.
        strict: Refuse a token that holds visible characters of two spans.
        where: What to call the row in an error.

    Raises:
        SpanError: A token is shared by two spans in a way the rule does not allow.
    """
    text = joined(segments)
    if not text:
        return [0] * len(ranges)
    owner = [number for number, segment in enumerate(segments) for _ in segment.text]
    numbers = []
    for start, stop in ranges:
        # A token without text of its own (an id beyond the vocabulary) goes with the character it stands at.
        first = min(start, len(text) - 1)
        touched = list(dict.fromkeys(owner[first : max(stop, first + 1)]))
        if len(touched) == 1:
            numbers.append(touched[0])
            continue
        visible = list(
            dict.fromkeys(owner[place] for place in range(first, stop) if not text[place].isspace())
        )
        if strict and len({segments[number].atom for number in visible}) > 1:
            spans = " and ".join(repr(segments[number].atom) for number in visible)
            raise SpanError(
                f"{where}: the token {text[first:stop]!r} holds text of two spans, {spans}, so that neither can be"
                " located exactly. Put whitespace between the two texts."
            )
        tags = [number for number in visible if segments[number].atom in TAGS]
        scaffold = [number for number in touched if segments[number].atom == "template"]
        numbers.append((tags or visible or scaffold or touched)[0])
    return numbers


def check(
    segments: Sequence[Segment],
    ranges: Sequence[Range],
    numbers: Sequence[int],
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    same: Callable[[str, str], bool],
    where: str,
) -> None:
    """Decode the tokens of each segment and compare with the text it claims.

    Raises:
        SpanError: They differ by more than whitespace that a neighbour shares.
    """
    text = joined(segments)
    tokens_of: dict[int, list[int]] = {}
    for token, number in enumerate(numbers):
        tokens_of.setdefault(number, []).append(token)
    for number, segment in enumerate(segments):
        tokens = tokens_of.get(number, [])
        covered, decoded = "", ""
        if tokens:
            first, last = tokens[0], tokens[-1]
            covered = text[ranges[first][0] : max(stop for _, stop in ranges[first : last + 1])]
            decoded = decode(ids[first : last + 1])
            if not same(decoded, covered) and first:
                # Some decoders drop a leading space at the start of a sequence, but not after another token.
                before = decode(ids[first - 1 : first])
                decoded = decode(ids[first - 1 : last + 1]).removeprefix(before)
        contiguous = not tokens or tokens == list(range(tokens[0], tokens[-1] + 1))
        if not contiguous or covered.strip() != segment.text.strip() or not same(decoded, covered):
            raise SpanError(
                f"{where}: span {segment.atom!r} should hold {segment.text!r}, but its tokens decode to {decoded!r}."
                " The tokenizer cannot express this text exactly (unknown word, merged or dropped characters);"
                " change the text or use another tokenizer."
            )


def character_ranges(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], pieces: dict[int, str]
) -> tuple[str, list[Range]]:
    """Return the text of some token ids and the characters that each token covers.

    Tokens that share a character (byte-level BPE) each cover the whole of it.

    Args:
        ids: Token ids.
        decode: Text of token ids.
        pieces: Memo of single tokens' texts, filled here.
    """
    whole = decode(ids)
    text = ""
    ranges: list[Range] = []
    place = 0
    while place < len(ids):
        if ids[place] not in pieces:
            pieces[ids[place]] = decode(ids[place : place + 1])
        piece, size = pieces[ids[place]], 1
        if NOT_A_CHARACTER in piece:
            piece, size = _whole_character(ids[place : place + MAX_TOKENS_PER_CHARACTER], piece, decode)
        group = ids[place : place + size]
        inside = [(0, len(piece))] if size == 1 else _prefix_ranges(group, piece, decode)
        ranges += [(len(text) + start, len(text) + stop) for start, stop in inside]
        text += piece
        place += size
    # Token by token does not give the whole where decoding depends on the neighbours (words joined by spaces).
    return (text, ranges) if text == whole else (whole, _prefix_ranges(ids, whole, decode))


def _whole_character(
    ids: Sequence[int], first: str, decode: Callable[[Sequence[int]], str]
) -> tuple[str, int]:
    """Text and number of the fewest tokens that end on a whole character; the first alone where none do."""
    for size in range(2, len(ids) + 1):
        piece = decode(ids[:size])
        if NOT_A_CHARACTER not in piece:
            return piece, size
    return first, 1


def _prefix_ranges(ids: Sequence[int], whole: str, decode: Callable[[Sequence[int]], str]) -> list[Range]:
    """Characters covered by each token, from how far each prefix of the ids agrees with the whole text."""
    ranges, start = [], 0
    for size in range(1, len(ids) + 1):
        prefix = decode(ids[:size]) if size < len(ids) else whole
        agreed = max(start, _agreement(prefix, whole))
        # A prefix that ends inside a character decodes to something else there: the token has part in that character.
        inside_character = len(prefix) > agreed
        ranges.append((start, min(agreed + inside_character, len(whole))))
        start = agreed
    return ranges


def _agreement(a: str, b: str) -> int:
    """Number of leading characters that two texts share."""
    return next(
        (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def without_holes(offsets: Sequence[Range]) -> list[Range]:
    """Let each token begin where the one before ends: tokenizers may leave the space before a word out of its offsets.

    >>> without_holes([(0, 3), (4, 7)])
    [(0, 3), (3, 7)]
    """
    ranges, end = [], 0
    for start, stop in offsets:
        first = min(start, end)
        ranges.append((first, max(stop, first)))
        end = max(end, stop)
    return ranges
