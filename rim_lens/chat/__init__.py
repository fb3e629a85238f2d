"""A tokenizer's chat template → token ids with named spans."""

from __future__ import annotations

from rim_lens.chat.chat_format import ChatFormat
from rim_lens.chat.conditions import render_conditions
from rim_lens.chat.formats import FormatSpec, register_format
from rim_lens.chat.rendering import DEFAULT
from rim_lens.chat.sentences import Sentences, cot_sentences, split_sentences
from rim_lens.chat.spans import SpanBatch, Spans

__all__ = [
    "DEFAULT",
    "ChatFormat",
    "FormatSpec",
    "Sentences",
    "SpanBatch",
    "Spans",
    "cot_sentences",
    "register_format",
    "render_conditions",
    "split_sentences",
]
