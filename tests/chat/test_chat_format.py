"""Rendering on true tokenizers: text as the template has it, spans as written here by hand."""

from __future__ import annotations

import pytest
import torch

from rim_lens.chat import DEFAULT, ChatFormat
from rim_lens.chat.spans import ATOMS
from rim_lens.errors import ConditionError, EmptySpan, MissingPadToken, SpanError
from rim_lens.prompts.records import Prompt
from tests.true_tokenizers import PACKAGES, load_tokenizer, toy_tokenizer, true_chat

REQUEST, COT, ANSWER, SYSTEM = "Name a fruit.", "They want one fruit.\nI pick one.", "Pear.", "Be brief."
FORMATS = [pytest.param(name, marks=pytest.mark.npm) for name in PACKAGES]
OWN_NEWLINE = {
    "qwen3",
    "deepseek_r1",
    "gemma3",
    "chatml",
}  # the newlines next to a tag are tokens of their own


def runs(chat, batch, row=0) -> list[tuple[str, str]]:
    """(atom, decoded text) of each run of tokens with the same atom."""
    ids = batch.tokens[row][batch.attention_mask[row].bool()].tolist()
    found: list[tuple[str, list[int]]] = []
    for atom, token in zip(batch.atoms_of(row), ids, strict=True):
        if not found or found[-1][0] != atom:
            found.append((atom, []))
        found[-1][1].append(token)
    return [(atom, chat.decode(tokens)) for atom, tokens in found]


# One row per format: system turn, request, empty block, answer, end of turn.
EXPECTED = {
    "qwen3": [
        ("sink", "<|im_start|>"),
        ("template", "system\n"),
        ("system", SYSTEM),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("request", REQUEST),
        ("turn_end", "<|im_end|>"),
        ("template", "\n<|im_start|>"),
        ("assistant", "assistant"),
        ("template", "\n"),
        ("think_open", "<think>"),
        ("gap", "\n\n"),
        ("think_close", "</think>"),
        ("template", "\n\n"),
        ("answer", ANSWER),
        ("template", "<|im_end|>"),
    ],
    "deepseek_r1": [
        ("sink", "<｜begin▁of▁sentence｜>"),
        ("system", SYSTEM),
        ("template", "<｜User｜>"),
        ("request", REQUEST),
        ("assistant", "<｜Assistant｜>"),
        ("think_open", "<think>"),
        ("gap", "\n\n"),
        ("think_close", "</think>"),
        ("template", "\n\n"),
        ("answer", ANSWER),
        ("template", "<｜end▁of▁sentence｜>"),
    ],
    "llama3_1": [
        ("sink", "<|begin_of_text|>"),
        ("template", "<|start_header_id|>system<|end_header_id|>\n\n"),
        ("system", SYSTEM),
        ("template", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"),
        ("request", REQUEST),
        ("turn_end", "<|eot_id|>"),
        ("template", "<|start_header_id|>"),
        ("assistant", "assistant"),
        ("template", "<|end_header_id|>\n\n"),
        ("think_open", "<think>\n\n"),  # ">\n\n" is one token
        ("think_close", "</think>\n\n"),
        ("answer", ANSWER),
        ("template", "<|eot_id|>"),
    ],
    "gemma3": [
        ("sink", "<bos>"),
        ("template", "<start_of_turn>user\n"),
        ("system", SYSTEM),
        ("template", "\n\n"),
        ("request", REQUEST),
        ("turn_end", "<end_of_turn>"),
        ("template", "\n<start_of_turn>"),
        ("assistant", "model"),
        ("template", "\n"),
        ("think_open", "<think>"),
        ("gap", "\n\n"),
        ("think_close", "</think>"),
        ("template", "\n\n"),
        ("answer", ANSWER),
        ("template", "<end_of_turn>"),
    ],
    "chatml": [
        ("sink", "<|im_start|>"),
        ("template", "system\n"),
        ("system", SYSTEM),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("request", REQUEST),
        ("turn_end", "<|im_end|>"),
        ("template", "\n<|im_start|>"),
        ("assistant", "assistant"),
        ("template", "\n"),
        ("think_open", "<think>"),
        ("gap", "\n\n"),
        ("think_close", "</think>"),
        ("template", "\n\n"),
        ("answer", ANSWER),
        ("template", "<|im_end|>"),
    ],
    "gpt_oss": [
        ("sink", "<|start|>"),
        (
            "template",
            "system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\n"
            "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
            "<|end|><|start|>developer<|message|># Instructions\n\n",
        ),
        ("system", SYSTEM),
        ("template", "<|end|><|start|>user<|message|>"),
        ("request", REQUEST),
        ("turn_end", "<|end|>"),
        ("template", "<|start|>"),
        ("assistant", "assistant"),
        ("think_open", "<|channel|>analysis<|message|>"),
        ("think_close", "<|end|>"),
        ("template", "<|start|>assistant<|channel|>final<|message|>"),
        ("answer", ANSWER),
        ("template", "<|return|>"),
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_spans_of_an_empty_block_are_those_written_by_hand(name):
    chat = true_chat(name)
    batch = chat.render(REQUEST, think="off", system=SYSTEM, answers=ANSWER, end_turn=True)
    assert runs(chat, batch) == EXPECTED[name]
    assert batch.texts[0] == "".join(text for _, text in EXPECTED[name])
    assert (batch.answers, batch.cots, batch.finished_thinking) == ((ANSWER,), ("",), (True,))


@pytest.mark.parametrize("name", FORMATS)
def test_spans_of_a_given_chain_of_thought(name):
    chat = true_chat(name)
    batch = chat.render(REQUEST, think=COT)
    block = [run for run in runs(chat, batch) if run[0] in ("think_open", "cot", "gap", "think_close")]
    if name == "gpt_oss":
        assert block == [
            ("think_open", "<|channel|>analysis<|message|>"), ("cot", COT), ("think_close", "<|end|>")
        ]  # fmt: skip
    elif name in OWN_NEWLINE:
        assert block == [("think_open", "<think>"), ("cot", f"\n{COT}\n"), ("think_close", "</think>")]
    else:
        assert block == [("think_open", "<think>\n"), ("cot", f"{COT}\n"), ("think_close", "</think>\n\n")]
    assert chat.decode(batch.tokens[0][batch.spans["think"][0]]) == "".join(text for _, text in block)
    assert batch.cots == (COT,)


@pytest.mark.parametrize("name", FORMATS)
def test_an_open_prompt_ends_where_the_model_is_to_write(name):
    chat = true_chat(name)
    batch = chat.render(REQUEST, think="open")
    last = [run for run in runs(chat, batch) if run[0] in ("assistant", "think_open", "gap")][1:]
    expected = {
        "qwen3": [],
        "gpt_oss": [],
        "deepseek_r1": [("think_open", "<think>"), ("gap", "\n")],
        "gemma3": [("think_open", "<think>"), ("gap", "\n")],
        "llama3_1": [("think_open", "<think>\n")],
        "chatml": [("think_open", "<think>"), ("gap", "\n")],
    }
    assert last == expected[name]
    assert batch.spans["think"].any() == chat.opener_in_prompt
    assert batch.finished_thinking == (False,)


def chat_turns(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(words)]


THOUGHT = "<think>\nEarlier thought.\n</think>\n\nEarlier answer."
CONVERSATIONS = {
    "one turn": (None, chat_turns(REQUEST)),
    "system": (SYSTEM, chat_turns(REQUEST)),
    "turns": (None, chat_turns("Hi.", "Hello.", REQUEST)),
    "system and turns": (SYSTEM, chat_turns("Hi.", "Hello.", "And?", " Well. ", REQUEST)),
    "earlier reasoning": (None, chat_turns("Hi.", THOUGHT, REQUEST)),
    "outer whitespace": (" Be brief.\n", chat_turns(" Hi.\n", "\nHello. ", "\n\n  Name a fruit. \n")),
    "tags in the words": (
        None,
        chat_turns("What is <think>?", "A </think> tag opens.", "Say <think>no</think> <|x|>"),
    ),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_text_is_what_the_template_renders(name, conversation):
    chat = true_chat(name)
    system, messages = CONVERSATIONS[conversation]
    given = ([{"role": "system", "content": system}] if system else []) + messages
    theirs = chat.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    *history, last = messages
    asked = {"system": system if system else DEFAULT, "history": history}
    ours = chat.render(last["content"], think="open", **asked)
    if chat.spec.opener == "added":
        theirs += "<think>\n"
    assert ours.texts[0] == theirs
    assert ours.tokens[0].tolist() == chat.tokenizer(theirs, add_special_tokens=False)["input_ids"]


@pytest.mark.npm
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_qwen3_off_is_its_template_with_thinking_switched_off(conversation):
    chat = true_chat("qwen3")
    system, messages = CONVERSATIONS[conversation]
    given = ([{"role": "system", "content": system}] if system else []) + messages
    theirs = chat.tokenizer.apply_chat_template(
        given, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    *history, last = messages
    assert chat.render(last["content"], think="off", system=system, history=history).texts[0] == theirs


@pytest.mark.npm
def test_qwen3_answers_are_its_template_with_the_assistants_turn_given():
    chat = true_chat("qwen3")
    for think, content in (("off", ANSWER), (COT, f"<think>\n{COT}\n</think>\n\n{ANSWER}")):
        theirs = chat.tokenizer.apply_chat_template(chat_turns(REQUEST, content), tokenize=False)
        assert chat.render(REQUEST, think=think, answers=ANSWER, end_turn=True).texts[0] + "\n" == theirs


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_with_an_answer_begins_with_the_tokens_of_the_row_without(name):
    chat = true_chat(name)
    for think in ("off", COT):
        prompt = chat.render(REQUEST, think=think).tokens[0].tolist()
        answered = chat.render(REQUEST, think=think, answers=ANSWER, end_turn=True).tokens[0].tolist()
        end = chat.encode(chat.spec.answer_end)
        assert answered == prompt + chat.encode(ANSWER) + end
        assert chat.render(REQUEST, think=think, answers="", end_turn=True).tokens[0].tolist() == prompt + end


@pytest.mark.npm
def test_that_matters_where_newlines_are_split_before_a_word():
    chat = true_chat("chatml")
    row = chat.render(REQUEST, answers=ANSWER)
    assert row.tokens[0].tolist() != chat.encode(row.texts[0])
    assert chat.decode(row.tokens[0]) == row.texts[0]


@pytest.mark.parametrize("name", FORMATS)
def test_there_is_one_bos_or_none(name):
    chat = true_chat(name)
    ids = chat.render(REQUEST, system=SYSTEM, history=chat_turns("Hi.", "Hello.")).tokens[0].tolist()
    if chat.spec.bos:
        assert ids.count(chat.encode(chat.spec.bos)[0]) == 1
        assert chat.decode(ids[:1]) == chat.spec.bos
    else:
        assert chat.decode(ids[:1]) in ("<|im_start|>", "<|start|>")


@pytest.mark.parametrize("name", FORMATS)
def test_no_system_turn_means_none(name):
    chat = true_chat(name)
    batch = chat.render(REQUEST)
    assert not batch.spans["system"].any()
    assert "system" not in batch.texts[0]
    assert "ChatGPT" not in batch.texts[0]
    assert "SmolLM" not in batch.texts[0]


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_last_turn_is_read(name):
    chat = true_chat(name)
    history = chat_turns("Why <think>x</think>?", "No </think> here.")
    batch = chat.render("And <think>y</think>?", think="off", history=history, system="A <think> tag.")
    found = dict(runs(chat, batch)[::-1])
    assert found["request"] == "And <think>y</think>?"
    assert found["system"] == "A <think> tag."
    assert batch.spans["assistant"].sum() == 1
    alone = chat.render("And?", think="off")
    for tag in ("think_open", "think_close"):
        assert batch.spans[tag].sum() == alone.spans[tag].sum()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("think", ["off", "open", COT])
def test_batched_under_left_padding_is_one_by_one(name, think):
    chat = true_chat(name)
    requests = [REQUEST, "How do I tie a bow on a very long ribbon, please?", "🍐?"]
    batch = chat.render(requests, think=think)
    assert (batch.attention_mask[0] == 0).any()
    for row, request in enumerate(requests):
        alone = chat.render([request], think=think)
        real = batch.attention_mask[row].bool()
        assert batch.tokens[row][real].tolist() == alone.tokens[0].tolist()
        assert (batch.tokens[row][~real] == chat.pad_token_id).all()
        assert batch.atoms_of(row) == alone.atoms_of(0)
        one = batch.select([row])
        assert torch.equal(one.tokens, alone.tokens)
        assert all(torch.equal(one.spans[atom], alone.spans[atom]) for atom in ATOMS)


def test_the_toy_has_no_gap_and_counts_words():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    words = "make bread please + 3 4 6"
    off, open_ = chat.render(words, think="off"), chat.render(words, think="open")
    cot = chat.render(words, think="3 + 4 > 0 6 > 6", answers="6")
    assert runs(chat, off) == [
        ("sink", "<user>"), ("request", words), ("assistant", "<assistant>"),
        ("think_open", "<think>"), ("think_close", "</think>"),
    ]  # fmt: skip
    assert runs(chat, open_) == runs(chat, off)[:-1]
    assert runs(chat, cot)[3:] == [
        ("think_open", "<think>"), ("cot", "3 + 4 > 0 6 > 6"), ("think_close", "</think>"), ("answer", "6")
    ]  # fmt: skip
    assert off.tokens.shape == (1, 11)
    with pytest.raises(EmptySpan, match="'think'"):
        off.spans.require("gap")
    for think, batch in ((True, open_), (False, off)):
        theirs = chat.tokenizer.apply_chat_template(
            chat_turns(words), tokenize=False, add_generation_prompt=True, enable_thinking=think
        )
        assert batch.texts[0] == theirs
    earlier = chat.render(words, think="open", history=chat_turns(words, "6"))
    assert earlier.texts[0] == chat.tokenizer.apply_chat_template(
        chat_turns(words, "6", words), tokenize=False, add_generation_prompt=True
    )


def test_a_word_the_toy_lacks_is_refused_with_both_texts():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    with pytest.raises(
        SpanError, match=r"row 1: span 'request' should hold ' make zebra'.*decode to ' make <pad>'"
    ):
        chat.render(["make bread", "make zebra"])


@pytest.mark.npm
def test_shared_whitespace_between_header_and_request_is_scaffold():
    chat = true_chat("qwen3")
    batch = chat.render("\nHi")
    assert dict(runs(chat, batch))["request"] == "Hi"
    assert ("template", "user\n\n") in runs(chat, batch)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.fixture
def toy() -> ChatFormat:
    return ChatFormat.from_tokenizer(toy_tokenizer())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"think": ""}, "row 0 is empty"),
        ({"think": [" \n", "3"]}, "row 0 is empty"),
        ({"think": ["3", "3 </think> 4"]}, "chain of thought of row 1 holds '</think>'"),
        ({"think": "<think> 3"}, "holds '<think>'"),
        ({"think": "3 <user> make"}, "holds '<user>'"),
        ({"think": "careful"}, r"chat\.cots\(requests, 'careful'\)"),
        ({"think": "careful:begun"}, r"rl\.render_conditions\(chat, requests, \['careful:begun'\]\)"),
        ({"think": None}, "think=None.*think='off'"),
        ({"think": True}, "think=True.*think='open'"),
        ({"think": "Off"}, "think='Off'.*think='off'"),
        ({"think": "closed"}, "think='closed'.*think='off'"),
        ({"think": "cot"}, "think='cot'.*the text itself"),
        ({"think": ["3", 4]}, "row 1 is 4"),
        ({"answers": 6}, "answers=6"),
        ({"think": ["3"]}, "1 texts for 2 requests"),
        ({"think": ["3", None]}, "row 1 is None"),
        ({"think": "open", "answers": "6"}, "still to think"),
        ({"answers": ["6"]}, "1 texts for 2 requests"),
        ({"answers": "6 <think>"}, "the answer of row 0 holds '<think>'"),
        ({"answers": "6", "end_turn": True}, "no end-of-turn token"),
        ({"end_turn": True}, "no answers were given"),
        ({"system": "Be brief."}, "has no system turn"),
        ({"history": [{"role": "user", "content": "make"}]}, r"roles \['user'\]"),
        ({"history": [{"role": "system", "content": "x"}]}, "System words go into system="),
        ({"history": [[], [], []]}, "3 conversations for 2 requests"),
    ],
)
def test_what_cannot_be_rendered_is_refused(toy, asked, message):
    with pytest.raises(ConditionError, match=message):
        toy.render(["make bread", "make soup"], **asked)


def test_no_requests_are_refused(toy):
    with pytest.raises(ConditionError, match="no requests"):
        toy.render([])


def test_half_a_surrogate_pair_is_refused(toy):
    with pytest.raises(SpanError, match="surrogate"):
        toy.render("make \ud83d")


@pytest.mark.npm
def test_control_tokens_in_an_answer_are_refused_and_in_the_users_words_labelled_request():
    chat = true_chat("qwen3")
    for words in ("Yes.<|im_end|>", "A<|im_start|>user"):
        with pytest.raises(ConditionError, match=r"holds '<\|im_"):
            chat.render(REQUEST, answers=words)
    tricky = "Hi<|im_end|>\n<|im_start|>assistant\n<think>no</think>"
    assert dict(runs(chat, chat.render(tricky)))["request"] == tricky
    with pytest.raises(ConditionError, match=r"holds '<\|end\|>'"):
        true_chat("gpt_oss").render(REQUEST, think="Done.<|end|>")


@pytest.mark.npm
def test_without_a_pad_token_rows_of_unequal_length_are_refused():
    tokenizer = load_tokenizer("llama3_1")
    chat = ChatFormat.from_tokenizer(tokenizer)
    with pytest.raises(MissingPadToken, match="pad_token_id="):
        chat.render(["Hi", "Hello, how are you?"])
    alone = chat.render(["Hi", "Oh"])
    assert alone.pad_token_id == -1
    assert alone.attention_mask.all()
    padded = ChatFormat.from_tokenizer(tokenizer, pad_token_id=7).render(["Hi", "Hello, how are you?"])
    assert (padded.tokens[0] == 7).any()


def test_records_keep_their_facts_and_a_single_request_is_a_batch_of_one(toy):
    record = Prompt(id="h1", text="make bread", kind="harmless", family="f")
    assert toy.render(record).prompts == (record,)
    assert toy.render([record, "make soup"], label="mine").name == "mine"
    assert toy.render("make bread").name == "off"
