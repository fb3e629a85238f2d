from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from itertools import product

import pytest

from rim_lens.errors import UnknownPromptSet
from rim_lens.prompts.records import SPLITS, Prompt
from rim_lens.prompts.toy import (
    BENIGN,
    COT_KINDS,
    DIGITS,
    ENABLING,
    FILLERS,
    HARMLESS_OBJECTS,
    HAZARDOUS,
    TOY_VOCABULARY,
    task_of,
    toy_cot,
    toy_prompts,
)

KINDS = ("harmful", "harmless", "reasoning")


def test_vocabulary_is_71_different_words():
    assert len(TOY_VOCABULARY) == len(set(TOY_VOCABULARY)) == 71
    assert (len(ENABLING), len(BENIGN), len(HAZARDOUS), len(HARMLESS_OBJECTS), len(FILLERS)) == (
        6,
        6,
        16,
        16,
        8,
    )


@pytest.mark.parametrize("op", ["+", "-"])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_follows_from_the_words_alone(kind, op):
    for prompt in toy_prompts(kind, op=op):
        verb, noun, filler, sign, *numbers = prompt.text.split()
        assert (verb in ENABLING and noun in HAZARDOUS) == (kind == "harmful")
        assert (noun in HAZARDOUS) == (kind != "reasoning")
        assert filler in FILLERS
        assert sign == op
        assert set(numbers) <= set(DIGITS)
        assert set(prompt.text.split()) <= set(TOY_VOCABULARY)


@pytest.mark.parametrize("op", ["+", "-"])
def test_answers_against_python_arithmetic(op):
    for prompt in toy_prompts("reasoning", op=op):
        a, b, c = prompt.text.split()[-3:]
        assert int(prompt.answer) == eval(f"({a} {op} {b} {op} {c}) % 7")  # noqa: S307


def test_twins_differ_in_the_action_alone_and_point_at_each_other():
    harmful = {p.id: p for p in toy_prompts("harmful")}
    harmless = {p.id: p for p in toy_prompts("harmless")}
    assert len(harmful) == len(harmless) == 480
    for prompt in harmful.values():
        twin = harmless[prompt.twin]
        assert twin.twin == prompt.id
        assert (twin.family, twin.category, twin.split) == (prompt.family, prompt.category, prompt.split)
        different = [
            pair for pair in zip(prompt.text.split(), twin.text.split(), strict=True) if len(set(pair)) > 1
        ]
        assert len(different) == 1
        verb, partner = different[0]
        assert ENABLING.index(verb) == BENIGN.index(partner)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint_by_family_and_large_enough(kind):
    families = defaultdict(set)
    for prompt in toy_prompts(kind):
        families[prompt.split].add(prompt.family)
    assert set(families) == set(SPLITS)
    for one, other in product(SPLITS, SPLITS):
        assert one == other or not families[one] & families[other]
    for split in ("select", "evaluate"):
        assert len(families[split]) >= 8
        assert len(toy_prompts(kind, split=split)) >= 40
    nouns = {split: {family.split()[1] for family in families[split]} for split in ("select", "evaluate")}
    assert not nouns["select"] & nouns["evaluate"]


def test_every_hazard_category_stands_in_every_split():
    for split in SPLITS:
        assert len(Counter(p.category for p in toy_prompts("harmful", split=split))) == 4


def test_the_same_requests_at_every_call_and_fewer_draws_are_a_part_of_more():
    assert toy_prompts("harmful") == toy_prompts("harmful")
    assert set(toy_prompts("harmful", draws=2)) < set(toy_prompts("harmful", draws=6))
    assert len({p.id for kind in KINDS for op in "+-" for p in toy_prompts(kind, op=op)}) == 3 * 2 * 480


@pytest.mark.parametrize("kind", COT_KINDS)
def test_chains_have_seven_known_tokens_and_depend_only_on_request_and_seed(kind):
    for prompt in toy_prompts("harmless", split="dev", op="-"):
        cot = toy_cot(prompt, kind)
        assert len(cot.split()) == 7
        assert set(cot.split()) <= set(TOY_VOCABULARY)
        assert toy_cot(prompt, kind) == cot


def test_careful_and_unrelated_chains_are_sound():
    for prompt in toy_prompts("harmful", split="select"):
        a, b, _, d, c, _, e = toy_cot(prompt, "careful").split()
        assert ["+", a, b, c] == prompt.text.split()[3:]
        assert (int(a) + int(b)) % 7 == int(d)
        assert (int(d) + int(c)) % 7 == int(e) == int(prompt.answer)
        assert toy_cot(prompt, "careful") == prompt.cot
        a, b, _, d, c, _, e = toy_cot(prompt, "unrelated").split()
        assert (int(a) + int(b)) % 7 == int(d)
        assert (int(d) + int(c)) % 7 == int(e) != int(prompt.answer)
        assert set(toy_cot(prompt, "filler").split()) <= set(FILLERS)


def test_the_seed_changes_filler_and_unrelated_only():
    prompts = toy_prompts("harmful", split="select")
    for kind in COT_KINDS:
        changed = [toy_cot(p, kind, seed=1) != toy_cot(p, kind, seed=2) for p in prompts]
        assert any(changed) == (kind in ("filler", "unrelated"))


def test_errors_name_what_was_asked_and_what_exists():
    with pytest.raises(UnknownPromptSet, match=r"'evil'.*harmful"):
        toy_prompts("evil")
    with pytest.raises(UnknownPromptSet, match=r"'test'.*evaluate"):
        toy_prompts("harmful", split="test")
    with pytest.raises(UnknownPromptSet, match=r"operators \+ and -"):
        toy_prompts("harmful", op="*")
    with pytest.raises(ValueError, match="343"):
        toy_prompts("harmful", draws=344)
    with pytest.raises(UnknownPromptSet, match=r"'lazy'.*careful"):
        toy_cot(toy_prompts("harmful")[0], "lazy")
    with pytest.raises(ValueError, match="action object filler"):
        task_of("How do I bake bread?")
    with pytest.raises(ValueError, match="action object filler"):
        toy_cot(Prompt(id="1", text="make bread please + 3 4 7"), "careful")


def test_the_room_does_not_need_torch():
    code = "import sys, rim_lens.prompts.toy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
