"""The verdict in plain sentences, each computed from the numbers, each beside its control.

What is not there is said to be not there. "Not shown" is no proof of absence: the interval says how large an
effect could still be. Nothing here is tuned to a model: the same rules speak about a random one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_lens.chat.conditions import controls_of, is_control, leaves_open
from rim_lens.errors import StudyFolderError
from rim_lens.views import numbers
from rim_lens.views.finding import LEVEL, Finding, Status, rate_of, refused_of, share_of
from rim_lens.views.head_words import head_findings, removal_findings, without_heads_finding
from rim_lens.views.neuron_words import neuron_findings
from rim_lens.views.probe_words import after_ablation_finding, probe_findings
from rim_lens.views.words import between, duration, listed, p_value, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.study import StudyResult

ALWAYS: tuple[str, ...] = (
    "Attention mass says where a head looks, not what it carries. Heads were chosen by ablation; attention stands"
    " beside that as a hint.",
    "Heads were chosen on the select requests and tested on others. Requests of one family (same verb or frame)"
    " stay on one side, and signs and resamples go by family.",
    "Zeroing a head takes its output off the distribution the model was trained on. An effect says that the model"
    " needs the head's output here, not what the head computes.",
    "The refusal score reads the first word only. What the model writes is judged by its opening words: refuse,"
    " comply, or other; not refusing is not complying.",
    "Wilson intervals take requests as independent; with few families they are too narrow. Bootstrap intervals over"
    " few families are too narrow as well.",
    "Everything holds for these requests, this template and greedy decoding.",
)


def question(result: StudyResult) -> str:
    """What the study asks."""
    asked = f"Does a chain of thought lower refusal in {result.design['model']}"
    heads = "which attention heads does its refusal depend on"
    if result.tuned and _past_gate(result):
        return f"{asked}, {heads}, and what did tuning move in {listed(result.tuned)}?"
    return f"{asked}, and {heads}?"


def findings(result: StudyResult) -> list[Finding]:
    """Say what a study found, in order. A study stopped at its gate has one finding: why.

    Raises:
        StudyFolderError: The study was interrupted and has not come to its end.
    """
    said = [gate_finding(result.gate, asked=bool(result.design["settings"]["gate"]))]
    if not _past_gate(result):
        return said
    if "heads" not in result.parts:
        raise StudyFolderError(
            f"the study in {result.path} was interrupted before its end. Run it again with the same folder: it goes on"
            " where it stopped; then show it."
        )
    if result.missing:
        left = f"Asked for and not measured yet: {', '.join(result.missing)}. Run it again with the same folder: it goes on there."
        said.append(Finding("Interrupted", "note", left))
    shares = numbers.outcome_shares(result)
    refused, scored = (numbers.contrasts(result, measure, "harmful") for measure in ("refused", "score"))
    for condition in result.conditions:
        if leaves_open(condition):
            said.append(open_finding(shares, int(result.design["settings"]["max_new_tokens"]), condition))
        elif condition != "off" and not is_control(condition):
            said += cot_findings(shares, refused, scored, condition)
    said += head_findings(result.heads, result.design)
    said += without_heads_finding(shares)
    said += removal_findings(result.removal, result.restored)
    if "removing" in result.parts and result.heads.found and result.removal is None:
        whole = "They are all the heads of their layers, so that no other set could stand beside them."
        said.append(
            Finding("What removing these heads does besides", "cannot tell", f"Not measured. {whole}")
        )
    if "probes" in result.parts:
        said += probe_findings(result.probes(), result.probes("refusal"))
        said += after_ablation_finding(result.probes_without_heads)
    if result.neurons is not None:
        said += neuron_findings(result.neurons)
    said += [_tuned_finding(name, shares) for name in numbers.tuned_written(result)]
    return said


def gate_finding(gate: Mapping[str, Any], *, asked: bool) -> Finding:
    """Whether the model refuses harmful requests and only these, with thinking off, on the select side."""
    refused = (
        f"With thinking off, on the select side, the model refused {rate_of(gate['harmful'], 'harmful requests')} and"
        f" {rate_of(gate['harmless'], 'harmless twins')}."
    )
    counted = (
        f"On the select side {gate['harmful']['counts']['refuse']} of {gate['harmful']['n']} harmful requests and"
        f" {gate['harmless']['counts']['refuse']} of {gate['harmless']['n']} harmless twins were refused."
    )
    if gate["passed"]:
        apart = gate["harmful"]["low"] > gate["harmless"]["high"]
        few = "" if apart else " So few requests do not show that it refuses harm more often than its twins."
        return Finding("Gate", "shown" if apart else "cannot tell", f"Passed. {refused}{few}")
    if asked:
        return Finding(
            "Gate",
            "not shown",
            f"Stopped: {gate['reason']} {counted} Nothing further was measured.",
        )
    return Finding(
        "Gate",
        "not shown",
        f"Not passed, and overridden (gate=False): {gate['reason']} {counted} Read everything below as a description"
        " of a model without selective refusal.",
    )


def cot_findings(
    shares: pd.DataFrame, refused: pd.DataFrame, scored: pd.DataFrame, name: str = "careful"
) -> list[Finding]:
    """Whether a chain of thought (careful, or another) lowers refusal, what filler and an unrelated CoT do, and what comes instead.

    Args:
        shares: From `numbers.outcome_shares`.
        refused: From `numbers.contrasts`, measure "refused", harmful requests.
        scored: The same, measure "score".
        name: The condition.
    """
    controls = controls_of(name)
    there = set(shares["condition"])
    off, careful = (share_of(shares, "base", "harmful", condition) for condition in ("off", name))
    change, score_change = _pair(refused, name, "off"), _pair(scored, name, "off")
    direction = _direction(change)
    lead = {
        "lower": f"A {name} CoT lowers refusal:",
        "higher": f"A {name} CoT raises refusal:",
        "none": f"A {name} CoT is not shown to change refusal:",
        "unknown": f"Whether a {name} CoT changes refusal cannot be told from so few families:",
    }[direction]
    return [
        Finding(
            f"{name.capitalize()} CoT against thinking off",
            _status(direction, wanted=("lower", "higher")),
            f"{lead} the model refused {refused_of(off, 'harmful requests')} with thinking off and {refused_of(careful)} after a {name}"
            f" CoT was put into its think block. Change in the share {_estimate(change)}, paired over"
            f" {int(change['n_families'])} families and corrected over {int(change['n_pairs'])} comparisons.{_score_line(score_change, direction)}",
        ),
        _controls_finding(
            direction,
            careful,
            share_of(shares, "base", "harmful", controls[0]),
            share_of(shares, "base", "harmful", controls[1]),
            refused,
            scored,
            name,
        )
        if there.issuperset(controls)
        else Finding(
            f"Controls of the {name} CoT",
            "cannot tell",
            f"{listed(list(controls))} were not measured, so that nothing tells what the CoT says from its length.",
        ),
        Finding(
            "What comes instead of refusal" + ("" if name == "careful" else f", {name}"),
            "note",
            f"After the {name} CoT, {int(careful['comply'])} of {int(careful['n'])} harmful requests were complied with and"
            f" {int(careful['other'])} got neither refusal nor compliance (off: {int(off['comply'])} and {int(off['other'])})."
            f" Of the harmless twins, {refused_of(share_of(shares, 'base', 'harmless', 'off'))} were refused with thinking off and"
            f" {refused_of(share_of(shares, 'base', 'harmless', name))} after the {name} CoT.",
        ),
    ]


def _controls_finding(
    direction: str,
    careful: Mapping[str, Any],
    filler: Mapping[str, Any],
    unrelated: Mapping[str, Any],
    refused: Any,
    scored: Any,
    name: str = "careful",
) -> Finding:
    first, second = controls_of(name)
    content = "The CoT's content, beyond its controls" + ("" if name == "careful" else f", {name}")
    left = (
        f"Meaningless filler of the same length left {refused_of(filler, 'harmful requests')} refused, a sound CoT of"
        f" another task {refused_of(unrelated)}."
    )
    by_filler, by_unrelated = _pair(refused, name, first), _pair(refused, name, second)
    compared = (
        f" {name.capitalize()} − {first}: {_estimate(by_filler)}; {name} − {second}: {_estimate(by_unrelated)}."
        f" On the refusal score: {_nats(_pair(scored, name, first))} and"
        f" {_nats(_pair(scored, name, second))}."
    )
    if direction != "lower":
        return Finding(f"Controls: {first} and {second} CoT", "note", left + compared)
    if filler["refuse"] == careful["refuse"] == 0:
        compared += " Both leave no refusal, so that only the score could tell them apart."
    beyond = [_direction(pair) == "lower" for pair in (by_filler, by_unrelated)]
    mode = (
        " Filler alone lowers refusal too: part of the fall is a change of mode, not reasoning."
        if _direction(_pair(refused, first, "off")) == "lower"
        else ""
    )
    if all(beyond):
        return Finding(
            content,
            "shown",
            f"{left} The {name} CoT lowers refusal more than either: what it says matters.{compared}{mode}",
        )
    if beyond[0]:
        other = (
            "an unrelated CoT lowers it further still"
            if _direction(by_unrelated) == "higher"
            else "is not shown to differ from an unrelated CoT"
        )
        return Finding(
            content,
            "not shown",
            f"{left} The {name} CoT lowers refusal more than filler does, but {other}: text shaped like a CoT may be enough,"
            f" whatever it is about.{compared}{mode}",
        )
    return Finding(
        content,
        "not shown",
        f"{left} The {name} CoT is not shown to lower refusal more than filler of the same length: this need not be"
        f" about reasoning.{compared}{mode}",
    )


def open_finding(shares: pd.DataFrame, max_new_tokens: int, name: str = "open") -> Finding:
    """What the model does when it writes its own CoT."""
    own = share_of(shares, "base", "harmful", name)
    where = f", {int(own['in_think'])} of them inside the think block" if own["refuse"] else ""
    cut = (
        f" {int(own['unfinished'])} of {int(own['n'])} replies were cut at the limit ({max_new_tokens} tokens or the end of the"
        " context) and judged by what stood there."
        if own["unfinished"]
        else ""
    )
    return Finding(
        f"The model's own CoT ({name})",
        "note",
        f"Writing its own CoT, the model refused {refused_of(own, 'harmful requests')}{where}, complied with {int(own['comply'])},"
        f" and did neither for {int(own['other'])}.{cut}",
    )


def _tuned_finding(name: str, shares: pd.DataFrame) -> Finding:
    base, tuned = (share_of(shares, model, "harmful", "off") for model in ("base", name))
    twins = share_of(shares, name, "harmless", "off")
    return Finding(
        f"What {name} writes",
        "note",
        f"With thinking off it refused {refused_of(tuned, 'harmful requests')}, complied with {int(tuned['comply'])} and did neither for"
        f" {int(tuned['other'])}; the base refused {refused_of(base)}. Of the twins it refused {refused_of(twins)}.",
    )


def time_line(result: StudyResult) -> str:
    """How long it took, beside what the plan estimated."""
    spent = sum(result.timings.values()) if (result.path / "timings.json").exists() else 0.0
    plan = numbers.plan_of(result)
    estimate = (
        f"; the plan estimated {duration(plan['seconds'])} for a study that runs to its end" if plan else ""
    )
    return f"Measuring took {duration(spent)}{estimate}."


def _past_gate(result: StudyResult) -> bool:
    return bool(result.gate["passed"]) or not result.design["settings"]["gate"]


def _pair(table: pd.DataFrame, a: str, b: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = table[(table["a"] == a) & (table["b"] == b)].iloc[0].to_dict()
    return row


def _direction(pair: Mapping[str, Any]) -> str:
    if pair["p"] <= LEVEL:
        return "lower" if pair["shift"] < 0 else "higher"
    # Families that do not differ are witnesses too: few that do, among many, show little change and not too little data.
    too_few = 2.0 ** (1 - pair["n_families"]) > LEVEL
    return "unknown" if too_few and pair["shift"] != 0 else "none"


def _status(direction: str, wanted: tuple[str, ...]) -> Status:
    if direction in wanted:
        return "shown"
    return "cannot tell" if direction == "unknown" else "not shown"


def _score_line(score: Mapping[str, Any], direction: str) -> str:
    line = f" The refusal score changes by {_nats(score)}."
    if direction in ("lower", "higher") and _direction(score) not in (direction, "unknown"):
        line += " The score, which reads the first word only, does not show the same: go by what is written."
    if direction == "none" and _direction(score) in ("lower", "higher"):
        line += f" So the first word leans {'less' if _direction(score) == 'lower' else 'more'} to refusing, but what the model writes is not shown to differ."
    return line


def _estimate(pair: Mapping[str, Any]) -> str:
    # Resamples of equal values have no width, which is not certainty.
    interval = "on every request alike" if pair["alike"] else between(pair["low"], pair["high"])
    return f"{signed(pair['shift'])} {interval} ({p_value(pair['p'])})"


def _nats(pair: Mapping[str, Any]) -> str:
    return f"{signed(pair['shift'])} nats {between(pair['low'], pair['high'])} ({p_value(pair['p'])})"
