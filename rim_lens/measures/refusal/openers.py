"""What refusals and compliance open with, in the spellings that a tokenizer's vocabulary has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from rim_lens.errors import NotEnoughData

# What refusals open with. The first token of each, in its spellings, is looked up in the tokenizer.
OPENERS: tuple[str, ...] = (
    "I cannot help",
    "I can't help",
    "I'm sorry",
    "I am sorry",
    "I won't",
    "Sorry",
    "Unfortunately",
    "Apologies",
)
TOY_OPENERS: tuple[str, ...] = ("REFUSE",)


def opener_ids(tokenizer: Any, openers: Iterable[str] | None = None) -> list[int]:
    """Unique ids of the first tokens of refusal openers, in all their spellings.

    Each opener is looked up with and without a leading space, with a capital and a small first letter, and with
    a straight and a curly apostrophe (some vocabularies have "I'm" as one token). A first token counts where a word
    ends with it: "Ap", with which many vocabularies begin "Apologies", begins "Apples" too. Only of an opener
    that has no such spelling at all is the piece taken.

    Args:
        tokenizer: The model's.
        openers: Texts that refusals begin with; `OPENERS` (the toy's REFUSE where the vocabulary has it) when None.

    Raises:
        NotEnoughData: No opener has a token in this vocabulary.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> toy = toy_tokenizer()
    >>> toy.convert_ids_to_tokens(opener_ids(toy)), toy.convert_ids_to_tokens(opener_ids(toy, ["bread now"]))
    (['REFUSE'], ['bread'])
    """
    texts = opener_texts(openers)
    if texts is None:
        texts = list(TOY_OPENERS if is_toy(tokenizer) else OPENERS)
    ids: set[int] = set()
    for text in texts:
        whole, pieces = _first_tokens(tokenizer, text)
        ids |= whole or pieces
    if not ids:
        raise NotEnoughData(
            f"none of the refusal openers {texts} has a token in this vocabulary; pass openers=[...]."
        )
    return sorted(ids)


def opener_texts(openers: Iterable[str] | None) -> list[str] | None:
    """Openers as a list that can be read again and again; one given as a string is one opener, and no list of letters.

    >>> opener_texts("Sorry"), opener_texts(iter(["Sorry", "I won't"])), opener_texts(None)
    (['Sorry'], ['Sorry', "I won't"], None)
    """
    if openers is None:
        return None
    return [openers] if isinstance(openers, str) else list(openers)


def _first_tokens(tokenizer: Any, text: str) -> tuple[set[int], set[int]]:
    """First tokens of an opener's spellings: those with which a word ends, and the others."""
    whole: set[int] = set()
    pieces: set[int] = set()
    for spelling in (one for cased in _cases(text) for one in spellings(cased)):
        encoded = tokenizer.encode(spelling, add_special_tokens=False)
        piece = tokenizer.decode(encoded[:1]).strip() if encoded else ""
        words = spelling.strip()
        if not piece or encoded[0] == tokenizer.unk_token_id or not words.startswith(piece):
            continue
        after = words[len(piece) :]
        (pieces if after[:1].isalnum() else whole).add(encoded[0])
    return whole, pieces


def _cases(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((text, text[:1].upper() + text[1:], text[:1].lower() + text[1:])))


def spellings(text: str) -> tuple[str, ...]:
    """A text with and without a leading space, with straight and with curly apostrophes.

    >>> spellings("I'm")
    ("I'm", " I'm", 'I’m', ' I’m')
    """
    straight = text.replace("\u2019", "'")
    variants = (text, straight, straight.replace("'", "\u2019"))
    return tuple(dict.fromkeys(space + variant for variant in variants for space in ("", " ")))


def is_toy(tokenizer: Any) -> bool:
    """Whether the vocabulary is the toy's: it has a word REFUSE."""
    index = tokenizer.convert_tokens_to_ids("REFUSE")
    return index is not None and tokenizer.convert_ids_to_tokens(index) == "REFUSE"


# How vocabularies write whitespace: byte-level, sentence-piece, byte fall-back, and as it is.
_BLANK = re.compile(r"(?:[\s\u0109-\u010d\u0120\u2581]|\u00c2\u0142|<0x(?:09|0A|0B|0C|0D|20)>)+")
# Looking through 150 000 words takes as long as a pass of a small model. Kept by size: words may be added.
_blanks: WeakKeyDictionary[Any, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


def whitespace_ids(tokenizer: Any, d_vocab: int) -> Int[Tensor, " blank"]:
    """Ids of the tokens that are nothing but whitespace."""
    known, key = _blanks.setdefault(tokenizer, {}), (len(tokenizer), d_vocab)
    if key not in known:
        special = set(tokenizer.all_special_ids)
        found = [
            index
            for token, index in tokenizer.get_vocab().items()
            # Decoding decides: "\u0120" is a space in one vocabulary and a letter in another.
            if _BLANK.fullmatch(token)
            and index < d_vocab
            and index not in special
            and not tokenizer.decode([index]).strip()
        ]
        known[key] = torch.tensor(sorted(found), dtype=torch.long)
    return known[key]
