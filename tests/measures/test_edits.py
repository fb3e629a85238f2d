"""Readings of edits, remembered under keys that tell edits apart."""

from __future__ import annotations

import pytest

import rim_lens as rl
from rim_lens.errors import ReferenceMismatch
from rim_lens.measures.edits import measured, set_effects
from rim_lens.measures.readings import refusal_reading
from tests.measures.refusal.test_direction import toy


def test_large_sets_are_remembered_apart_under_short_keys() -> None:
    """Sets of 300 neurons that differ in the last one, which a key cut short would not hold."""
    model, chat = toy("toy")
    reading = refusal_reading(model, chat.render(["ban bread please + 3 4 6", "make soup please + 1 1 1"]))
    sets = [[(layer, neuron) for layer in (0, 1) for neuron in range(150)] for _ in range(2)]
    sets[1][-1] = (1, 255)
    store: dict[str, list[float]] = {}
    editors = {str(place): rl.AblateNeurons(members) for place, members in enumerate(sets)}
    baseline, effects = set_effects(reading, editors, store)
    assert len(store) == 3
    assert max(map(len, store)) < 2100
    for place, editor in enumerate(editors.values()):
        assert effects[:, place] == pytest.approx(reading([editor]) - reading(), abs=1e-5)
    again = set_effects(reading, {"0": rl.AblateNeurons(sets[0])}, store)  # another object, the same edit
    assert len(store) == 3
    assert (again[0] == baseline).all()
    assert (again[1][:, 0] == effects[:, 0]).all()


def test_numbers_of_other_prompts_are_refused() -> None:
    model, chat = toy("toy")
    reading = refusal_reading(model, chat.render(["ban bread please + 3 4 6"]))
    with pytest.raises(ReferenceMismatch, match="2 numbers are remembered"):
        measured(reading, [], {f"{reading.name}: baseline": [0.0, 1.0]})
