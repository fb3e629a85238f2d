"""One opener given as a string is one opener, wherever openers are taken."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.errors import NotEnoughData
from tests.measures.refusal.test_direction import toy

# "REFUSE" as a list of letters has no token in the toy's vocabulary, "please" as such says another thing than "please".
BARE: dict[str, Any] = {"conditions": ["off"], "n_random_sets": 1, "n_written": 0, "max_new_tokens": 1}


def requests(split: str | None = "evaluate", step: int = 9) -> list[list[rl.Prompt]]:
    return [
        rl.load_prompts(kind, language="toy", split=split)[::step]
        for kind in ("harmful", "harmless")  # type: ignore[arg-type]
    ]


def by_heads(openers: Any) -> Any:
    found = rl.removal_effects(*toy("planted"), [(1, 1)], *requests(), openers=openers, **BARE)
    return found.settings["openers"], found.row("score", "harmful", "off")["before"]


def by_restoring(openers: Any) -> Any:
    few = {"n_random_sets": 1, "n_written": 0, "max_new_tokens": 1, "edits": ["block"]}
    table = rl.restoring(*toy("planted"), [(1, 1)], *requests(), openers=openers, **few)  # type: ignore[arg-type]
    return table.attrs["openers"], table["off"].tolist()


def by_neurons(openers: Any) -> Any:
    few = {"n_random_sets": 1, "written": False}
    found = rl.neuron_effects(*toy("planted"), [(0, 1)], *requests(step=3), openers=openers, **few)  # type: ignore[arg-type]
    return found.settings["openers"], found.row("score", "harmful", "off")["before"]


def by_dose(openers: Any) -> Any:
    few = {"sizes": [1], "n_random_sets": 1}
    found = rl.dose_curve(*toy("planted"), [(0, 1)], *requests(step=3), openers=openers, **few)  # type: ignore[arg-type]
    return found.attrs["openers"], found["before"].tolist()


def by_direction(openers: Any) -> Any:
    few: dict[str, Any] = {"max_kl": 1e9, "gate": False, "max_candidates": 1, "n_random": 1}
    found = rl.refusal_direction(*toy("planted"), *requests(None, 1), limit=6, openers=openers, **few)
    return found.settings["openers"], found.table["effect"].dropna().tolist()


@pytest.mark.parametrize("by", [by_heads, by_restoring, by_neurons, by_dose, by_direction])
def test_a_string_is_one_opener_and_no_letters(by: Callable[[Any], Any]) -> None:
    one, listed, run_dry = by("REFUSE"), by(["REFUSE"]), by(iter(["REFUSE"]))
    for (named, numbers), (others, theirs) in pairwise((one, listed, run_dry)):
        assert named == others == ["REFUSE"]
        assert numbers == theirs
    with pytest.raises(NotEnoughData, match="has a token"):
        by(tuple("REFUSE"))
