"""Finding, registering and fitting formats."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rim_lens.chat import DEFAULT, ChatFormat, FormatSpec, formats, register_format
from rim_lens.chat.formats import forget_format, format_names, named_format
from rim_lens.errors import DuplicateChatFormat, MissingTokenizer, TemplateMismatch, UnknownChatFormat
from tests.true_tokenizers import PACKAGES, SMOLLM2_SYSTEM, load_tokenizer, toy_tokenizer, true_chat

MINE = FormatSpec(
    name="mine",
    vocabulary=("REFUSE",),
    user="<user>",
    assistant=("", "<assistant>", ""),
    after_open="",
    before_close="",
    after_close="",
    separator=" ",
    opener="template",
    earlier_lead="<think> </think>",
)


@pytest.fixture(autouse=True)
def same_registry_afterwards():
    before = dict(formats._formats)
    yield
    formats._formats.clear()
    formats._formats.update(before)


def test_toy_is_found_by_its_vocabulary():
    chat = ChatFormat.from_model(SimpleNamespace(tokenizer=toy_tokenizer()))
    assert (chat.name, chat.opener_in_prompt, chat.pad_token_id) == ("toy", True, 0)
    assert chat.stop_ids == (chat.encode("<user>")[0],)


@pytest.mark.npm
@pytest.mark.parametrize("name", PACKAGES)
def test_true_tokenizers_are_found_with_and_without_their_template(name):
    tokenizer = load_tokenizer(name)
    assert ChatFormat.from_tokenizer(tokenizer).name == name
    tokenizer.chat_template = None
    if name != "chatml":  # a Llama vocabulary with two tokens more: only the template says ChatML
        assert ChatFormat.from_tokenizer(tokenizer).name == name


@pytest.mark.npm
@pytest.mark.parametrize(
    ("name", "in_prompt", "tag_lengths", "stops"),
    [
        ("qwen3", False, (1, 1), {"<|im_end|>", "<|endoftext|>"}),
        ("deepseek_r1", True, (1, 1), {"<｜end▁of▁sentence｜>"}),
        ("gpt_oss", False, (3, 1), {"<|return|>", "<|call|>", "<|endoftext|>"}),
        ("llama3_1", True, (3, 3), {"<|eot_id|>", "<|end_of_text|>"}),
        ("gemma3", True, (3, 3), {"<end_of_turn>", "<eos>"}),
        ("chatml", True, (3, 3), {"<|im_end|>"}),
    ],
)
def test_facts_of_the_formats(name, in_prompt, tag_lengths, stops):
    chat = true_chat(name)
    assert chat.opener_in_prompt is in_prompt
    assert (len(chat.tag_ids["think_open"]), len(chat.tag_ids["think_close"])) == tag_lengths
    assert {chat.decode([token]) for token in chat.stop_ids} == stops
    assert chat.count_tokens("Hello") == 1


def test_a_registered_format_is_asked_first_and_a_name_is_given_once():
    register_format(MINE)
    assert ChatFormat.from_tokenizer(toy_tokenizer()).name == "mine"
    assert ChatFormat.from_tokenizer(toy_tokenizer(), format="toy").name == "toy"
    with pytest.raises(DuplicateChatFormat, match="'mine' is registered already"):
        register_format(MINE)
    with pytest.raises(DuplicateChatFormat):
        register_format(replace(MINE, name="qwen3"))
    forget_format("mine")
    assert "mine" not in format_names()


def test_an_unknown_tokenizer_is_told_what_there_is_and_how_to_register():
    tokenizer = toy_tokenizer()
    forget_format("toy")
    with pytest.raises(UnknownChatFormat, match=r"(?s)Known: gpt_oss .*llama3_1 .*register_format"):
        ChatFormat.from_tokenizer(tokenizer)
    with pytest.raises(UnknownChatFormat, match="no chat format is called 'vicuna'; there are"):
        named_format("vicuna")


def test_a_model_without_a_tokenizer_or_with_a_slow_one_is_refused():
    with pytest.raises(MissingTokenizer, match="has no tokenizer"):
        ChatFormat.from_model(SimpleNamespace(tokenizer=None))
    with pytest.raises(MissingTokenizer, match="use_fast"):
        ChatFormat.from_tokenizer(SimpleNamespace(is_fast=False))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<assistant> <think>", "<assistant> begin <think>"),  # the generation prompt
        ("<user> ", "<user> please "),  # the user's header
        ("</think>' if", "</think> now' if"),  # what enable_thinking=False appends
        ("<assistant> <think> </think> '", "<assistant> '"),  # earlier turns
    ],
)
def test_a_changed_template_is_noticed(old, new):
    tokenizer = toy_tokenizer()
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(TemplateMismatch, match="register a format"):
        ChatFormat.from_tokenizer(tokenizer)


def test_a_template_that_refuses_what_the_format_allows_is_noticed():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no chat here') }}"
    with pytest.raises(TemplateMismatch, match="no chat here"):
        ChatFormat.from_tokenizer(tokenizer)


@pytest.mark.npm
@pytest.mark.parametrize(("name", "old", "new"), [
    ("qwen3", "'<|im_start|>assistant\\n' }}\n    {%- if enable", "'<|im_start|>assistant: ' }}\n    {%- if enable"),
    ("qwen3", "<think>\\n\\n</think>\\n\\n", "<think></think>"),
    ("llama3_1", "{% set content = bos_token + content %}", ""),
    ("gemma3", "{{ bos_token }}", "{{ bos_token + bos_token }}"),
])  # fmt: skip
def test_a_changed_template_of_a_true_tokenizer_is_noticed(name, old, new):
    tokenizer = load_tokenizer(name)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(TemplateMismatch):
        ChatFormat.from_tokenizer(tokenizer)


@pytest.mark.npm
def test_who_writes_the_opener_is_read_from_the_template():
    tokenizer = load_tokenizer("qwen3")
    written = "{{- '<|im_start|>assistant\\n' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        written, "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking is false", "false")
    thinking_only = ChatFormat.from_tokenizer(tokenizer)
    assert thinking_only.opener_in_prompt
    assert thinking_only.render("Hi", think="open").texts[0].endswith("assistant\n<think>\n")
    assert thinking_only.render("Hi", think="off").texts[0].endswith("assistant\n<think>\n\n</think>\n\n")

    tokenizer = load_tokenizer("deepseek_r1")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", "")
    older = ChatFormat.from_tokenizer(tokenizer)
    assert not older.opener_in_prompt
    assert older.render("Hi", think="open").texts[0].endswith("<｜Assistant｜>")


@pytest.mark.npm
def test_an_injected_system_turn_is_known_and_left_out_unless_asked_for():
    chat = true_chat("chatml")
    assert chat.default_system == SMOLLM2_SYSTEM
    assert chat.render("Hi").texts[0].startswith("<|im_start|>user\nHi")
    default = chat.render("Hi", system=DEFAULT, think="open")
    words = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert default.texts[0] == words + "<think>\n"
    assert chat.decode(default.tokens[0][default.spans["system"][0]]) == SMOLLM2_SYSTEM
    assert true_chat("qwen3").default_system is None


@pytest.mark.npm
def test_a_preamble_before_the_system_words_is_taken_over():
    """The published Llama 3.1 template puts dates there, whether or not a system message is given."""
    tokenizer = load_tokenizer("llama3_1")
    head = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    tokenizer.chat_template = (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set said = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}"
        "{{- '" + head + "' + said + '<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim)"
        " + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    )
    chat = ChatFormat.from_tokenizer(tokenizer, pad_token_id=128002)
    batch = chat.render("Hi", system="Be brief.", think="open")
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert batch.texts[0] == theirs + "<think>\n"
    assert chat.decode(batch.tokens[0][batch.spans["system"][0]]) == "Be brief."
    assert "Today Date" not in chat.render("Hi").texts[0]
    assert chat.default_system == "Today Date: 26 Jul 2024\n\n"
    assert head in chat.render("Hi", system=DEFAULT).texts[0]


@pytest.mark.npm
def test_a_template_that_takes_no_system_message_makes_a_format_without_one():
    tokenizer = load_tokenizer("gemma3")
    guard = "{%- if messages[0]['role'] == 'system' -%}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        guard, guard + "{{ raise_exception('System role not supported') }}"
    )
    assert ChatFormat.from_tokenizer(tokenizer).spec.system is None
