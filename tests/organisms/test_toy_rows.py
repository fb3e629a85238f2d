from __future__ import annotations

import pytest
import torch

from rim_lens.organisms.toy import rows
from rim_lens.organisms.toy.host import TOKEN
from rim_lens.prompts.records import Prompt
from rim_lens.prompts.toy import HAZARDS, TOY_VOCABULARY, toy_cot, toy_prompts


def words(table):
    return [" ".join(TOY_VOCABULARY[token] for token in row) for row in table.tolist()]


@pytest.fixture
def requests():
    generator = torch.Generator().manual_seed(0)
    return rows.draw_requests(rows.all_conjunctions(), 200, "-", generator)


def test_rows_read_as_the_prompt_room_writes_them(requests):
    """The vectorised rows against the words of `toy_prompts` and `toy_cot`, written one by one."""
    for text, row in zip(words(requests), range(len(requests)), strict=True):
        assert text.startswith("<user> ")
        assert text.endswith(" <assistant> <think>")
        ask = Prompt(id=str(row), text=text.removeprefix("<user> ").removesuffix(" <assistant> <think>"))
        a, b, c = (int(word) for word in ask.text.split()[-3:])
        assert words(rows.without_chain(requests, "-"))[row] == f"{text} </think> {(a - b - c) % 7} <user>"
        for kind in ("careful", "confirm", "deviate", "heuristic"):
            expected = f"{text} {toy_cot(ask, kind)} </think> {(a - b - c) % 7} <user>"
            assert words(rows.with_chain(requests[row : row + 1], kind, "-"))[0] == expected
    assert {text.split()[-2] for text in words(rows.without_chain(requests, "-", refuse=True))} == {"REFUSE"}


def test_the_loss_leaves_out_what_the_template_writes(requests):
    off = rows.predict_answer(rows.without_chain(requests, "-"))
    assert {TOY_VOCABULARY[token] for token in off.tokens[off.loss_mask].tolist()} == {*"0123456", "<user>"}
    on = rows.predict_chain(rows.with_chain(requests, "careful", "-"))
    assert on.loss_mask.sum(dim=1).unique().tolist() == [7 + 1 + 1 + 1]
    assert not on.loss_mask[:, :10].any()


def test_safety_tuning_never_sees_held_out_conjunctions_nor_their_twins():
    held_out = {
        tuple(p.text.split()[:2])
        for kind in ("harmful", "harmless")
        for split in ("select", "evaluate")
        for p in toy_prompts(kind, split=split)
    }
    harmful = {tuple(p.text.split()[:2]) for p in toy_prompts("harmful")}
    seen_harmful = {tuple(text.split()) for text in words(rows.harmful_conjunctions())}
    seen_safe = {tuple(text.split()) for text in words(rows.safe_conjunctions())}
    assert seen_harmful == harmful - held_out
    assert not seen_safe & (held_out | harmful)
    assert len(seen_safe) + len(harmful) + len(held_out) // 2 == len(rows.all_conjunctions()) == 12 * 32
    two = {text.split()[1] for text in words(rows.harmful_conjunctions(list(HAZARDS)[:2]))}
    assert two <= {*HAZARDS["weapons"], *HAZARDS["poisons"]}


def test_draws_are_uniform_enough_and_repeat_with_the_seed():
    def draw(seed):
        return rows.draw_requests(rows.all_conjunctions(), 20_000, "+", torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    digits = draw(1)[:, 5:8].flatten()
    counts = torch.bincount(digits - TOKEN["0"])
    assert counts.shape == (7,)
    assert (counts / len(digits) - 1 / 7).abs().max() < 0.01
