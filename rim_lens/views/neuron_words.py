"""What a study of neurons says in plain sentences, each computed from the numbers, each beside its control."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rim_lens.measures.removal_table import DIFFERENCE
from rim_lens.views.finding import LEVEL, SPECIFIC, Finding, Status
from rim_lens.views.head_words import besides_finding
from rim_lens.views.words import between, listed, p_value, per_cent, plain, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.entanglement.result import Entanglement
    from rim_lens.measures.neurons.effects import NeuronEffects
    from rim_lens.measures.neurons.sets import NeuronSet
    from rim_lens.study import NeuronStudyResult

LIMITS: tuple[str, ...] = (
    "Neurons were chosen by how their activation differs between two forms of a request. That they differ is no sign that refusal"
    " depends on them; ablation is the evidence, and it is of the set, not of its members.",
    "Zeroing neurons takes activations off the distribution the model was trained on. Another set that was not tried could do as"
    " much, and after training others could take their place.",
    "p of entanglement is a rank among sets chosen along a contrast for no reason. A small one says that training moved this set"
    " further both ways than such sets, not that this weakened refusal, nor that it has to do with reasoning: hold it beside a"
    " control model that drifted as far.",
    "Putting the base's activations back says what they restore, whether or not the tuned model's own weights at these neurons"
    " changed.",
    "Everything holds for these requests, this template and greedy decoding.",
)
_VERDICTS: dict[str, tuple[Status, str]] = {
    "refusal": (
        "shown",
        "Removing these neurons moves refusal of harmful requests, not as much on twins, and more than random sets do",
    ),
    "like random": (
        "not shown",
        "Removing them moves refusal of harmful requests more than that of twins, but random sets of the same layers do as much",
    ),
    "general": (
        "not shown",
        "Removing them moves harmful requests or twins without a difference between the two: it is not shown to be about refusal",
    ),
    "none": ("not shown", "Removing them is not shown to move either kind of request"),
    "not tested": ("cannot tell", "There are too few families or random sets for any p to come to the level"),
}


def neuron_question(result: NeuronStudyResult) -> str:
    """What the study asks."""
    asked = f"Which neurons does refusal depend on in {result.design['model']}"
    return f"{asked}, and did tuning move these in {listed(result.tuned)}?" if result.tuned else f"{asked}?"


def neuron_findings(result: NeuronStudyResult) -> list[Finding]:
    """Say what was found, in order, and what is missing yet. A study stopped at its gate has one finding: why."""
    said = [_gate(result)]
    found = result.neurons
    if result.missing:
        said.append(Finding("Interrupted", "note", f"Not measured yet: {', '.join(result.missing)}."))
    if found is None:
        return said
    said.append(_set(found, result.design["settings"]))
    if found.effects is not None:
        conditions = list(dict.fromkeys(found.effects.table.query("measure == 'score'")["condition"]))
        said += [_removal(found.effects, condition) for condition in conditions]
        said.append(besides_finding(found.effects.table, "these neurons"))
    if result.dose is not None:
        said.append(_dose(result.dose))
    if result.writers is not None:
        said.append(_writers(result.writers))
    verdict = "not tested" if found.effects is None else found.effects.verdict
    said += [_entangled(name, one, verdict) for name, one in result.entanglement.items()]
    said += [_multiverse(name, one) for name, one in result.multiverse.items()]
    said += [_restored(name, one) for name, one in result.restored.items()]
    return said


def _gate(result: NeuronStudyResult) -> Finding:
    asked = result.design["settings"]
    forms = "the harmless twin" if asked["pairs"] == "twins" else "the request without a sentence of intent"
    if result.gate["passed"]:
        return Finding(
            "The model refuses one side more",
            "shown",
            f"Of {result.design['n_select']} pairs, it refuses the one form more than {forms}, by score and, where answers are written,"
            " by what it writes.",
        )
    rest = (
        " The gate was overridden (gate=False): nothing below can be about refusal."
        if not asked["gate"]
        else ""
    )
    return Finding(
        "The model refuses one side more", "not shown", f"Not passed: {result.gate['reason']}{rest}"
    )


def _set(found: NeuronSet, settings: dict[str, Any]) -> Finding:
    made = found.made_by
    rule = (
        f"m = {settings['m']} per {settings['scope']}, {share(settings['min_fraction'])} of {made['n_pairs']} pairs of"
        f" {made['n_families']} families"
    )
    if not len(found):
        return Finding(
            "Neurons that pairs agree on",
            "not shown",
            f"None: {rule}. The sweep shows which m and share would choose some. Nothing was tested.",
        )
    stable, neutral = made["stability"], made["neutral"]
    told = ""
    if stable.get("jaccard") is not None:
        told += (
            f" Halves of the pairs choose sets that share {share(stable['jaccard'])} of their neurons (Jaccard; by chance"
            f" {share(stable['by_chance'])})."
        )
    if "size" in neutral:
        told += (
            f" The same rule applied to a neutral sentence chooses {neutral['size']} neurons, {neutral['shared']} of them the same"
            f" ({plain(neutral['shared_by_chance'])} by chance): these answer to a longer request, not to intent."
        )
    layers = ", ".join(
        f"{count} in layer {layer}" for layer, count in enumerate(found.per_layer.tolist()) if count
    )
    return Finding("Neurons that pairs agree on", "note", f"{len(found)} neurons ({layers}): {rule}.{told}")


def _removal(effects: NeuronEffects, condition: str) -> Finding:
    verdict = effects.verdict_in(condition)
    status, sentence = _VERDICTS[verdict]
    harmful, twins = (effects.row("score", kind, condition) for kind in ("harmful", "harmless"))
    numbers = f"harmful {_change(harmful)} ({p_value(harmful['p'])}; random sets {_random(harmful)}), twins {_change(twins)}"
    if "specificity" in set(effects.table["measure"]):
        gap = effects.row("specificity", DIFFERENCE, condition)
        numbers += (
            f", difference {_change(gap)} ({p_value(gap['p'])}; larger than {per_cent(gap['percentile'])} of {gap['n_controls']}"
            " random sets)"
        )
    return Finding(
        f"Refusal without these neurons, {condition}",
        status,
        f"{sentence} (verdict: {verdict}). Change of the score: {numbers}; {harmful['n']} requests of {harmful['n_families']} families.",
    )


def _dose(table: pd.DataFrame) -> Finding:
    gap = table[table["measure"] == "specificity"].sort_values("size")
    score = table[(table["measure"] == "score") & (table["kind"] == "harmful")].sort_values("size")
    apart = gap[(gap["p"] <= LEVEL) & (gap["percentile"] >= 95) & (gap["change"] < 0)]
    largest = score.iloc[-1]
    ends = f"without the first {int(largest['size'])}, harmful requests change by {_change(largest)} (random sets {_random(largest)})"
    if len(apart):
        first = apart.iloc[0]
        return Finding(
            "How many neurons it takes",
            "shown",
            f"From {int(first['size'])} neurons on, removal lowers refusal of harmful requests more than that of twins, by"
            f" {_change(first)}, {p_value(first['p'])} over sizes, and more than {per_cent(first['percentile'])} of"
            f" {int(first['n_controls'])} random sets; {ends}.",
        )
    return Finding(
        "How many neurons it takes",
        "not shown",
        f"At no size is refusal of harmful requests shown to fall more than that of twins, and more than by random sets; {ends}.",
    )


def _writers(table: pd.DataFrame) -> Finding:
    whole, writers = table.attrs["set"], table.attrs["writers"]
    told = (
        f"Of the set's effect of {signed(whole['total'])} nats, {signed(whole['direct'])} is written straight into the logits"
        + (f" ({share(whole['share'])})" if not math.isnan(whole["share"]) else "")
    )
    many = f"{len(writers)} of {len(table)} neurons are logit writers (more than {share(table.attrs['mostly'])} of their effect direct)"
    rest = table.attrs["rest"]
    left = f"; without them the set still does {signed(rest['total'])}" if writers and rest else ""
    return Finding("Writers of the words", "note", f"{told}; {many}{left}.")


def _entangled(name: str, found: Entanglement, verdict: str) -> Finding:
    ras, everyone = found.row("ras"), found.value("ras", "all")
    topic = f"RAS after tuning to {name}"
    if math.isnan(ras["value"]):
        return Finding(topic, "cannot tell", f"There is none: {ras['reason']}.")
    refusal = found.row("refusal_change_harmful", "model")
    numbers = (
        f"{plain(ras['value'])} [{plain(ras['low'])}, {plain(ras['high'])}] on the set (all neurons {plain(everyone)}),"
        f" {p_value(ras['p'])} among {int(ras['n_exchanged'])} sets chosen on exchanged labels (mean {plain(ras['exchanged'])}); random"
        f" sets {plain(ras['random'])}, larger than {per_cent(ras['percentile'])} of {int(ras['n_controls'])}. Refusal score of harmful"
        f" requests {signed(refusal['value'])} nats"
    )
    if math.isnan(ras["p"]):
        return Finding(
            topic, "cannot tell", f"{numbers}. There is no p: {ras['reason'] or 'no twins to exchange'}."
        )
    shown = ras["p"] <= LEVEL
    said = (
        "Tuning moved this set further down on safety and up on reasoning than sets chosen alike for no reason"
        if shown
        else "Tuning is not shown to move this set further, both ways, than sets chosen alike for no reason"
    )
    unrelated = (
        ""
        if verdict == "refusal"
        else f" Removing the set is not shown to be about refusal (verdict: {verdict}), so neither is this."
    )
    return Finding(topic, "shown" if shown else "not shown", f"{said}: {numbers}.{unrelated}")


def _multiverse(name: str, table: pd.DataFrame) -> Finding:
    return Finding(
        f"Over every choice, {name}",
        "note",
        f"{table.attrs['told']} Universes share their prompts: a description, no test.",
    )


def _restored(name: str, table: pd.DataFrame) -> Finding:
    score = table[(table["measure"] == "score") & (table["kind"] == "harmful")].iloc[0]
    twins = table[(table["measure"] == "score") & (table["kind"] == "harmless")].iloc[0]
    gap = table[table["measure"] == "specificity"]
    topic = f"Refusal restored in {name}"
    lost = f"{signed(score['base'])} in the base, {signed(score['tuned'])} after tuning, {signed(score['patched'])} with the base's activations in these neurons"
    numbers = f"{lost} (nats; effect {_interval(score, 'effect')}, random sets {signed(score['random'])}; twins {signed(twins['effect'])})"
    if math.isnan(score["restored"]):
        return Finding(
            topic,
            "not shown",
            f"There is nothing to bring back: tuning is not shown to lower the score. {numbers}.",
        )
    beyond = score["p"] <= LEVEL and score["restored_low"] > 0 and score["effect"] > score["random_high"]
    specific = bool(
        len(gap)
        and gap.iloc[0]["p"] <= LEVEL
        and gap.iloc[0]["effect_low"] > 0
        and gap.iloc[0]["effect"] >= SPECIFIC * score["effect"]
    )
    part = f"{share(score['restored'])} of what was lost"
    if beyond and specific:
        return Finding(
            topic, "shown", f"{part} comes back, beyond random sets and not as much on twins: {numbers}."
        )
    if beyond:
        return Finding(
            topic,
            "not shown",
            f"{part} comes back beyond random sets, but as much on twins: it need not be refusal. {numbers}.",
        )
    return Finding(topic, "not shown", f"No more comes back than by random sets ({part}): {numbers}.")


def _change(row: Any) -> str:
    return f"{_interval(row, 'change')} nats"


def _interval(row: Any, name: str) -> str:
    return f"{signed(row[name])} {between(row[f'{name}_low'], row[f'{name}_high'])}"


def _random(row: Any) -> str:
    if math.isnan(row["random"]):
        return "none"
    return f"{signed(row['random'])} {between(row['random_low'], row['random_high'])}"
