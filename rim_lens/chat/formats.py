"""What a chat format is: the pieces of text around the words, written down as data, and how to find the right one.

A format is a `FormatSpec`. The built-in ones stand at the end of this file; `register_format` adds another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rim_lens.errors import DuplicateChatFormat, UnknownChatFormat

# Who writes the opening think tag when the model is to write its own chain of thought.
Opener = Literal["template", "added", "model"]


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    r"""The pieces of a chat format.

    One turn after another makes the text: BOS, system turn, user turns, the assistant's header, think block, answer.

    Attributes:
        name: Unique among formats.
        vocabulary: Single tokens that the tokenizer must have for this format to fit.
        template_holds: Strings that the tokenizer's chat template, where it has one, must hold for this format to fit.
        bos: The begin-of-sequence token that the template writes first; "" for none.
        system: Text before and after the system words; None where the format has no system turn.
        system_in_user: The system words stand inside the first user turn, before the user's words (Gemma).
        injected: Text before and after what the template injects when no system message is given, where that differs
            from `system` (harmony: the identity is a system message, the caller's words a developer message).
        user: Text before the user's words.
        turn_end: The end-of-turn token after the user's words; "" for none.
        between: Scaffold between one turn and the next.
        assistant: The assistant's header in three parts: before the role word, the role word, after it.
        earlier_lead: What an earlier assistant turn holds between its header and its words.
        earlier_end: End-of-turn token of an earlier assistant turn; None: the same as `answer_end`.
        answer_end: End-of-turn token of the answer; "" for none.
        think_open: Opening tag of a think block.
        after_open: Whitespace between the opening tag and the chain of thought.
        before_close: Whitespace between the chain of thought and the closing tag. An empty block holds
            `after_open` + `before_close`.
        think_close: Closing tag.
        after_close: Scaffold between the closing tag and the answer.
        opener: Who writes the opening tag in the open condition: the template's generation prompt ("template"), rim_lens
            ("added": the format has no think tags of its own, so that nothing else would tell the model to think), or the
            model itself ("model"). Where a tokenizer has a template, what that template does is looked up and wins.
        lone_close: A closing tag without an opening one still closes: what the turn said before was reasoning. False
            where the closing tag also ends other messages (harmony).
        scaffold: Regular expression for further scaffold inside the assistant's turn (harmony's headers).
        separator: What stands between all pieces: " " for a vocabulary of whitespace-separated words, where whitespace
            has no tokens; else "".
        trims: Roles whose words the template strips of outer whitespace.
        stops: Tokens that end generation, besides `answer_end` and the tokenizer's own end-of-sequence token.
    """

    name: str
    vocabulary: tuple[str, ...]
    user: str
    assistant: tuple[str, str, str]
    template_holds: tuple[str, ...] = ()
    bos: str = ""
    system: tuple[str, str] | None = None
    system_in_user: bool = False
    injected: tuple[str, str] | None = None
    turn_end: str = ""
    between: str = ""
    earlier_lead: str = ""
    earlier_end: str | None = None
    answer_end: str = ""
    think_open: str = "<think>"
    after_open: str = "\n"
    before_close: str = "\n"
    think_close: str = "</think>"
    after_close: str = "\n\n"
    opener: Opener = "model"
    lone_close: bool = True
    scaffold: str = ""
    separator: str = ""
    trims: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


# Newest first, so that a format registered by a user is asked before the built-in ones.
_formats: dict[str, FormatSpec] = {}


def register_format(spec: FormatSpec) -> None:
    r"""Add a chat format, to be found by `ChatFormat.from_tokenizer` before the built-in ones.

    Args:
        spec: The format's pieces. It is checked against a tokenizer's own template when one is met.

    Raises:
        DuplicateChatFormat: A format of that name exists already.

    >>> import rim_lens as rl
    >>> rl.register_format(rl.FormatSpec(
    ...     name="zephyr-like", vocabulary=("<|user|>", "<|assistant|>"), user="<|user|>\n", turn_end="</s>", between="\n",
    ...     assistant=("", "<|assistant|>", "\n"), system=("<|system|>\n", "</s>\n"), answer_end="</s>", opener="added"))
    >>> format_names()[0]
    'zephyr-like'
    >>> forget_format("zephyr-like")
    """
    if spec.name in _formats:
        raise DuplicateChatFormat(
            f"a chat format called {spec.name!r} is registered already (there are {', '.join(format_names())});"
            " choose another name."
        )
    known = dict(_formats)
    _formats.clear()
    _formats.update({spec.name: spec, **known})


def forget_format(name: str) -> None:
    """Take a registered format out again.

    Raises:
        UnknownChatFormat: No format bears that name.
    """
    named_format(name)
    del _formats[name]


def format_names() -> list[str]:
    """Names of the known formats, in the order in which a tokenizer is tried against them."""
    return list(_formats)


def named_format(name: str) -> FormatSpec:
    """Return a format by name.

    Raises:
        UnknownChatFormat: No format bears that name.
    """
    if name not in _formats:
        raise UnknownChatFormat(
            f"no chat format is called {name!r}; there are {', '.join(format_names())}. {HOW_TO_REGISTER}"
        )
    return _formats[name]


HOW_TO_REGISTER = (
    "Describe another with rl.FormatSpec(name=..., vocabulary=..., user=..., assistant=...) and pass it to"
    " rl.register_format."
)


def find_format(tokenizer: Any, has_token: Callable[[str], bool]) -> FormatSpec:
    """Return the first known format whose marks the tokenizer bears.

    Args:
        tokenizer: A Hugging Face tokenizer.
        has_token: Tells whether a string is a single token of its vocabulary.

    Raises:
        UnknownChatFormat: None fits.
    """
    template = template_text(tokenizer)
    for spec in _formats.values():
        if all(has_token(token) for token in spec.vocabulary) and (
            template is None or all(mark in template for mark in spec.template_holds)
        ):
            return spec
    known = [f"{spec.name} (needs {' '.join(spec.vocabulary)})" for spec in _formats.values()]
    found = "no chat template" if template is None else f"the chat template {template[:120]!r}…"
    raise UnknownChatFormat(
        f"no known chat format fits this tokenizer ({type(tokenizer).__name__}, {found}). Known:"
        f" {', '.join(known)}. {HOW_TO_REGISTER}"
        " If one of these is right all the same, name it: ChatFormat.from_tokenizer(tokenizer, format=...)."
    )


def template_text(tokenizer: Any) -> str | None:
    """The tokenizer's chat template as text, or None (of several named ones: "default")."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


_QWEN3 = FormatSpec(
    name="qwen3",
    vocabulary=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    template_holds=("<|im_start|>",),
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user="<|im_start|>user\n",
    turn_end="<|im_end|>",
    between="\n",
    assistant=("<|im_start|>", "assistant", "\n"),
    answer_end="<|im_end|>",
    stops=("<|endoftext|>",),
)

_BUILT_IN = (
    # Words of the toy organism. An answer ends where the next turn would begin.
    FormatSpec(
        name="toy",
        vocabulary=("<user>", "<assistant>", "<think>", "</think>", "REFUSE", "YES", "GUESS", "SKIP"),
        user="<user>",
        assistant=("", "<assistant>", ""),
        earlier_lead="<think> </think>",
        after_open="",
        before_close="",
        after_close="",
        opener="template",
        separator=" ",
        stops=("<user>",),
    ),
    # The chain of thought is the analysis channel. The closing tag is the <|end|> of that message; the header of the
    # final channel after it is scaffold, as the newlines after </think> are elsewhere. Any other channel is answer.
    FormatSpec(
        name="gpt_oss",
        vocabulary=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        template_holds=("<|start|>",),
        system=("<|start|>developer<|message|># Instructions\n\n", "<|end|>"),
        injected=("<|start|>system<|message|>", "<|end|>"),
        user="<|start|>user<|message|>",
        turn_end="<|end|>",
        assistant=("<|start|>", "assistant", ""),
        earlier_lead="<|channel|>final<|message|>",
        earlier_end="<|end|>",
        answer_end="<|return|>",
        think_open="<|channel|>analysis<|message|>",
        after_open="",
        before_close="",
        think_close="<|end|>",
        after_close="<|start|>assistant<|channel|>final<|message|>",
        lone_close=False,
        scaffold=r"<\|start\|>[^<]*|<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?(?:<\|message\|>|$)",
        stops=("<|call|>", "<|endoftext|>"),
    ),
    FormatSpec(
        name="deepseek_r1",
        vocabulary=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        template_holds=("<｜User｜>",),
        bos="<｜begin▁of▁sentence｜>",
        system=("", ""),
        user="<｜User｜>",
        assistant=("", "<｜Assistant｜>", ""),
        answer_end="<｜end▁of▁sentence｜>",
        opener="template",
    ),
    _QWEN3,
    FormatSpec(
        name="llama3_1",
        vocabulary=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        template_holds=("<|start_header_id|>",),
        bos="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        turn_end="<|eot_id|>",
        assistant=("<|start_header_id|>", "assistant", "<|end_header_id|>\n\n"),
        answer_end="<|eot_id|>",
        opener="added",
        trims=("system", "user", "assistant"),
        stops=("<|end_of_text|>", "<|eom_id|>"),
    ),
    FormatSpec(
        name="gemma3",
        vocabulary=("<start_of_turn>", "<end_of_turn>"),
        template_holds=("<start_of_turn>",),
        bos="<bos>",
        system=("", "\n\n"),
        system_in_user=True,
        user="<start_of_turn>user\n",
        turn_end="<end_of_turn>",
        between="\n",
        assistant=("<start_of_turn>", "model", "\n"),
        answer_end="<end_of_turn>",
        opener="added",
        trims=("user", "assistant"),
        stops=("<eos>",),
    ),
    replace(_QWEN3, name="chatml", vocabulary=("<|im_start|>", "<|im_end|>"), opener="added"),
)
_formats.update({spec.name: spec for spec in _BUILT_IN})
