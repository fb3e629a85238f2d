"""docs/sizing.md: shapes that give the published numbers of parameters, counts that torch confirms, the page as it was measured."""

from __future__ import annotations

import json

import pytest

from tests.costs import Asked, generation, packed_scan, plain_scan, reading
from tests.sizing import EVIDENCE, LARGE, PAGE, page
from tests.small_models import hf_of, shape

PUBLISHED = {"Qwen3-4B": 4.02, "Qwen3-8B": 8.19, "Qwen3-32B": 32.8, "Qwen3-30B-A3B": 30.5}


def test_shapes_have_the_published_number_of_parameters():
    assert {one.name for one in LARGE} == set(PUBLISHED)
    for one in LARGE:
        assert one.parameters / 1e9 == pytest.approx(PUBLISHED[one.name], rel=0.005), one.name


def test_parameters_are_those_of_the_model():
    small = shape(2, 4, 8)
    assert small.parameters == sum(parameter.numel() for parameter in hf_of(small).parameters())


def test_the_active_part_of_experts_is_counted():
    one = LARGE[-1]
    active = one.n_layers * one.per_row + 2 * one.word
    assert active / 1e9 == pytest.approx(3.3, rel=0.03)  # "30.5B in total and 3.3B activated"


def test_counts_grow_as_the_work_does():
    small, asked = shape(4, 4), Asked(8, 32, 8)
    assert plain_scan(small, asked, 3) == 4 * reading(small, asked)
    assert generation(small, asked, 1) == reading(small, asked)
    layers = [layer for layer in range(4) for _ in range(4)]
    assert packed_scan(small, asked, layers, last_row=True) < packed_scan(small, asked, layers)
    assert packed_scan(small, asked, layers) < plain_scan(small, asked, len(layers))


def test_the_page_is_what_was_measured():
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert page(found) == PAGE.read_text(encoding="utf-8")
    for one in found["checked"]:
        assert one["by_hand"] / one["by_torch"] == pytest.approx(1, abs=0.01), one
