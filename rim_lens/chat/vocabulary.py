"""Which words a tokenizer has numbers for: the same ids are other words to another one."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import xxhash

_known: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def vocabulary_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits of a tokenizer's words and their ids; "" of a slow one.

    Tokens that were added to it later are left out: TransformerLens adds some, and so does fine-tuning, and all words before keep
    their ids. It does not show how text is cut into these words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    if tokenizer not in _known:
        words = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda word: word[1])
        _known[tokenizer] = xxhash.xxh3_64(
            "\0".join(f"{word} {number}" for word, number in words).encode()
        ).hexdigest()
    return _known[tokenizer]
