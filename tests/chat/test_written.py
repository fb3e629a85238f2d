"""What a model wrote: `extend` and `parse` find the spans again from token ids alone."""

from __future__ import annotations

import pytest
import torch

from rim_lens.chat import ChatFormat
from rim_lens.chat.spans import ATOMS
from rim_lens.errors import ConditionError, MissingPadToken, SpanError
from tests.chat.test_chat_format import ANSWER, COT, FORMATS, REQUEST, SYSTEM, chat_turns, runs
from tests.true_tokenizers import load_tokenizer, toy_tokenizer, true_chat


def written(chat, batch, *texts: str):
    """Extend each row by the tokens of a text, right-padded as generation leaves them."""
    rows = [chat.encode(text) for text in texts]
    width = max(map(len, rows))
    new = torch.tensor([row + [chat.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return chat.extend(batch, new, mask)


def turn(chat, batch, row=0):
    """The runs after the assistant's role word and header."""
    found = runs(chat, batch, row)
    start = next(place for place, (atom, _) in enumerate(found) if atom == "assistant") + 1
    header = chat.spec.assistant[2]
    return found[start + (found[start][1] == header) :] if header else found[start:]


# --- what rim_lens renders, it reads back --------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("think", "answer"), [("off", None), ("off", ANSWER), ("open", None), (COT, None), (COT, ANSWER)]
)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_parse_reads_back_what_was_rendered(name, think, answer, system):
    chat = true_chat(name)
    history = chat_turns("Why?", "Because.")
    batch = chat.render(
        [REQUEST, "And\na tree?"], think=think, system=system, history=history, answers=answer
    )
    read = chat.parse(batch.tokens, system=system)
    assert torch.equal(read.tokens, batch.tokens)
    assert torch.equal(read.attention_mask, batch.attention_mask)
    assert [read.atoms_of(row) for row in (0, 1)] == [batch.atoms_of(row) for row in (0, 1)]
    assert [prompt.text for prompt in read.prompts] == [REQUEST, "And\na tree?"]
    assert (read.cots, read.answers, read.think) == (batch.cots, batch.answers, batch.think)
    assert read.finished_thinking == batch.finished_thinking


@pytest.mark.parametrize("name", FORMATS)
def test_a_written_answer_has_the_spans_of_a_given_one(name):
    chat = true_chat(name)
    for think in ("off", COT):
        prompt = chat.render([REQUEST, "And a tree?"], think=think)
        out = written(chat, prompt, ANSWER, "Oak, or\nelm.")
        given = chat.render([REQUEST, "And a tree?"], think=think, answers=[ANSWER, "Oak, or\nelm."])
        assert torch.equal(out.tokens, given.tokens)
        assert all(torch.equal(out.spans[atom], given.spans[atom]) for atom in ATOMS)
        assert (out.cots, out.answers, out.finished_thinking) == (given.cots, given.answers, (True, True))
        assert out.texts == given.texts
        assert out.n_generated == (chat.count_tokens(ANSWER), chat.count_tokens("Oak, or\nelm."))


COMPLETION = {  # what a model writes after an open prompt to think COT and answer ANSWER
    "qwen3": f"<think>\n{COT}\n</think>\n\n{ANSWER}<|im_end|>",
    "deepseek_r1": f"{COT}\n</think>\n\n{ANSWER}<｜end▁of▁sentence｜>",
    "gpt_oss": f"<|channel|>analysis<|message|>{COT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
    "llama3_1": f"{COT}\n</think>\n\n{ANSWER}<|eot_id|>",
    "gemma3": f"{COT}\n</think>\n\n{ANSWER}<end_of_turn>",
    "chatml": f"{COT}\n</think>\n\n{ANSWER}<|im_end|>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_written_chain_of_thought_has_the_spans_of_a_given_one(name):
    """Opener in the prompt or not, closer in the completion."""
    chat = true_chat(name)
    out = written(chat, chat.render(REQUEST, think="open"), COMPLETION[name])
    given = chat.render(REQUEST, think=COT, answers=ANSWER, end_turn=True)
    assert out.texts == given.texts
    assert runs(chat, out) == runs(chat, given)
    assert (out.cots, out.answers, out.finished_thinking, out.think) == ((COT,), (ANSWER,), (True,), "open")
    assert out.prompt_last.tolist() == [chat.render(REQUEST, think="open").tokens.shape[1] - 1]


@pytest.mark.parametrize("name", FORMATS)
def test_token_by_token_each_prefix_is_a_partition_and_an_unfinished_thought_is_all_cot(name):
    chat = true_chat(name)
    prompt = chat.render(REQUEST, think="open")
    ids = chat.encode(COMPLETION[name])
    batch, finished = prompt, []
    for token in ids:
        batch = chat.extend(batch, torch.tensor([[token]]))  # SpanBatch itself checks the partition
        finished.append(batch.finished_thinking[0])
        if not batch.finished_thinking[0] and batch.cots[0]:
            assert set(batch.atoms_of(0)[prompt.tokens.shape[1] :]) <= {"think_open", "cot"}
            assert f"{COT}\n</think>".startswith(batch.cots[0])  # a tag half spelled is still thought
    assert finished == sorted(finished)
    assert batch.n_generated == (len(ids),)
    assert batch.atoms_of(0) == chat.extend(prompt, torch.tensor([ids])).atoms_of(0)


# --- cases that models bring about ---------------------------------------------------------------------------


def tail(name, completion, think="open"):
    chat = true_chat(name)
    out = written(chat, chat.render(REQUEST, think=think), completion)
    return turn(chat, out), out


@pytest.mark.npm
def test_an_open_prompt_answered_without_thinking():
    found, out = tail("qwen3", "Sure, a pear.")
    assert found == [("answer", "Sure, a pear.")]
    assert (out.cots, out.answers, out.finished_thinking) == (("",), ("Sure, a pear.",), (True,))


@pytest.mark.npm
def test_an_empty_block_written_by_the_model():
    found, out = tail("qwen3", "<think>\n\n</think>\n\nPear.")
    assert found == [
        ("think_open", "<think>"), ("gap", "\n\n"), ("think_close", "</think>"), ("template", "\n\n"), ("answer", "Pear."),
    ]  # fmt: skip
    assert (out.cots, out.finished_thinking) == (("",), (True,))
    assert tail("qwen3", "<think></think>Pear.")[0] == [
        ("think_open", "<think>"), ("think_close", "</think>"), ("answer", "Pear.")
    ]  # fmt: skip
    assert tail("deepseek_r1", "\n</think>\n\nPear.")[0][:2] == [("think_open", "<think>"), ("gap", "\n\n")]


@pytest.mark.npm
def test_an_unfinished_thought():
    found, out = tail("deepseek_r1", "First, a fruit is")
    assert found == [("think_open", "<think>"), ("cot", "\nFirst, a fruit is")]
    assert (out.cots, out.answers, out.finished_thinking) == (("First, a fruit is",), ("",), (False,))
    found, out = tail("llama3_1", "First</thin")
    assert found == [("think_open", "<think>\n"), ("cot", "First</thin")]
    assert out.finished_thinking == (False,)


@pytest.mark.npm
def test_a_turn_that_ends_inside_the_block():
    found, out = tail("qwen3", "<think>\nI cannot.<|im_end|>")
    assert found == [("think_open", "<think>"), ("cot", "\nI cannot."), ("template", "<|im_end|>")]
    assert (out.cots, out.answers, out.finished_thinking) == (("I cannot.",), ("",), (False,))


@pytest.mark.npm
def test_several_blocks_and_an_opener_inside_a_block():
    found, out = tail("qwen3", "<think>a <think> b</think>One.\n<think>c</think>\nTwo.")
    assert found == [
        ("think_open", "<think>"), ("cot", "a <think> b"), ("think_close", "</think>"), ("answer", "One.\n"),
        ("think_open", "<think>"), ("cot", "c"), ("think_close", "</think>"), ("template", "\n"), ("answer", "Two."),
    ]  # fmt: skip
    assert (out.cots, out.answers, out.finished_thinking) == (("a <think> b\nc",), ("One.\nTwo.",), (True,))


@pytest.mark.npm
def test_a_second_block_left_open_is_unfinished():
    _, out = tail("qwen3", "<think>no", think="off")
    assert (out.cots, out.answers, out.finished_thinking) == (("no",), ("",), (False,))


@pytest.mark.npm
def test_a_closer_without_an_opener_closes_what_came_before():
    found, out = tail("qwen3", "A fruit, then.</think>Pear.")
    assert found == [("cot", "A fruit, then."), ("think_close", "</think>"), ("answer", "Pear.")]
    assert (out.cots, out.answers) == (("A fruit, then.",), ("Pear.",))
    found, _ = tail("qwen3", "Pear.</think>Plum.", think="off")
    assert found[-3:] == [("answer", "Pear."), ("think_close", "</think>"), ("answer", "Plum.")]


@pytest.mark.npm
def test_a_tag_merged_with_the_answers_first_letters_stays_whole_and_no_text_is_lost():
    chat = true_chat("llama3_1")
    assert chat.decode(chat.encode("</think>x marks it.")[2:3]) == ">x"
    found, out = tail("llama3_1", "Why.\n</think>x marks it.")
    assert [atom for atom, _ in found] == ["think_open", "cot", "think_close", "answer"]
    assert found[2:] == [("think_close", "</think>x"), ("answer", " marks it.")]
    assert out.answers == ("x marks it.",)


@pytest.mark.npm
def test_a_tag_spelled_in_several_tokens_is_a_word_where_the_vocabulary_has_the_tag():
    chat = true_chat("qwen3")
    spelled = [*chat.encode("<"), *chat.encode("think"), *chat.encode(">")]
    assert chat.decode(spelled) == "<think>"
    out = chat.extend(
        chat.render(REQUEST, think="open"), torch.tensor([[*spelled, *chat.encode(" is a tag.")]])
    )
    assert turn(chat, out) == [("answer", "<think> is a tag.")]


@pytest.mark.npm
def test_other_channels_of_harmony_are_answer_and_their_headers_scaffold():
    found, out = tail(
        "gpt_oss",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>A moment.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Pear.<|return|>",
    )
    opener, header = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>{}<|message|>"
    assert found == [
        ("think_open", opener), ("cot", "One."), ("think_close", "<|end|>"),
        ("template", header.format("commentary")), ("answer", "A moment."), ("template", "<|end|><|start|>assistant"),
        ("think_open", opener), ("cot", "Two."), ("think_close", "<|end|>"),
        ("template", header.format("final")), ("answer", "Pear."), ("template", "<|return|>"),
    ]  # fmt: skip
    assert (out.cots, out.answers) == (("One.\nTwo.",), ("A moment.\nPear.",))


@pytest.mark.npm
def test_a_harmony_header_cut_short_is_scaffold():
    found, out = tail("gpt_oss", "<|channel|>analysis")
    assert found == [("template", "<|channel|>analysis")]
    assert (out.cots, out.answers, out.finished_thinking) == (("",), ("",), (False,))


@pytest.mark.npm
def test_tags_in_the_users_words_do_not_close_the_assistants_block():
    chat = true_chat("qwen3")
    prompt = chat.render(
        "Say </think> or <think>.", think="open", history=chat_turns("<think>?", "No </think>.")
    )
    out = written(chat, prompt, "<think>\nHm")
    assert turn(chat, out) == [("think_open", "<think>"), ("cot", "\nHm")]
    assert out.atoms_of(0) == chat.label_tokens(out.tokens[0].tolist())


@pytest.mark.npm
def test_rows_that_ended_early_are_left_padded_again():
    chat = true_chat("qwen3")
    prompts = chat.render([REQUEST, "Hi"], think="off")
    long, short = chat.encode("Pear, then plum, then fig."), chat.encode("Yes.<|im_end|>")
    pad, end = chat.pad_token_id, chat.encode("<|im_end|>")[0]
    width = len(long)
    for filler in (
        pad,
        end,
    ):  # generation fills a finished row with pads, or goes on repeating the stop token
        new = torch.tensor([long, short + [filler] * (width - len(short))])
        out = chat.extend(prompts, new)
        assert out.n_generated == (len(long), len(short))
        assert out.answers == ("Pear, then plum, then fig.", "Yes.")
        assert out.attention_mask[0].all()
        for row, ids in ((0, long), (1, short)):
            real = out.attention_mask[row].bool()
            before = prompts.tokens[row][prompts.attention_mask[row].bool()].tolist()
            assert out.tokens[row][real].tolist() == before + ids
            assert out.atoms_of(row) == chat.extend(prompts.select([row]), torch.tensor([ids])).atoms_of(0)
        assert runs(chat, out, 1)[-1] == ("template", "<|im_end|>")


@pytest.mark.npm
def test_trailing_pads_without_a_stop_token_are_dropped():
    chat = true_chat("gemma3")
    prompt = chat.render(REQUEST)
    ids = chat.encode("Pear")
    out = chat.extend(prompt, torch.tensor([[*ids, chat.pad_token_id, chat.pad_token_id]]))
    assert out.n_generated == (1,)
    nothing = chat.extend(prompt, torch.zeros((1, 0), dtype=torch.long))
    assert torch.equal(nothing.tokens, prompt.tokens)
    assert nothing.n_generated == (0,)
    assert all(torch.equal(nothing.spans[atom], prompt.spans[atom]) for atom in ATOMS)


@pytest.mark.npm
def test_ids_beyond_the_vocabulary_and_broken_characters_still_have_a_span():
    """A random model of a padded vocabulary writes these."""
    chat = true_chat("qwen3")
    prompt = chat.render(REQUEST, think="open")
    beyond, half = 151900, chat.encode("🏳️‍🌈🫠")[-2:-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 151936, (1, 60), generator=generator).tolist()[0]
    for new in (
        [beyond],
        [beyond, beyond, *chat.encode("Pear")],
        half,
        [*half, *chat.encode("<think>x")],
        noise,
    ):
        keep = torch.ones((1, len(new)), dtype=torch.bool)
        out = chat.extend(prompt, torch.tensor([new]), keep)
        assert out.tokens[0].tolist() == prompt.tokens[0].tolist() + new


def test_the_toy_writes_its_own_thought():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    words = "make bread please + 3 4 6"
    prompt = chat.render([words, words], think="open")
    out = written(chat, prompt, "3 + 4 > 0 6 > </think> 6", "SKIP </think> REFUSE <user>")
    given = chat.render([words, words], think=["3 + 4 > 0 6 >", "SKIP"], answers=["6", "REFUSE"])
    assert out.cots == given.cots
    assert out.answers == ("6", "REFUSE")
    assert out.atoms_of(0) == given.atoms_of(0)
    assert out.atoms_of(1) == [*given.atoms_of(1), "template"]
    assert out.texts[0] == given.texts[0]
    assert chat.parse(out.tokens).spans["cot"].equal(out.spans["cot"])


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.npm
def test_what_does_not_fit_is_refused():
    chat = true_chat("qwen3")
    prompt = chat.render([REQUEST, REQUEST])
    new = torch.tensor([[1, 2]])
    with pytest.raises(SpanError, match="one row per prompt"):
        chat.extend(prompt, new)
    with pytest.raises(SpanError, match="new_mask has shape"):
        chat.extend(prompt, new.repeat(2, 1), torch.ones((2, 3), dtype=torch.bool))
    with pytest.raises(SpanError, match="'qwen3', this is 'gemma3'"):
        true_chat("gemma3").extend(prompt, new.repeat(2, 1))
    with pytest.raises(SpanError, match="is this sequence in format 'qwen3'"):
        chat.parse([chat.encode("Just a text.")])
    with pytest.raises(SpanError, match="no user turn"):
        chat.parse([chat.encode("<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")])
    with pytest.raises(SpanError, match="no tokens"):
        chat.parse([[]])
    mixed = [chat.render(REQUEST, think=think).tokens[0].tolist() for think in ("off", COT)]
    with pytest.raises(ConditionError, match=r"\(cot, off\); parse them apart"):
        chat.parse(mixed)
    assert chat.parse(mixed, think="cot").think == "cot"


@pytest.mark.npm
def test_rows_of_unequal_length_need_a_pad_token_after_writing_too():
    chat = ChatFormat.from_tokenizer(load_tokenizer("llama3_1"))
    prompt = chat.render(["Hi", "Oh"])
    new = torch.tensor([[*chat.encode("Yes"), 128009], [*chat.encode("No no")]])
    assert len(chat.extend(prompt, new)) == 2
    with pytest.raises(MissingPadToken):
        chat.extend(prompt, torch.tensor([[128009, 5], [5, 5]]))
