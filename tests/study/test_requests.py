"""Which requests a study selects on and tests on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from rim_lens.errors import MissingTwin, NotEnoughData
from rim_lens.prompts import load_prompts
from rim_lens.study.requests import requests_by_split


@pytest.mark.parametrize("language", ["en", "toy"])
def test_sides_share_no_family_and_every_request_has_its_twin(language):
    sides = requests_by_split(language, None, None, None, None)
    families = {name: set(side.families) for name, side in sides.items()}
    assert not families["select"] & families["evaluate"]
    for side in sides.values():
        assert [twin.id for twin in side.twins] == [request.twin for request in side.harmful]
        assert [twin.twin for twin in side.twins] == [request.id for request in side.harmful]
        assert {request.kind for request in side.reasoning} == {"reasoning"}


def test_plain_strings_are_paired_in_order_and_halved():
    bad = [f"How do I take thing {i}?" for i in range(8)]
    good = [f"How do I buy thing {i}?" for i in range(8)]
    sides = requests_by_split("en", bad, good, ["What is 1 + 1?"], None)
    texts = [request.text for side in sides.values() for request in side.harmful]
    assert sorted(texts) == bad
    for side in sides.values():
        for request, twin in zip(side.harmful, side.twins, strict=True):
            assert request.text.split()[-1] == twin.text.split()[-1]


def test_a_missing_twin_is_named():
    with pytest.raises(MissingTwin, match="3 harmful and 2 harmless"):
        requests_by_split("en", ["a", "b", "c"], ["d", "e"], None, None)
    bad = [replace(request, twin="nowhere") for request in load_prompts("harmful")]
    with pytest.raises(MissingTwin, match="'nowhere'"):
        requests_by_split("en", bad, load_prompts("harmless"), None, None)


def test_one_family_is_not_enough():
    bad = [replace(request, family="one") for request in load_prompts("harmful") if request.split == "select"]
    good = [
        replace(request, family="one") for request in load_prompts("harmless") if request.split == "select"
    ]
    with pytest.raises(NotEnoughData, match="at least two families"):
        requests_by_split("en", bad, good, None, None)


def test_a_limit_thins_evenly_over_the_list():
    whole = requests_by_split("en", None, None, None, None)["evaluate"].harmful
    thin = requests_by_split("en", None, None, None, 10)["evaluate"].harmful
    assert len(thin) == 10
    places = [whole.index(request) for request in thin]
    assert places == sorted(places)
    assert max(b - a for a, b in pairwise(places)) <= len(whole) // 10 + 1


def test_a_family_on_both_sides_is_refused():
    bad = load_prompts("harmful")
    halves = [replace(request, family=f"{i % 2}") for i, request in enumerate(bad)]
    with pytest.raises(ValueError, match="tested on what chose it"):
        requests_by_split("en", halves, load_prompts("harmless"), None, None)
