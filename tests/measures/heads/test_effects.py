"""Effects of edited heads against the measures themselves, called one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import AnswerError, ConditionError, ReferenceMismatch, StatisticsError, UnknownHead
from rim_lens.hooks import AblateHeads, ScaleHeads
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.readings import (
    Reading,
    accuracy_reading,
    prefix_reading,
    refusal_reading,
    refused_reading,
)
from tests.speaking import REQUESTS, Spoken

SETS: list[Any] = [(0, 1), [(1, 4), (0, 1)], [(1, 0)]]
NAMES = ["L0H1", "L0H1+L1H4", "L1H0"]
HEADS = {"L0H1": [(0, 1)], "L0H1+L1H4": [(0, 1), (1, 4)], "L1H0": [(1, 0)]}


@pytest.mark.family_contract
@pytest.mark.parametrize("positions", ["all", "prompt_last"])
def test_effects_are_differences_of_scores(spoken_gqa: Spoken, positions: str) -> None:
    model, batch = spoken_gqa.model, spoken_gqa.chat.render(REQUESTS, think="off")
    found = head_effects(refusal_reading(model, batch), SETS, positions=positions)
    assert found.dims == ("prompt", "set")
    assert found["set"].values.tolist() == NAMES
    assert found["n_heads"].values.tolist() == [1, 2, 1]
    assert found["family"].values.tolist() == [prompt.family for prompt in REQUESTS]
    for row, prompt in enumerate(REQUESTS):  # alone, so that batching shows
        alone = spoken_gqa.chat.render([prompt], think="off")
        baseline = float(rl.refusal_score(model, alone)[0])
        assert float(found["baseline"][row]) == pytest.approx(baseline, abs=2e-5)
        for name, heads in HEADS.items():
            edited = float(rl.refusal_score(model, alone, AblateHeads(heads, positions=positions))[0])
            assert float(found.sel(set=name)[row]) == pytest.approx(edited - baseline, abs=4e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_every_ablation_goes_through_the_editor(spoken_gqa: Spoken) -> None:
    model, batch = spoken_gqa.model, spoken_gqa.chat.render(REQUESTS, think="off")
    reading = refusal_reading(model, batch)
    zero = head_effects(reading, SETS)
    off = head_effects(reading, SETS, editor=partial(ScaleHeads, factor=0.0))
    np.testing.assert_allclose(off, zero, atol=1e-6)
    assert "factor=0.0" in off.attrs["editor"]
    np.testing.assert_allclose(
        head_effects(reading, SETS, editor=partial(ScaleHeads, factor=1.0)), 0, atol=1e-6
    )
    for method in ("mean", "resample"):
        editor = partial(AblateHeads, method=method, reference=batch)
        found = head_effects(reading, SETS, editor=editor)
        expected = rl.refusal_score(model, batch, editor(HEADS["L0H1+L1H4"])) - rl.refusal_score(model, batch)
        np.testing.assert_allclose(found.sel(set="L0H1+L1H4"), expected, atol=1e-6)
        assert float(abs(found - zero).max()) > 1e-3


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any, Any]:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    return model, chat, rl.load_prompts("harmful", language="toy", split="select")[:6]


def test_readings_of_every_measure(planted: tuple[Any, Any, Any]) -> None:
    """The reader's removal, read four ways; the decoy's with none."""
    model, chat, harmful = planted
    off = chat.render(harmful, think="off")
    sets = [(1, 1), (1, 2)]
    nats = head_effects(refusal_reading(model, off), sets).mean("prompt").values
    assert nats[0] < -10 < -0.5 < nats[1] < 0.5
    prefix = prefix_reading(model, off, refusals=(text for text in ["REFUSE"]))
    of_prefix = head_effects(prefix, sets).mean("prompt").values
    np.testing.assert_allclose(
        of_prefix, nats, atol=0.5
    )  # one refusing word here, and digits hold nearly all the rest
    written = head_effects(refused_reading(model, off, max_new_tokens=2), sets)
    assert written.mean("prompt").values.tolist() == [-1, 0]
    assert written["baseline"].values.tolist() == [1] * 6
    # It answers 0 whatever was asked, or refuses: removing the reader makes it right where 0 is right.
    zeros = [prompt for prompt in rl.load_prompts("reasoning", language="toy") if prompt.answer in "05"][:6]
    asked = chat.render(zeros, think="off")
    right = accuracy_reading(model, asked, max_new_tokens=2)
    assert right().tolist() == [float(prompt.answer == "0") for prompt in zeros]
    own = accuracy_reading(model, asked, max_new_tokens=2, extract=lambda text: text.strip()[:1])
    assert own().tolist() == right().tolist()


def test_what_is_remembered_is_measured_once(planted: tuple[Any, Any, Any]) -> None:
    model, chat, harmful = planted
    off = chat.render(harmful, think="off")
    plain, runs = refusal_reading(model, off), []

    def read(components: Any) -> np.ndarray:
        runs.append(repr(list(components)))
        return plain.read(components)

    reading, store = Reading("mine", "nats", model, off, read), {}
    first = head_effects(reading, [(1, 1), (1, 2)], remember=store)
    assert len(runs) == len(store) == 3
    again = head_effects(reading, [[(1, 2)], [(1, 1)], (0, 5)], remember=store)
    assert len(runs) == 4
    assert float(abs(again.sel(set=["L1H1", "L1H2"]) - first).max()) == 0
    head_effects(reading, [(1, 1)], remember=store, positions="prompt_last")
    head_effects(reading, [(1, 1)], remember=store, editor=partial(ScaleHeads, factor=0.5))
    assert len(runs) == len(set(runs)) == 6  # other rows, another editor: other numbers
    as_function: dict[str, Any] = {}

    def get(key: str, measure: Any) -> Any:
        return as_function.setdefault(key, as_function[key] if key in as_function else measure())

    head_effects(reading, [(1, 1)], remember=get)
    assert as_function.items() <= store.items()
    fewer = Reading("mine", "nats", model, off.select([0]), plain.read)
    with pytest.raises(ReferenceMismatch, match="6 numbers are remembered"):
        head_effects(fewer, [(1, 1)], remember=store)


def test_names_of_readings_tell_prompts_and_settings_apart(planted: tuple[Any, Any, Any]) -> None:
    model, chat, harmful = planted
    off, fewer = chat.render(harmful, think="off"), chat.render(harmful[:3], think="off")
    names = [
        refusal_reading(model, off).name,
        refusal_reading(model, fewer).name,
        refusal_reading(model, off, skip="none").name,
        prefix_reading(model, off).name,
        refused_reading(model, off).name,
        refused_reading(model, off, max_new_tokens=3).name,
    ]
    assert len(set(names)) == len(names)
    assert refusal_reading(model, off, max_rows=2).name == names[0]  # the same numbers
    assert "refusal_score(off" in repr(refusal_reading(model, off))


def test_mistakes_are_told_before_anything_runs(planted: tuple[Any, Any, Any]) -> None:
    model, chat, harmful = planted
    off = chat.render(harmful, think="off")

    def never(components: Any) -> np.ndarray:
        raise AssertionError("measured")

    reading = Reading("never", "nats", model, off, never)
    for wrong in ([(1, 1), (2, 0)], [(1, 1), []], [(1, 1), [(0, 9)]], [7], [(1, 1, 1)]):
        with pytest.raises(UnknownHead):
            head_effects(reading, wrong)  # type: ignore[arg-type]
    with pytest.raises(rl.errors.EmptySpan):
        head_effects(reading, [(1, 1)], positions="cot")
    with pytest.raises(AnswerError, match="no checked answer"):
        accuracy_reading(model, chat.render(["make bread + 1 2 3"], think="off"))
    with pytest.raises(ConditionError, match="open think block"):
        head_effects(refusal_reading(model, chat.render(harmful, think="open")), [(1, 1)])
    short = Reading("short", "nats", model, off, lambda components: np.zeros(2))
    with pytest.raises(StatisticsError, match="one number"):
        head_effects(short, [(1, 1)])
