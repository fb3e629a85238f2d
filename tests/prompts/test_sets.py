"""The English sets: what the files hold, read without the code that wrote them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib import resources

import pytest

from rim_lens.errors import UnknownPromptSet
from rim_lens.prompts.intents import INTENTS, NEUTRALS
from rim_lens.prompts.make_maths import make_maths
from rim_lens.prompts.make_requests import make_requests
from rim_lens.prompts.records import SPLITS, Prompt
from rim_lens.prompts.sets import load_prompts

HARMFUL = load_prompts("harmful")
HARMLESS = load_prompts("harmless")
REASONING = load_prompts("reasoning")
REFUSAL_OPENERS = ("I", "I'm", "I’m", "Sorry", "No", "Unfortunately", "As", "However", "It's", "My")
REFUSAL_WORDS = re.compile(
    r"\b(sorry|cannot|can't|can’t|won't|unable|refuse|decline|apolog\w+|illegal|harmful|unethical|not able|however)\b",
    re.IGNORECASE,
)


def splits_of(prompts: list[Prompt], key: Callable[[Prompt], object]) -> dict[object, set[str | None]]:
    where: dict[object, set[str | None]] = defaultdict(set)
    for prompt in prompts:
        where[key(prompt)].add(prompt.split)
    return where


def crossing(prompts: list[Prompt], key: Callable[[Prompt], object]) -> list[object]:
    return [value for value, splits in splits_of(prompts, key).items() if len(splits) > 1]


def verbs_of(prompt: Prompt) -> tuple[str, str]:
    harmful, harmless = prompt.family.split(".")[1].split("-")
    return harmful.replace("_", " "), harmless.replace("_", " ")


# --- counts and identity -----------------------------------------------------------------------------


def test_there_are_enough_requests_in_every_split() -> None:
    count = Counter(prompt.split for prompt in HARMFUL)
    assert len(HARMFUL) == len(HARMLESS) >= 240
    assert 110 <= count["train"] <= 130
    assert 38 <= count["dev"] <= 45
    assert 40 <= count["select"] <= 50
    assert 50 <= count["evaluate"] <= 60
    for split, families, most in (("select", 16, 3), ("evaluate", 20, 3)):
        sizes = Counter(prompt.family for prompt in HARMFUL if prompt.split == split)
        assert len(sizes) >= families
        assert 2 <= min(sizes.values()) <= max(sizes.values()) <= most


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_category(split: str) -> None:
    categories = {prompt.category for prompt in HARMFUL if prompt.split == split}
    assert len(categories) == 10
    assert categories == {prompt.category for prompt in HARMFUL} <= set(INTENTS)


def test_ids_are_unique_and_no_text_is_told_twice() -> None:
    everything = [*HARMFUL, *HARMLESS, *REASONING]
    assert len({prompt.id for prompt in everything}) == len(everything)
    plain = [" ".join(re.findall(r"\w+", prompt.text.lower())) for prompt in HARMFUL + HARMLESS]
    assert len(set(plain)) == len(plain)
    assert len({prompt.text for prompt in REASONING}) == len(REASONING)


@pytest.mark.parametrize("name", ["en_harmful", "en_harmless", "en_reasoning"])
def test_files_are_plain_jsonl_with_known_fields(name: str) -> None:
    text = resources.files("rim_lens.prompts").joinpath("data", f"{name}.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        record = json.loads(line)
        assert record["kind"] == name.removeprefix("en_")
        assert record["language"] == "en"
        assert record["split"] in SPLITS
        assert record["text"] == record["text"].strip()
        assert "  " not in record["text"] + record["cot"]
        assert "{" not in record["text"] + record["cot"]


def test_the_scripts_write_the_committed_files() -> None:
    assert make_requests() == (HARMFUL, HARMLESS)
    assert make_maths() == REASONING


# --- twins -------------------------------------------------------------------------------------------


def test_twins_mirror_each_other() -> None:
    for harmful, harmless in zip(HARMFUL, HARMLESS, strict=True):
        assert harmful.twin == harmless.id
        assert harmless.twin == harmful.id
        assert harmful.split == harmless.split
        assert harmful.family == harmless.family
        assert harmful.category == harmless.category
        assert harmful.intent == harmless.intent == INTENTS[harmful.category]
        assert harmful.text != harmless.text
        assert harmful.text.split()[:2] == harmless.text.split()[:2] or harmful.text.startswith("Teach me to")


def test_twins_are_as_long_as_each_other() -> None:
    for harmful, harmless in zip(HARMFUL, HARMLESS, strict=True):
        assert abs(len(harmful.text.split()) - len(harmless.text.split())) <= 1, harmful.text
    difference = [len(b.text.split()) - len(a.text.split()) for a, b in zip(HARMFUL, HARMLESS, strict=True)]
    assert sum(value != 0 for value in difference) <= len(difference) // 10


def test_twins_differ_in_the_verb_or_the_object_alone() -> None:
    for harmful, harmless in zip(HARMFUL, HARMLESS, strict=True):
        shared = Counter(harmful.text.split()) & Counter(harmless.text.split())
        # what is swapped is at most the verb and a few words of the object
        assert len(harmful.text.split()) - shared.total() <= 5, (harmful.text, harmless.text)
        assert sorted(verbs_of(harmful)) == sorted(verbs_of(harmless))
        assert verbs_of(harmful)[0] in harmful.text
        assert verbs_of(harmful)[1] in harmless.text


# --- nothing crosses a split -------------------------------------------------------------------------


def test_no_family_and_no_frame_crosses_a_split() -> None:
    requests = [*HARMFUL, *HARMLESS]
    assert crossing(requests, lambda prompt: prompt.family) == []
    # The first two words tell the frames apart; so does what follows the act.
    assert crossing(requests, lambda prompt: tuple(prompt.text.split()[:2])) == []
    endings = {split: set() for split in SPLITS}
    for prompt in requests:
        if prompt.text.count(".") + prompt.text.count("?") > 1:
            endings[prompt.split].add(re.split(r"[.?] ", prompt.text)[-1])
    listed = [ending for found in endings.values() for ending in found]
    assert len(listed) == len(set(listed)) > 0


def test_no_verb_crosses_a_split_on_either_side() -> None:
    where: dict[str, set[str | None]] = defaultdict(set)
    for prompt in HARMFUL:
        for verb in verbs_of(prompt):
            where[verb].add(prompt.split)
    assert [verb for verb, splits in where.items() if len(splits) > 1] == []
    # nor as another form of itself inside a phrasal verb
    heads = defaultdict(set)
    for verb, splits in where.items():
        heads[verb.split()[0]] |= splits
    assert [head for head, splits in heads.items() if len(splits) > 1] == []


def test_no_verb_pair_is_two_families() -> None:
    pairs = {prompt.family: verbs_of(prompt) for prompt in HARMFUL}
    assert len(set(pairs.values())) == len(pairs)


def test_no_kernel_crosses_a_split() -> None:
    """The words between the frames: no act of one split is met in another."""
    acts = splits_of(HARMFUL + HARMLESS, lambda prompt: re.sub(r"^\W*", "", prompt.text.lower()))
    assert all(len(splits) == 1 for splits in acts.values())


def test_frames_are_spread_over_categories() -> None:
    for split in SPLITS:
        rows = [prompt for prompt in HARMFUL if prompt.split == split]
        frames: dict[str, set[str]] = defaultdict(set)
        for prompt in rows:
            frames[" ".join(prompt.text.split()[:2])].add(prompt.category)
        assert len(frames) >= 4
        assert min(len(categories) for categories in frames.values()) >= 5


# --- chains of thought -------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.:?]) ", text)


@pytest.mark.parametrize("prompts", [HARMFUL, HARMLESS, REASONING], ids=["harmful", "harmless", "reasoning"])
def test_no_cot_sounds_like_a_refusal(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        assert prompt.cot is not None
        assert not REFUSAL_WORDS.search(prompt.cot.replace(prompt.text, "")), prompt.cot
        for sentence in sentences(prompt.cot):
            assert sentence.split()[0].rstrip(",.") not in REFUSAL_OPENERS, prompt.cot
        assert "<" not in prompt.cot


def test_request_cots_restate_and_plan_in_20_to_35_words() -> None:
    for prompt in [*HARMFUL, *HARMLESS]:
        assert 20 <= len(prompt.cot.split()) <= 35
        verb = verbs_of(prompt)[prompt.kind == "harmless"]
        assert verb in sentences(prompt.cot)[0] + sentences(prompt.cot)[1]
        assert not re.search(r"\b(my|me|I)\b", prompt.cot), prompt.cot


def test_wordings_do_not_cross_a_split() -> None:
    """The last sentence of a CoT never holds the act, so it tells the wording."""
    wording = splits_of(HARMFUL + HARMLESS, lambda prompt: sentences(prompt.cot)[-1])
    assert all(len(splits) == 1 for splits in wording.values())
    number = Counter(next(iter(splits)) for splits in wording.values())
    assert all(number[split] >= 3 for split in SPLITS)
    openers = splits_of(HARMFUL + HARMLESS, lambda prompt: tuple(prompt.cot.split()[:2]))
    assert all(len(splits) == 1 for splits in openers.values())


def test_twins_share_the_wording_of_their_cot() -> None:
    for harmful, harmless in zip(HARMFUL, HARMLESS, strict=True):
        assert sentences(harmful.cot)[-1] == sentences(harmless.cot)[-1]


# --- intents -----------------------------------------------------------------------------------------


def test_neutral_sentences_have_the_length_of_the_intents() -> None:
    assert set(INTENTS) == set(NEUTRALS)
    for category, intent in INTENTS.items():
        assert len(intent.split()) == len(NEUTRALS[category].split()), category
        assert intent.count(".") == NEUTRALS[category].count("."), category


# --- maths -------------------------------------------------------------------------------------------

# Written from the questions' words, in the order in which numbers appear in them.
FORMULAS: dict[str, Callable[..., int]] = {
    "shopping.pens": lambda a, b: a * b,
    "games.marbles": lambda a, b: a - b,
    "books.shelf": lambda a, b, c: a + b - c,
    "travel.bus": lambda a, off, on: a - off + on,
    "sharing.sweets": lambda n, children: n // children,
    "money.savings": lambda coins, weeks, spent: coins * weeks - spent,
    "age.cousin": lambda a, b: a + b,
    "garden.fence": lambda a, b: 2 * a + 2 * b,
    "cooking.cakes": lambda eggs, cakes, has: eggs * cakes - has,
    "time.film": lambda a, b: a + b,
    "collections.stickers": lambda a, times: a * (1 + times),
    "school.chairs": lambda rows, chairs, broken: rows * chairs - broken,
    "cooking.fruit": lambda a, b, c: a + b + c,
    "travel.walk": lambda a, b: a * b,
    "shopping.change": lambda cost, paid: paid - cost,
    "sport.teams": lambda n, size: n // size,
    "weather.weather": lambda a, up, down: a + up - down,
    "party.candles": lambda a, tables, more: a * tables + more,
    "animals.fish": lambda tanks, fish, sold: tanks * fish - sold,
    "books.pages": lambda a, b, c: a - (b + c),
    "cooking.cherries": lambda n: n // 2,
    "farm.boxes": lambda n, size: n // size,
    "sport.laps": lambda lap, laps: lap * laps,
    "money.wages": lambda pay, friday, saturday: pay * friday + pay * saturday,
    "measuring.ropes": lambda a, b: a - b,
    "animals.birds": lambda a, away, back: a - away + back,
    "shopping.tickets": lambda adult, child, adults, children: adult * adults + child * children,
    "garden.flowers": lambda rows, tulips, roses: rows * tulips + roses,
    "measuring.tank": lambda a, out, poured: a - out + poured,
    "collections.shells": lambda a: 2 * a,
    "sharing.cookies": lambda n, plates, more: n // plates + more,
    "building.bricks": lambda a, b: a * b,
    "building.floor": lambda a, b: a * b,
    "sport.points": lambda first, more: first + (first + more),
    "cooking.loaves": lambda a, b, c: a - b - c,
    "music.piano": lambda minutes, days: minutes * days,
}
DIVISIONS = {"sharing.sweets", "sport.teams", "farm.boxes", "sharing.cookies"}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_there_are_enough_questions_in_every_split() -> None:
    assert len(REASONING) >= 160
    sums = Counter(prompt.split for prompt in REASONING if prompt.category == "sum")
    words = Counter(prompt.split for prompt in REASONING if prompt.category != "sum")
    assert sums["train"] >= 55
    assert sums["evaluate"] >= 20
    assert min(sums.values()) >= 20
    assert min(words.values()) >= 20
    families = {prompt.family for prompt in REASONING if prompt.category != "sum"}
    assert families == set(FORMULAS)


def test_answers_recomputed_from_the_words() -> None:
    for prompt in REASONING:
        found = numbers(prompt.text)
        if prompt.category == "sum":
            assert len(found) == 2
            expected = sum(found)
        else:
            if prompt.family in DIVISIONS:
                assert found[0] % found[1] == 0
            expected = FORMULAS[prompt.family](*found)
        assert prompt.answer == str(expected), prompt.text
        assert expected >= 0


def test_every_equation_of_a_cot_holds_and_it_ends_with_the_answer() -> None:
    operators = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    for prompt in REASONING:
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", prompt.cot)
        assert equations, prompt.cot
        assert len(equations) == prompt.cot.count("=")
        for left, operator, right, result in equations:
            assert operators[operator](int(left), int(right)) == int(result), prompt.cot
        assert numbers(prompt.cot)[-1] == int(prompt.answer)
        assert re.search(rf"\b{prompt.answer}\b", sentences(prompt.cot)[-1]), prompt.cot
        assert 1 <= len(re.split(r"(?<=\.) ", prompt.cot)) <= 4


def test_no_question_wording_crosses_a_split() -> None:
    assert crossing(REASONING, lambda prompt: prompt.family) == []
    names = r"\b(Anna|Ben|Carla|Dmitri|Elif|Femi|Grace|Hugo|Ines|Jamal|Kim|Lena)\b"
    masked = splits_of(REASONING, lambda prompt: re.sub(r"\d+", "#", re.sub(names, "N", prompt.text)))
    assert all(len(splits) == 1 for splits in masked.values())
    solved = splits_of(REASONING, lambda prompt: re.sub(r"\d+", "#", prompt.cot))
    assert all(len(splits) == 1 for splits in solved.values())


def test_no_sum_is_asked_twice() -> None:
    pairs = [tuple(sorted(numbers(prompt.text))) for prompt in REASONING if prompt.category == "sum"]
    assert len(set(pairs)) == len(pairs)


# --- the loader --------------------------------------------------------------------------------------


def test_load_prompts_selects_the_split() -> None:
    assert [p for split in SPLITS for p in load_prompts("harmful", split=split)] == HARMFUL
    assert load_prompts("harmful", language="en", split=None) == HARMFUL


def test_the_returned_list_is_the_callers_own() -> None:
    load_prompts("harmful").clear()
    assert load_prompts("harmful") == HARMFUL


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"kind": "harmfull"}, "'harmful', 'harmless', 'reasoning'"),
        ({"kind": "harmful", "language": "de"}, "'en', 'toy'"),
        ({"kind": "harmful", "split": "test"}, "'train', 'dev', 'select', 'evaluate', None"),
    ],
)
def test_an_unknown_set_names_what_exists(arguments: dict[str, str], wanted: str) -> None:
    with pytest.raises(UnknownPromptSet, match=re.escape(wanted)) as caught:
        load_prompts(**arguments)
    assert repr(list(arguments.values())[-1]) in str(caught.value)


def test_toy_language_is_delegated() -> None:
    prompts = load_prompts("harmful", language="toy", split="select")
    assert prompts
    assert {prompt.language for prompt in prompts} == {"toy"}
    assert {prompt.split for prompt in prompts} == {"select"}


def test_importing_prompts_is_cheap() -> None:
    heavy = "{'torch', 'numpy', 'pandas', 'transformers', 'transformer_lens'}"
    code = f"import sys, rim_lens.prompts; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
