"""What `refusal_heads` does with requests, conditions and candidates that it was given in an unusual way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import GateNotPassed, MissingTwin, NotEnoughData, StudyFolderError, UnknownHead
from rim_lens.measures.heads import refusing
from rim_lens.measures.two_sides import paired, two_sides
from rim_lens.views import heads_html
from rim_lens.views.head_words import head_findings

HARMFUL = rl.load_prompts("harmful", language="toy")
HARMLESS = rl.load_prompts("harmless", language="toy")
SHUFFLED = [HARMLESS[place] for place in np.random.default_rng(0).permutation(len(HARMLESS))]
SEARCH = rl.HeadSearch(limit=10, n_random_sets=2)
BARE = {"contrasts": [], "conditions": ["off"], "search": SEARCH}


@pytest.fixture(scope="module")
def planted() -> tuple[rl.Model, rl.ChatFormat]:
    model = rl.load_model("planted")
    return model, rl.ChatFormat.from_model(model)


def pairs(harmful: list, harmless: list, limit: int | None) -> list[tuple[rl.Prompt, rl.Prompt]]:
    sides = [paired(side) for side in two_sides(harmful, harmless, limit)]
    assert sum(len(side.harmful) for side in sides) > 0
    return [pair for side in sides for pair in zip(*side, strict=True)]


@pytest.mark.parametrize("limit", [10, None])
def test_twins_are_found_in_any_order_and_under_any_limit(limit: int | None) -> None:
    for harmful in (HARMFUL, HARMFUL[::2]):
        assert all(one.twin == other.id for one, other in pairs(harmful, SHUFFLED, limit))
    in_order = pairs(HARMFUL, HARMLESS, limit)
    assert [one.id for one, _ in in_order] == [one.id for one, _ in pairs(HARMFUL, SHUFFLED, limit)]


def test_twins_that_only_the_harmless_requests_name_are_no_less_twins() -> None:
    alone = [replace(prompt, twin=None) for prompt in HARMFUL]
    assert all(other.twin == one.id for one, other in pairs(alone, SHUFFLED, None))


def test_requests_of_which_nobody_says_who_is_whose_twin_are_not_paired_by_place() -> None:
    words = [[f"word {number}" for number in range(count)] for count in (20, 40)]
    with pytest.raises(MissingTwin):  # as many of each within the limit, but not the same ones
        pairs(*words, 5)
    assert all(one.family == other.family for one, other in pairs(words[0], words[1][:20], 5))
    bare = [[replace(prompt, twin=None, family="") for prompt in prompts] for prompts in (HARMFUL, HARMLESS)]
    with pytest.raises(MissingTwin):
        pairs(*bare, None)


def test_a_twin_is_of_one_request() -> None:
    shared = [replace(prompt, twin=HARMFUL[0].twin) if prompt == HARMFUL[1] else prompt for prompt in HARMFUL]
    with pytest.raises(MissingTwin, match="a twin of its own"):
        pairs(shared, HARMLESS, None)


@pytest.mark.parametrize(("n_families", "enough"), [(5, False), (6, True)])
def test_too_few_families_for_any_verdict_are_refused_before_any_pass(
    planted: tuple[rl.Model, rl.ChatFormat], n_families: int, enough: bool
) -> None:
    # Conjunctions of one verb are one family here, as their twins swap the same words.
    verbs = list(dict.fromkeys(prompt.family.split()[0] for prompt in HARMFUL if prompt.split == "evaluate"))
    asked = [p for p in HARMFUL if p.split == "select" or p.family.split()[0] in verbs[:n_families]]
    if not enough:
        with pytest.raises(NotEnoughData, match="5 families"):
            rl.refusal_heads(*planted, asked, HARMLESS, **BARE)
        return
    settings = BARE | {"search": rl.HeadSearch(limit=None, n_random_sets=2)}
    assert (1, 1) in rl.refusal_heads(*planted, asked, HARMLESS, **settings).top()


def test_a_text_of_ones_own_can_be_read_in(planted: tuple[rl.Model, rl.ChatFormat]) -> None:
    found = rl.refusal_heads(
        *planted,
        HARMFUL,
        HARMLESS,
        **(BARE | {"conditions": {"mine": "3 4 > 0"}, "gate": False}),
        read_in="mine",
    )
    assert found.settings["conditions"] == ["mine"]


def test_openers_in_any_form_are_the_same_openers(planted: tuple[rl.Model, rl.ChatFormat]) -> None:
    results = [
        rl.refusal_heads(*planted, HARMFUL, HARMLESS, **BARE, openers=openers)
        for openers in ("REFUSE", iter(["REFUSE"]), ["REFUSE"])
    ]
    for found in results:
        assert found.settings["openers"] == ["REFUSE"]
        assert found.table.equals(results[-1].table)


def test_a_folder_belongs_to_these_candidates_and_these_twins(
    planted: tuple[rl.Model, rl.ChatFormat], tmp_path: Path
) -> None:
    arguments = BARE | {"folder": tmp_path, "candidates": [(0, 5), (1, 1)]}
    rl.refusal_heads(*planted, HARMFUL, HARMLESS, **arguments)
    with pytest.raises(StudyFolderError, match="candidates"):
        rl.refusal_heads(*planted, HARMFUL, HARMLESS, **(arguments | {"candidates": [(0, 5), (1, 2)]}))
    others = [replace(prompt, text=prompt.text.replace("+", "-")) for prompt in HARMLESS]
    with pytest.raises(StudyFolderError, match="twins_digests"):
        rl.refusal_heads(*planted, HARMFUL, others, **arguments)


def test_no_candidate_is_refused(planted: tuple[rl.Model, rl.ChatFormat]) -> None:
    with pytest.raises(UnknownHead, match="candidates"):
        rl.refusal_heads(*planted, HARMFUL, HARMLESS, **BARE, candidates=[])


def test_the_gate_names_the_condition_it_looked_at(planted: tuple[rl.Model, rl.ChatFormat]) -> None:
    with pytest.raises(GateNotPassed, match="in 'careful'"):
        rl.refusal_heads(
            *planted, HARMLESS, HARMFUL, **(BARE | {"conditions": ["careful"]}), read_in="careful"
        )


def test_a_set_of_whole_layers_has_nothing_to_be_held_against(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rl.load_model("planted")
    layer = [(1, head) for head in range(8)]
    monkeypatch.setattr(refusing, "find_heads", lambda *_, **__: layer)
    requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    found = rl.refusal_heads(
        model, rl.ChatFormat.from_model(model), *requests, conditions=("off",), search=rl.HeadSearch(limit=20)
    )
    assert found.set["effect"]["high"] < -5
    assert (found.set["n_controls"], found.set["percentile"], found.set["control_p"]) == (0, None, None)
    assert "no other set does" in heads_html(found)
    said = head_findings(found, {"n_select": 20, "settings": {"n_random_sets": 100}})[0]
    assert said.status == "cannot tell"
    assert "no other has as many" in said.text
