"""The digest of a vocabulary: the same words under the same ids, and no more."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedTokenizerFast

from rim_lens.chat.vocabulary import vocabulary_digest
from rim_lens.lens import tokenizer_of, wrap_hf
from rim_lens.organisms.toy.host import toy_tokenizer
from tests.families import FAMILIES, hf_model, tokenizer


def worded(words: dict[str, int]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))


def test_words_and_their_ids_count() -> None:
    one = vocabulary_digest(worded({"a": 0, "b": 1, "c": 2}))
    assert one == vocabulary_digest(worded({"c": 2, "b": 1, "a": 0}))
    assert len({one, vocabulary_digest(worded({"a": 0, "b": 2, "c": 1}))}) == 2
    assert len({one, vocabulary_digest(worded({"a": 0, "b": 1, "d": 2}))}) == 2
    assert len({one, vocabulary_digest(worded({"a": 0, "b": 1}))}) == 2


def test_tokens_that_were_added_do_not_count() -> None:
    """TransformerLens adds special tokens to its copy, fine-tuning a tag or two; ids before them stay."""
    plain = worded({"a": 0, "b": 1})
    more = copy.deepcopy(plain)
    more.add_tokens(["<think>"])
    more.add_special_tokens({"pad_token": "<|pad|>"})
    assert len(more.get_vocab()) == 4
    assert vocabulary_digest(more) == vocabulary_digest(plain)


def test_a_models_tokenizer_is_the_one_it_was_given() -> None:
    for family in FAMILIES:
        model = wrap_hf(hf_model("llama"), tokenizer(), family=family)
        assert vocabulary_digest(tokenizer_of(model)) == vocabulary_digest(tokenizer())
    assert vocabulary_digest(toy_tokenizer()) != vocabulary_digest(tokenizer())


def test_what_has_no_fast_tokenizer_has_no_digest() -> None:
    assert vocabulary_digest(None) == ""
