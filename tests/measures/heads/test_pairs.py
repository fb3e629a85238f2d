"""Pairs of heads: on a model whose reader is there twice, and on numbers that add up or do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import NotEnoughData, UnknownHead
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.heads.finding import find_heads, scorer
from rim_lens.measures.heads.pairs import PAIR_COLUMNS, pair_effects, pair_interactions, redundant_pairs
from rim_lens.measures.readings import Reading, refusal_reading
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from tests.families import FAMILIES
from tests.measures.heads.redundant import COPY, with_two_readers

Head = tuple[int, int]


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any]:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    harmful = rl.load_prompts("harmful", language="toy", split="select")[::5]
    return model, chat.render(harmful, think="off")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_of_which_either_does_the_work(family: str, planted: tuple[Any, Any]) -> None:
    batch = planted[1]
    model = with_two_readers(family)
    reading, store = refusal_reading(model, batch), {}
    assert (reading() > 5).all()
    single = head_effects(reading, [READER, COPY], remember=store)
    assert float(abs(single).max()) < 0.5
    late = [(1, head) for head in range(8)]
    assert find_heads(scorer(model, batch), late) == []  # what it says that it cannot see
    before = len(store)
    found = redundant_pairs(reading, late, remember=store)
    assert found["pair"].tolist() == ["L1H1+L1H4"]
    row = found.iloc[0]
    assert row["effect"] < -10
    assert row["p"] <= 0.05
    assert row["low"] <= row["interaction"] <= row["high"] < -10
    assert found.attrs["n_pairs"] == 28
    assert len(store) == found.attrs["n_readings"] == 37
    assert before == 3  # two of the heads and the baseline were there already
    # An exact check of the whole pair: without both, refusal is gone.
    assert (reading([rl.AblateHeads([READER, COPY])]) < 0).all()


def test_heads_of_one_path_overlap_and_a_decoy_adds_nothing(planted: tuple[Any, Any]) -> None:
    model, batch = planted
    table = pair_interactions(refusal_reading(model, batch), [READER, TOPIC_HEAD, DECOY_HEAD])
    assert tuple(table.columns) == PAIR_COLUMNS
    assert table["pair"][0] == "L0H5+L1H1"
    assert table["kind"][0] == "overlapping"
    assert table["interaction"][0] > 10
    assert float(table["interaction"][1:].abs().max()) < 0.5
    assert redundant_pairs(refusal_reading(model, batch), [READER, TOPIC_HEAD, DECOY_HEAD]).empty


def numbers(
    planted: tuple[Any, Any], fall: Callable[[frozenset[Head]], float], noise: float = 0.3
) -> tuple[Reading, list[frozenset[Head]]]:
    """A reading of made-up numbers; remembers which sets were asked for."""
    model, batch = planted
    asked: list[frozenset[Head]] = []

    def read(components: Sequence[Any]) -> np.ndarray:
        removed = frozenset(head for component in components for head in component.heads)
        asked.append(removed)
        rng = np.random.default_rng([len(removed), *(8 * layer + head for layer, head in sorted(removed))])
        return 4 - fall(removed) + noise * rng.standard_normal(len(batch)) * bool(removed)

    return Reading("numbers", "nats", model, batch, read), asked


def test_interactions_by_hand(planted: tuple[Any, Any]) -> None:
    heads: list[Head] = [(1, 3), (0, 2), (0, 7)]
    single = {(0, 2): 1.0, (0, 7): 2.0, (1, 3): 0.0}
    extra = {frozenset([(0, 2), (1, 3)]): 3.0, frozenset([(0, 2), (0, 7)]): -1.0}

    def fall(removed: frozenset[Head]) -> float:
        return sum(single[head] for head in removed) + sum(v for pair, v in extra.items() if pair <= removed)

    reading, asked = numbers(planted, fall, noise=0.05)
    found = pair_effects(reading, heads)
    assert found["pair"].values.tolist() == ["L0H2+L0H7", "L0H2+L1H3", "L0H7+L1H3"]
    assert len(asked) == len(set(asked)) == 3 + 3 + 1
    raw = {removed: reading.read([rl.AblateHeads(removed)] if removed else []) for removed in set(asked)}
    none, one, other = raw[frozenset()], raw[frozenset([(0, 2)])], raw[frozenset([(1, 3)])]
    both = raw[frozenset([(0, 2), (1, 3)])]
    np.testing.assert_allclose(
        found["interaction"].sel(pair="L0H2+L1H3"), both - one - other + none, atol=1e-12
    )
    table = pair_interactions(reading, heads)
    assert table["pair"].tolist() == ["L0H2+L1H3", "L0H2+L0H7", "L0H7+L1H3"]
    np.testing.assert_allclose(table["interaction"], [-3, 1, 0], atol=0.1)
    assert table["kind"].tolist() == ["redundant", "overlapping", "additive"]
    np.testing.assert_allclose(table["effect_first"], [-1, -1, -2], atol=0.1)
    np.testing.assert_allclose(table["effect_second"], [0, -2, 0], atol=0.1)


def test_where_heads_add_up_no_pair_is_called_anything_more_often_than_one_time_in_twenty(
    planted: tuple[Any, Any],
) -> None:
    """Single effects of every size, noise per run: interactions are noise."""
    model, batch = planted
    rng, runs, hits = np.random.default_rng(3), 150, 0
    for _ in range(runs):
        table: dict[frozenset[Head], np.ndarray] = {}

        def read(components: Sequence[Any], table: dict[frozenset[Head], np.ndarray] = table) -> np.ndarray:
            removed = frozenset(head for component in components for head in component.heads)
            return table.setdefault(
                removed, -sum(head for _, head in removed) + rng.standard_t(3, size=len(batch))
            )

        found = pair_interactions(Reading("n", "nats", model, batch, read), [(0, 1), (0, 2), (1, 3)])
        hits += bool((found["kind"] != "additive").any())
    assert hits / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_mistakes_are_told_before_anything_is_measured(planted: tuple[Any, Any]) -> None:
    reading, asked = numbers(planted, lambda removed: 0.0)
    every = [(layer, head) for layer in range(2) for head in range(8)]
    with pytest.raises(
        ValueError, match="16 candidates make 120 pairs and 137 readings, and max_readings=136"
    ):
        redundant_pairs(reading, every, max_readings=136)
    with pytest.raises(UnknownHead):
        redundant_pairs(reading, [(0, 0), (2, 0)])
    with pytest.raises(NotEnoughData, match="at least two heads"):
        pair_interactions(reading, [(0, 0), (0, 0)])
    one_family = Reading("one", "nats", reading.model, reading.batch.select([0]), reading.read)
    with pytest.raises(NotEnoughData, match="one family"):
        pair_interactions(one_family, [(0, 0), (0, 1)])
    few = Reading("few", "nats", reading.model, reading.batch.select([0, 2, 4, 6, 8]), reading.read)
    with pytest.raises(NotEnoughData, match="5 families"):
        redundant_pairs(few, [(0, 0), (0, 1)])
    assert not asked


def test_too_few_families_decide_nothing(planted: tuple[Any, Any]) -> None:
    model, batch = planted
    few = refusal_reading(model, batch.select([0, 3, 6, 9]))
    assert pair_interactions(few, [READER, TOPIC_HEAD])["kind"].tolist() == ["undecided"]
