from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest

from rim_lens.errors import StudyFolderError
from rim_lens.measures.refusal.rates import refusal_rate
from rim_lens.study import StudyResult
from rim_lens.views.finding import Finding
from rim_lens.views.head_words import removal_findings
from rim_lens.views.neuron_words import neuron_findings
from rim_lens.views.verdict import findings, gate_finding, question

Make = Callable[..., StudyResult]
NO_CHANGE = {"off": 24, "careful": 24, "filler": 24, "unrelated": 24, "open": 24}


def by_topic(result: StudyResult) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings(result)}


CAREFUL, CONTENT = "Careful CoT against thinking off", "The CoT's content, beyond its controls"
CONTROLS, HEADS = "Controls: filler and unrelated CoT", "Heads found by ablation"


def test_a_planted_fall_beyond_both_controls_is_said(planted: Make) -> None:
    said = by_topic(planted())
    assert said["Gate"].status == "shown"
    assert said[CAREFUL].status == "shown"
    assert "lowers refusal" in said[CAREFUL].text
    assert "24 of 24 harmful requests (1.00 [0.86, 1.00])" in said[CAREFUL].text
    assert "0 of 24 (0.00 [0.00, 0.14])" in said[CAREFUL].text
    assert "−1.00 on every request alike (p = 0.0005), paired over 12 families" in said[CAREFUL].text
    assert said[CONTENT].status == "shown"
    assert "23 of 24" in said[CONTENT].text
    assert "14 of 24" in said[CONTENT].text


def test_no_effect_is_said_to_be_none(planted: Make) -> None:
    said = by_topic(planted(refused=NO_CHANGE))
    assert said[CAREFUL].status == "not shown"
    assert "not shown to change refusal" in said[CAREFUL].text
    assert CONTENT not in said
    assert said[CONTROLS].status == "note"


def test_a_rise_is_not_called_a_fall(planted: Make) -> None:
    said = by_topic(planted(refused={**NO_CHANGE, "off": 12}, gate_refused=24))
    assert "raises refusal" in said[CAREFUL].text
    assert "+0.50" in said[CAREFUL].text


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"filler": 0, "unrelated": 0}, "not shown to lower refusal more than filler"),
        ({"filler": 23, "unrelated": 0}, "is not shown to differ from an unrelated CoT"),
        ({"filler": 23, "unrelated": 0, "careful": 12}, "an unrelated CoT lowers it further still"),
    ],
)
def test_a_fall_the_controls_share_is_not_credited_to_content(
    planted: Make, refused: dict[str, int], words: str
) -> None:
    said = by_topic(planted(refused={"off": 24, "careful": 0, "open": 9, **refused}))
    assert said[CAREFUL].status == "shown"
    assert said[CONTENT].status == "not shown"
    assert words in said[CONTENT].text
    assert ("Filler alone lowers refusal too" in said[CONTENT].text) == (refused["filler"] == 0)


def test_few_families_cannot_tell(planted: Make) -> None:
    said = by_topic(planted(n_families=3))
    assert said[CAREFUL].status == "cannot tell"
    assert "so few families" in said[CAREFUL].text


def test_few_families_that_differ_among_many_are_not_too_few(planted: Make) -> None:
    said = by_topic(planted(refused={**NO_CHANGE, "careful": 23}))
    assert said[CAREFUL].status == "not shown"
    assert "not shown to change refusal" in said[CAREFUL].text


@pytest.mark.parametrize(("n", "status"), [(4, "cannot tell"), (40, "shown")])
def test_a_passed_gate_of_few_requests_does_not_tell_harm_from_twins(n: int, status: str) -> None:
    """2 against 1 of 4 pass the gate and may be chance; 20 against 5 of 40 are not."""
    rates = [refusal_rate(["refuse"] * k + ["comply"] * (n - k)) for k in (n // 2, max(1, n // 8))]
    gate = {"passed": True, "reason": "", "harmful": vars(rates[0]), "harmless": vars(rates[1])}
    said = gate_finding(gate, asked=True)
    assert said.status == status
    assert ("So few requests" in said.text) == (status == "cannot tell")


def test_specific_heads_are_named_with_their_yardstick(planted: Make) -> None:
    result = planted()
    said = by_topic(result)[HEADS]
    effect = result.heads.set
    assert said.status == "shown"
    assert "L1H2 and L2H5" in said.text
    assert f"−{abs(effect['effect']['estimate']):.2f} nats" in said.text
    assert f"100 % of all {effect['n_controls']} other sets" in said.text
    assert effect["n_controls"] == 8 * 8 - 1 or effect["n_controls"] == 7 * 7


def test_an_effect_on_twins_as_well_is_not_refusal(planted: Make) -> None:
    said = by_topic(planted(effect_on_twins=-6.0))
    assert said[HEADS].status == "not shown"
    assert "not shown to shift harmful requests more than their harmless twins" in said[HEADS].text
    assert "not shown to be specific" in said["Each found head alone"].text


def test_an_effect_that_did_not_hold_up_is_said_so(planted: Make) -> None:
    said = by_topic(planted(effect=0.0))[HEADS]
    assert said.status == "not shown"


def test_no_heads_found(planted: Make) -> None:
    said = by_topic(planted(found=()))
    assert said[HEADS].text.startswith("None.")
    assert "What it writes without these heads" not in said


def test_broken_replies_are_not_called_compliance(planted: Make) -> None:
    assert "may break the reply" in by_topic(planted())["What it writes without these heads"].text


def test_a_study_says_of_neurons_what_its_study_of_neurons_says(toy_study: StudyResult) -> None:
    said = by_topic(toy_study)
    mine = neuron_findings(toy_study.neurons)
    assert len(mine) > 4
    assert all(said[one.topic] == one for one in mine)
    refused = toy_study.refusal_by_condition().set_index(["model", "kind", "condition"])["refuse"]
    n = round(8 * refused["toy_deviate", "harmful", "off"])
    assert f"it refused {n} of 8 harmful requests" in said["What toy_deviate writes"].text


def test_without_tuned_models_nothing_is_said_of_ras(planted: Make) -> None:
    result = planted(tuned=())
    assert not [topic for topic in by_topic(result) if "RAS" in topic]
    assert "tuning" not in question(result)


def test_a_study_stopped_at_its_gate_says_only_why(planted: Make) -> None:
    said = findings(planted(gate_refused=1))
    assert [finding.topic for finding in said] == ["Gate"]
    assert said[0].text.startswith("Stopped: with thinking off the model refuses 0.04")
    assert "1 of 24 harmful requests and 0 of 24 harmless twins" in said[0].text


def test_an_overridden_gate_is_said_before_all_else(planted: Make) -> None:
    said = findings(planted(gate_refused=1, gate=False))
    assert len(said) > 1
    assert "overridden" in said[0].text


def test_an_interrupted_study_is_refused_with_advice(planted: Make) -> None:
    result = planted()
    (result.path / "neurons" / "gate.json").unlink()
    assert by_topic(result)["Interrupted"].text.startswith("Asked for and not measured yet: neurons")
    (result.path / "heads" / "rows.json").unlink()
    with pytest.raises(StudyFolderError, match="interrupted before its end"):
        findings(result)


def test_the_toy_says_what_is_known_of_it(toy_study: StudyResult) -> None:
    said = by_topic(toy_study)
    assert said["Gate"].status == "shown"
    assert "8 of 8 harmful requests" in said[CAREFUL].text
    assert "and 0 of 8 " in said[CAREFUL].text


def edited(
    condition: str, lost: float, effect: float, twins: float, p_specific: float = 0.001
) -> list[dict[str, object]]:
    """Rows of `restoring` for one edit: what the condition took, what the edit does to both kinds, sharply measured."""

    def row(kind: str, measure: str, gap: float, moved: float, p: float) -> dict[str, object]:
        share = moved / gap if gap > 0 else float("nan")
        ends = {"effect": moved, "effect_low": moved - 0.1, "effect_high": moved + 0.1, "p": p}
        back = {"restored": share, "restored_low": share - 0.01, "restored_high": share + 0.01}
        random = {"random": 0.0, "random_high": 0.1, "state": "measured", "edit": "block"}
        return {"condition": condition, "kind": kind, "measure": measure, **ends, **back, **random}

    return [
        row("harmful", "score", lost, effect, 0.001),
        row("harmless", "score", 0.0, twins, 0.001),
        row("harmful − harmless", "specificity", lost, effect - twins, p_specific),
    ]


@pytest.mark.parametrize(
    ("rows", "status", "words"),
    [
        (edited("careful", 10.0, 8.0, 0.0), "shown", "and not as much on twins"),
        (edited("careful", -1.0, 1.5, 0.0), "not shown", "nothing to bring back"),
        (
            edited("careful", 10.0, 0.0, 0.0) + edited("filler", 2.0, 1.5, 0.0),
            "not shown",
            "No edit of these heads is shown to bring back",
        ),
        (
            edited("careful", 10.0, 8.0, 0.0, p_specific=0.06),
            "not shown",
            "not shown to raise it more than on",
        ),
        (edited("careful", 10.0, 8.0, 7.0), "not shown", "not shown to raise it more than on"),
        (
            edited("careful", 10.0, 8.0, 0.0, p_specific=0.03) + edited("confirm", 10.0, 0.0, 0.0),
            "not shown",
            "Corrected over edits and chains of thought (2)",
        ),
        (edited("careful", 10.0, 8.0, 0.0)[:1], "not shown", "twins –"),
        (edited("filler", 2.0, 1.5, 0.0), "cannot tell", "No edit of these heads was possible"),
    ],
)
def test_restored_is_only_what_a_chain_of_thought_took(
    rows: list[dict[str, object]], status: str, words: str
) -> None:
    (said,) = removal_findings(None, pd.DataFrame(rows))
    assert said.status == status
    assert words in said.text


def test_what_removal_changes_besides_is_said_of_all_that_was_looked_at() -> None:
    """Answers that fall apart are a change, one of chance is none, and nothing is named that was not measured."""

    def row(measure: str, kind: str, after: float, p: float, spread: float = 0.01) -> dict[str, object]:
        ends = {"change": after, "change_low": after - spread, "change_high": after + spread, "p": p}
        place = {"measure": measure, "kind": kind, "condition": "off"}
        return {**place, "before": 0.0, "after": after, **ends, "random": 0.0}

    moved = [row("other", "harmless", 1.0, 0.001), row("answer", "reasoning", -14.0, 0.001)]
    tiny = row("kl", "neutral", 0.02, float("nan"))
    chance = [row("refuse", "harmless", 0.1, 0.4, spread=0.2), row("refuse", "harmful", -1.0, 0.001)]
    (said,) = removal_findings(SimpleNamespace(table=pd.DataFrame([*moved, tiny, *chance])), None)  # type: ignore[arg-type]
    changed, still = said.text.split("Not shown to change: ")
    assert "harmless requests with neither, off: 0 → 1" in changed
    assert "log-probability of the right answer, nats, off: 0 → −14" in changed
    assert "KL on neutral text, nats per token, off: 0 → 0.02" in changed
    assert still.startswith("harmless requests refused (off +0.10). ")
    assert "rightly" not in said.text
    (said,) = removal_findings(SimpleNamespace(table=pd.DataFrame(chance)), None)  # type: ignore[arg-type]
    assert said.text.startswith("Not shown to change: harmless requests refused (off +0.10). Tests")
