from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from rim_lens.study import StudyResult
from rim_lens.views import print_study

Make = Callable[..., StudyResult]


def printed(result: StudyResult, width: int = 140) -> str:
    file = io.StringIO()
    print_study(result, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def test_the_summary_holds_gate_outcomes_heads_and_the_verdict(planted: Make) -> None:
    text = printed(planted())
    for wanted in ("asked for", "unrelated", "L1H2", "found set", "[shown] Gate", "What confirm writes"):
        assert wanted in text


def test_neurons_of_a_study_stand_as_in_a_study_of_neurons(toy_study: StudyResult) -> None:
    found = toy_study.neurons.neurons
    text = printed(toy_study)
    for layer, neuron in found.neurons[:3]:
        assert f"L{layer}N{neuron}" in text
    assert "chosen neurons" in text


def test_a_gate_stop_prints_the_reason_and_no_other_table(planted: Make) -> None:
    text = printed(planted(gate_refused=1))
    assert "Stopped" in text
    assert "Neurons" not in text


def test_brackets_in_names_are_no_markup(planted: Make) -> None:
    text = printed(planted(model="[red]model[/red] [bold", tuned=["[link=x]"]))
    assert "[red]model[/red] [bold" in text
    assert "[link=x]" in text


def test_a_narrow_terminal_breaks_lines_between_words(planted: Make) -> None:
    text = printed(planted(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("harmful", "condition", "unrelated", "refuse"):
        assert f" {word} " in text
