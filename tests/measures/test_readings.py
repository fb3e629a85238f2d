"""Names by which numbers are remembered: shared only where the same is read."""

from __future__ import annotations

from functools import partial

import pytest

import rim_lens as rl
from rim_lens.errors import ImpossibleEdit, StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.measures.edits import measured
from rim_lens.measures.forced import divergence_reading
from rim_lens.measures.readings import accuracy_reading, function_name


def reader(place: int):
    return lambda text: text[place]


def test_functions_that_read_otherwise_have_other_names():
    functions = [
        lambda text: text[0],
        lambda text: text[1],
        lambda text: text[-1],
        lambda text, place=0: text[place],
        lambda text, place=1: text[place],
        reader(0),
        reader(1),
        partial(reader(0)),
        partial(reader(0)),
        str.lower,
    ]
    assert len({function_name(one) for one in functions}) == len(functions)
    assert function_name(reader(3)) == function_name(reader(3))


def test_answers_read_by_one_function_are_not_taken_for_another_s(tmp_path):
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    batch = chat.render(rl.load_prompts("reasoning", language="toy")[:4], think="off")
    remember = ResultFolder(tmp_path).lines("readings.jsonl").get
    values = [
        measured(accuracy_reading(model, batch, chat, 2, extract=extract), [], remember)
        for extract in (lambda _: 1, lambda _: object())
    ]
    assert values[0].all()
    assert not values[1].any()


def test_an_edit_of_generated_rows_moves_no_given_text_and_is_refused():
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    reading = divergence_reading(model, chat.render(["ban bread please + 3 4 6"]))
    with pytest.raises((ImpossibleEdit, StatisticsError, ValueError), match="generated"):
        reading([rl.AblateHeads([(0, 1)], positions="generated")])
