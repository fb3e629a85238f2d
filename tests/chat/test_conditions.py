"""Conditions by name: what stands in each block, of what length, and which controls belong to it."""

from __future__ import annotations

import pytest

import rim_lens as rl
from rim_lens.chat import ChatFormat, render_conditions
from rim_lens.chat.conditions import condition_names, controls_of, with_controls
from rim_lens.errors import ConditionError, CotError
from rim_lens.organisms.toy.host import toy_tokenizer
from rim_lens.prompts import cot_texts, self_statement, statement_texts
from tests.true_tokenizers import true_chat


def cot_of(batch, row):
    return batch.cots[row]


@pytest.mark.npm
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "chatml"])
def test_every_condition_in_true_formats(name):
    chat = true_chat(name)
    asked = [
        *rl.load_prompts("harmful", split="select")[:2],
        *rl.load_prompts("reasoning", split="select")[:1],
    ]
    batches = render_conditions(chat, asked, condition_names())
    assert list(batches) == list(condition_names())
    for condition, batch in batches.items():
        first, *rest = condition.split(":")
        assert batch.label == condition
        assert batch.think == (
            "open" if condition == "open" or rest[-1:] == ["begun"] else "off" if first == "off" else "cot"
        )
        assert list(batch.finished_thinking) == [batch.think != "open"] * 3
        if first in ("off", "open"):
            assert set(batch.cots) == {""}
        elif not rest:
            assert list(batch.cots) == cot_texts(asked, first, chat.count_tokens)
        elif len(rest) == 1:
            assert set(batch.cots) == {self_statement(first)}
        else:  # a control: as many tokens as its statement
            statement = self_statement(rest[0])
            assert {chat.count_tokens(text) for text in batch.cots} == {chat.count_tokens(statement)}
            assert statement not in batch.cots
        if batch.think == "open" and rest:
            # The block is open, ends with the words themselves, and is what the model would have written so far.
            assert all(text.endswith(cot) for text, cot in zip(batch.texts, batch.cots, strict=True))
            assert batch.atoms_of(0)[-1] == "cot"
            assert chat.parse(batch.tokens, batch.attention_mask).digest == batch.digest
            opened = chat.render(asked, think="open")
            plain = (
                opened.texts[0]
                if chat.opener_in_prompt
                else opened.texts[0] + chat.spec.think_open + chat.spec.after_open
            )
            assert batch.texts[0] == plain + batch.cots[0]


def test_the_toys_statements_are_the_words_of_its_patterns():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    asked = rl.load_prompts("harmful", language="toy", split="select")[:4]
    batches = render_conditions(chat, asked, condition_names())
    for kind in ("confirm", "deviate", "heuristic", "careful"):
        word = self_statement(kind, "toy")
        assert set(batches[f"{kind}:statement"].cots) == {word}
        assert all(word in cot.split() for cot in batches[kind].cots)
        for control in ("filler", "unrelated"):
            found = batches[f"{control}:{kind}:begun"]
            assert {int(n) for n in found.spans["cot"].sum(dim=1)} == {1}
            assert all(text.endswith(cot) for text, cot in zip(found.texts, found.cots, strict=True))


def test_texts_of_ones_own_and_the_order_asked_for():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    batches = render_conditions(
        chat, ["make bread now + 1 2 3"] * 2, {"mine": "bread soup", "each": ["tea", "cake"], "off": None}
    )
    assert list(batches) == ["mine", "each", "off"]
    assert batches["mine"].cots == ("bread soup",) * 2
    assert batches["each"].cots == ("tea", "cake")
    assert batches["each"].name == "each"


def test_one_name_alone_is_one_condition():
    """A string is a sequence too, of letters."""
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    asked = rl.load_prompts("harmful", language="toy", split="select")[:2]
    assert list(render_conditions(chat, asked, "careful")) == ["careful"]
    with pytest.raises(ConditionError, match="no think condition is called 'carefull'"):
        render_conditions(chat, asked, "carefull")


@pytest.mark.parametrize(
    "conditions", [["careful", "careless"], ["off:statement"], ["filler:statement"], {"mine": None}]
)
def test_unknown_names_are_refused(conditions):
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    with pytest.raises(ConditionError, match="no think condition is called"):
        render_conditions(chat, ["make bread now + 1 2 3"], conditions)


def test_named_twice_and_begun_where_it_cannot_be():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    with pytest.raises(ConditionError, match="twice"):
        render_conditions(chat, ["make bread now + 1 2 3"], ["off", "off"])
    with pytest.raises(ConditionError, match="think='open'"):
        chat.render(["make bread now"], think="off", begin="bread")
    for begin in ("", "  ", "careful", "bread </think>"):
        with pytest.raises(ConditionError):
            chat.render(["make bread now"], think="open", begin=begin)
    with pytest.raises(CotError, match="control"):
        statement_texts(["a"], "careful", len, control="noise")


def test_controls():
    for name in condition_names():
        controls = controls_of(name)
        assert set(controls) <= set(condition_names())
        assert bool(controls) == (name != "off" and name.partition(":")[0] not in ("filler", "unrelated"))
    names, added = with_controls(["confirm:begun", "careful"])
    assert names == (
        "off",
        "confirm:begun",
        "careful",
        "filler:confirm:begun",
        "unrelated:confirm:begun",
        "filler",
        "unrelated",
    )
    assert added == ("off", "filler:confirm:begun", "unrelated:confirm:begun", "filler", "unrelated")
    assert with_controls(["off"]) == (("off", "filler", "unrelated"), ("filler", "unrelated"))
    assert with_controls(["unrelated"])[0] == ("off", "unrelated", "filler")
