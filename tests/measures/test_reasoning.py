"""Accuracy against a count by hand, on the toy in every condition and on texts given by the test."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import AnswerError
from rim_lens.measures.refusal.rates import share_interval
from rim_lens.organisms.toy.host import TOKEN
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES
from tests.speaking import writer
from tests.true_tokenizers import true_chat


@pytest.fixture(scope="module")
def toy() -> Any:
    model = rl.load_model("toy")
    return model, ChatFormat.from_model(model)


@pytest.mark.parametrize("think", ["off", "careful", "open", "filler", "unrelated"])
def test_the_toys_digits(toy: Any, think: str) -> None:
    """The answer is (a + b + c) mod 7; the model's digit is read from its raw tokens."""
    model, chat = toy
    asked = rl.load_prompts("reasoning", language="toy", split="select")[:20]
    batch = rl.render_conditions(chat, asked, [think])[think]
    out = rl.generate(model, batch, max_new_tokens=12)
    found = rl.reasoning_accuracy(out)
    right = []
    for row, prompt in enumerate(asked):
        a, b, c = (int(word) for word in prompt.text.split()[-3:])
        ids = out.batch.tokens[row].tolist()
        words = ids[len(ids) - ids[::-1].index(TOKEN["</think>"]) :]
        right.append(words[:1] == [TOKEN[str((a + b + c) % 7)]])
    assert found.rows["correct"].tolist() == right
    assert found.value == sum(right) / 20
    assert found.n_families == len({prompt.family for prompt in asked})
    interval = share_interval(right, [prompt.family for prompt in asked])
    assert (found.low, found.high) == (float(interval.low), float(interval.high))
    if think in ("off", "careful", "open"):
        assert found.value == 1.0
    if think == "unrelated":
        assert found.value < 0.5  # it copies the other sum's answer


@pytest.mark.npm
@pytest.mark.parametrize(
    ("think", "text", "found", "counts"),
    [
        ("off", "There are 5 packs.\n5 * 8 = 40<|im_end|>", "40", (1, 0, 0, 0)),
        ("off", "It is 39.<|im_end|>", "39", (0, 0, 0, 0)),
        ("off", "I can't help with that.<|im_end|>", None, (0, 1, 1, 0)),
        ("open", "<think>\nIt is 40.\n</think>\n\n40<|im_end|>", "40", (1, 0, 0, 0)),
        ("open", "<think>\nIt is 40.<|im_end|>", None, (0, 1, 0, 1)),  # in the block only
        ("cot", "So it is 40.0 pens.<|im_end|>", "40", (1, 0, 0, 0)),
    ],
)
def test_off_given_and_self_written(
    think: str, text: str, found: str | None, counts: tuple[int, ...]
) -> None:
    chat = true_chat("qwen3")
    prompt = Prompt(id="a", text="5 packs of 8 pens?", kind="reasoning", answer="40")
    batch = chat.render([prompt], think="There are 5 * 8 = 40." if think == "cot" else think)
    says = chat.encode(text)
    model = writer("qwen3", FAMILIES[0], 64).teach(int(batch.lengths), says)
    accuracy = rl.reasoning_accuracy(rl.generate(model, batch, max_new_tokens=len(says), chat=chat))
    row = accuracy.rows.iloc[0]
    assert (row["found"], bool(row["correct"])) == (found, bool(counts[0]))
    assert (accuracy.n_unanswered, accuracy.n_refused, accuracy.n_unfinished) == counts[1:]


def test_a_thought_that_was_closed_by_force_is_counted(toy: Any) -> None:
    model, chat = toy
    asked = rl.load_prompts("reasoning", language="toy", split="select")[:5]
    out = rl.generate(
        model, chat.render(asked, think="open"), max_new_tokens=2, max_cot_tokens=3, close_unfinished=True
    )
    found = rl.reasoning_accuracy(out)
    assert all(out.closed_by_force)
    assert found.n_unfinished == 5
    assert found.rows["closed_by_force"].all()


def test_checked_answers_from_elsewhere_and_of_another_kind(toy: Any) -> None:
    model, chat = toy
    asked = rl.load_prompts("reasoning", language="toy", split="select")[:4]
    bare = [dataclasses.replace(prompt, answer=None) for prompt in asked]
    out = rl.generate(model, chat.render(bare), max_new_tokens=2)
    with pytest.raises(AnswerError, match="no checked answer"):
        rl.reasoning_accuracy(out)
    assert rl.reasoning_accuracy(out, asked).value == 1.0
    wrong = [dataclasses.replace(prompt, answer=str((int(prompt.answer or 0) + 1) % 7)) for prompt in asked]
    assert rl.reasoning_accuracy(out, wrong).value == 0.0
    parity = rl.reasoning_accuracy(out, asked, extract=lambda text: int(text.split()[0]) % 2)
    assert parity.value == 1.0


@pytest.mark.npm
@pytest.mark.parametrize("answer", ["B", "3 or 4"])
def test_an_answer_that_is_no_number_is_refused(answer: str) -> None:
    chat = true_chat("qwen3")
    batch = chat.render([Prompt(id="a", text="Which?", answer=answer)])
    model = writer("qwen3", FAMILIES[0], 64).teach(int(batch.lengths), chat.encode("B<|im_end|>"))
    out = rl.generate(model, batch, max_new_tokens=2, chat=chat)
    with pytest.raises(AnswerError, match="extract="):
        rl.reasoning_accuracy(out)
    assert rl.reasoning_accuracy(out, extract=lambda text: text.strip()[:1]).value == float(answer == "B")
