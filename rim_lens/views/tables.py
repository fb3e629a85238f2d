"""A study as tables of text: the same ones in the page, in Markdown and in the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rim_lens.views import numbers
from rim_lens.views.words import between, duration, p_value, per_cent, plain, share, signed, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from rim_lens.measures.effect_tables import EffectTables
    from rim_lens.measures.heads.comparing import HeadComparison
    from rim_lens.measures.heads.result import RefusalHeads
    from rim_lens.measures.probes.after_ablation import ProbesAfterAblation
    from rim_lens.measures.probes.cliff import Cliff
    from rim_lens.measures.probes.result import ProbeResult
    from rim_lens.study import StudyResult
    from rim_lens.views.numbers import AnyResult, Gated


class Token(str):
    """Text that a model, a tokenizer or a prompt gave: shown as code, and trusted nowhere."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        key: Its name in the page and in JSON.
        title: Its caption.
        columns: Headings.
        rows: Cells, as many a row as columns.
        note: What to know when reading it.
        folded: Whether it is long, and opened only when asked for.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False


def gate_table(result: Gated) -> Table:
    """What the gate measured and what it asked for."""
    settings, gate = result.design["settings"], result.gate
    asked = {
        "harmful": f"at least {share(settings['min_refusal'])} refused",
        "harmless": f"refused at most {share(settings['max_twin_ratio'])} times as often as harmful ones",
    }
    rows = tuple(
        (
            title,
            str(gate[kind]["n"]),
            *(str(gate[kind]["counts"][name]) for name in numbers.OUTCOMES),
            f"{share(gate[kind]['value'])} [{share(gate[kind]['low'])}, {share(gate[kind]['high'])}]",
            asked[kind],
        )
        for kind, title in numbers.KINDS.items()
    )
    columns = ("select side, thinking off", "n", *numbers.OUTCOMES, "refused [95 %]", "asked for")
    verdict = "passed" if gate["passed"] else "not passed"
    note = f"The gate was {verdict}{'' if settings['gate'] or gate['passed'] else ', and overridden (gate=False)'}."
    return Table("gate", "Gate: does the model refuse harmful requests, and only these?", columns, rows, note)


def outcome_table(result: StudyResult) -> Table:
    """Outcomes by model, kind and condition."""
    shares = numbers.outcome_shares(result)
    rank = {condition: place for place, condition in enumerate(result.conditions)}
    models = {"base": 0, "without_heads": 1, **{name: 2 + place for place, name in enumerate(result.tuned)}}
    ordered = sorted(
        shares.to_dict(orient="records"),
        key=lambda row: (models[row["model"]], row["kind"] != "harmful", rank[row["condition"]]),
    )
    named = {"base": "base", "without_heads": "base, found heads removed"}
    rows = tuple(
        (
            named.get(row["model"], Token(row["model"])),
            row["kind"],
            row["condition"],
            str(row["n"]),
            *(str(row[name]) for name in numbers.OUTCOMES),
            f"{share(row['share'])} [{share(row['low'])}, {share(row['high'])}]",
            str(row["in_think"]),
            str(row["unfinished"]),
        )
        for row in ordered
    )
    columns = (
        *("model", "requests", "condition", "n"),
        *numbers.OUTCOMES,
        *("refused [95 %]", "refused in think", "cut short"),
    )
    return Table(
        "outcomes",
        "What the model writes, by condition",
        columns,
        rows,
        "Interval: Wilson, which takes requests as independent. Judged by opening words.",
    )


_MEASURES: tuple[tuple[Literal["refused", "score"], str], ...] = (
    ("refused", "share refused"),
    ("score", "refusal score, nats"),
)


def contrast_table(result: StudyResult) -> Table:
    """Paired differences between conditions."""
    rows = []
    for kind in numbers.KINDS:
        for measure, unit in _MEASURES:
            for row in numbers.contrasts(result, measure, kind).to_dict(orient="records"):
                interval = "–" if row["alike"] else between(row["low"], row["high"])
                rows.append(
                    (
                        kind,
                        unit,
                        f"{row['a']} − {row['b']}",
                        signed(row["shift"]),
                        interval,
                        p_value(row["p"]),
                        f"{row['n']} / {row['n_families']}",
                    )
                )
    columns = ("requests", "measure", "A − B", "shift", "95 % interval", "p", "requests / families")
    return Table(
        "contrasts",
        "Conditions compared, paired over requests",
        columns,
        tuple(rows),
        "p: signs flipped by family, corrected over the comparisons of one measure and kind (largest statistic)."
        " Interval: bootstrap over families; – where every request shifts alike.",
    )


def score_table(result: StudyResult) -> Table:
    """Mean refusal scores."""
    rows = tuple(
        (
            row["kind"],
            row["condition"],
            signed(row["mean"]),
            between(row["low"], row["high"]),
            f"{row['n']} / {row['n_families']}",
        )
        for row in _in_order(result, numbers.score_means(result).to_dict(orient="records"))
    )
    return Table(
        "scores",
        "Refusal score, nats of log-odds for a refusing first word",
        ("requests", "condition", "mean", "95 % interval", "requests / families"),
        rows,
        "Above 0: refusing is more likely than not. There is no score in open: the next token there is the CoT's.",
    )


def attention_table(result: StudyResult, span: str, a: str, b: str) -> Table:
    """The heads whose mass on a span differs most, each beside its ablation effect."""
    rows = tuple(
        (
            row["name"],
            f"{row['mass_a']:.3f}",
            f"{row['mass_b']:.3f}",
            signed(row["change"], 3),
            signed(row["effect_select"]),
            row["verdict"],
        )
        for row in numbers.attention_changes(result, span, a, b).to_dict(orient="records")
    )
    columns = ("head", f"mass in {a}", f"mass in {b}", f"{a} − {b}", "effect when zeroed (nats)", "tested")
    return Table(
        "attention",
        f"Heads whose attention to the span {span} differs most, harmful requests",
        columns,
        rows,
        "Effect: change of the mean refusal score on the select side, harmful requests; it ranks, it tests nothing."
        " Tested: verdict on the evaluate side, where the head was among those found.",
    )


def head_tables(heads: RefusalHeads) -> list[Table]:
    """The set beside its controls (where one was found), the tested heads one by one, and what the verdicts mean."""
    whole = [_set_table(heads)] if heads.found else []
    return [*whole, _tested_table(heads), verdict_table(heads)]


def _set_table(heads: RefusalHeads) -> Table:
    effect = heads.set
    whole, gap = effect["effect"], effect["specificity"]
    rows = (
        ("heads", ", ".join(numbers.head_name(*head) for head in heads.found)),
        (
            "effect on harmful requests",
            f"{signed(whole['estimate'])} nats {between(whole['low'], whole['high'])}",
        ),
        ("effect on harmless twins", f"{signed(effect['effect_twins'])} nats"),
        ("specificity", f"{signed(gap['estimate'])} nats {between(gap['low'], gap['high'])}"),
        (
            "requests leaning to refusal",
            f"{share(effect['refusing_before'])} → {share(effect['refusing_after'])}",
        ),
        *(
            (
                (
                    "larger in size than",
                    f"{per_cent(effect['percentile'])} of n = {effect['n_controls']} other sets",
                ),
                ("p among these sets", p_value(effect["control_p"])),
            )
            if effect["n_controls"]
            else (
                ("larger in size than", "nothing: it holds all heads of its layers, and no other set does"),
            )
        ),
        ("requests", str(whole["n"])),
    )
    return Table(
        "head_set",
        "The found set, all zeroed together, on the evaluate side",
        ("", "value"),
        rows,
        "Other sets have as many heads in each layer; all of them where fewer exist than were asked for.",
    )


def _tested_table(heads: RefusalHeads) -> Table:
    table = numbers.head_effects(heads)
    moves = [name for name in table.columns if name.startswith("moves_") and not name.endswith("_twins")]
    rows = tuple(
        (
            row["verdict"],
            row["name"],
            "yes" if row["found"] else "",
            f"{signed(row['effect'])} {between(row['effect_low'], row['effect_high'])}",
            p_value(row["p"]),
            f"{signed(row['effect_twins'])} {between(row['twins_low'], row['twins_high'])}",
            f"{signed(row['specificity'])} {between(row['specificity_low'], row['specificity_high'])}",
            p_value(row["p_specific"]),
            f"{per_cent(row['percentile'])} of {row['n_controls']}",
            *(f"{share(row[name])} / {share(row[f'{name}_twins'])}" for name in moves),
            *((share(row["sink"]),) if "sink" in table.columns else ()),
        )
        for row in table.to_dict(orient="records")
        if row["tested"]
    )
    columns = (
        *(
            "verdict",
            "head",
            "found",
            "effect on harmful",
            "p",
            "effect on twins",
            "specificity",
            "p, specific",
        ),
        "of its layer",
        *(f"moves ({name.removeprefix('moves_')})" for name in moves),
        *(("sink",) if "sink" in table.columns else ()),
    )
    told = "; ".join(
        f"{move['name']}: the argmax key goes from {move['leaves']} in {move['first']} to {move['enters']} in {move['second']}"
        for move in heads.settings.get("contrasts", [])
    )
    return Table(
        "heads",
        "Heads zeroed one by one, on the evaluate side",
        columns,
        rows,
        "Nats, edited − baseline. p: corrected over the tested heads. Specificity: harmful − twins. Of its layer: the other"
        " heads there with a smaller effect in size."
        + (
            f" Moves: share of harmful requests / of twins on which the head's attention moves ({told}). Sink: mean attention to"
            " the first token, the smallest over conditions. Attention is a hint; the verdict rests on the effects."
            if moves
            else ""
        ),
        folded=len(rows) > 24,
    )


def verdict_table(heads: RefusalHeads) -> Table:
    """How many heads have which verdict, and what the word means."""
    from rim_lens.measures.heads.table import VERDICTS, HeadRule

    rule = HeadRule(**heads.settings.get("rule", {}))
    meant = {
        "refusal": f"removal has an effect on harmful requests (p ≤ {rule.alpha:g}, at least {rule.min_effect:g} nats) most of"
        f" which is missing on their twins (p ≤ {rule.alpha:g}, at least {rule.min_specific:g} of it)",
        "general": "removal has an effect, on twins as well or on them alone",
        "sink": f"no effect shown; at least {rule.sink_mass:g} of its attention rests on the first token everywhere",
        "positional": f"no effect shown; its attention moves on at least {rule.moves:g} of the requests of both kinds",
        "none": "no effect shown, neither of these",
        "not tested": "not among the heads that the select side chose for the test",
    }
    counts = heads.table["verdict"].value_counts()
    n_heads = int(heads.settings.get("n_candidates", len(heads.scan)))
    unseen = max(0, n_heads - len(heads.table))
    rows = tuple(
        (name, str(int(counts.get(name, 0)) + (unseen if name == "not tested" else 0)), meant[name])
        for name in VERDICTS
    )
    return Table("verdicts", "Verdicts", ("verdict", "heads", "meaning"), rows)


def probe_table(result: ProbeResult) -> Table:
    """Per condition, the directions that were ablated, or the place that separates best, or why there is no probe."""
    rows = []
    for condition in dict.fromkeys(result.table["condition"]):
        part = result.table[result.table["condition"] == condition]
        if condition in result.reasons:
            rows.append((condition, "–", "–", f"no probe: {result.reasons[condition]}", *("–",) * 5))
            continue
        tested = part[part["effect"].notna()]
        chosen = tested if len(tested) else part.sort_values("auc_cv", ascending=False).head(1)
        rows += [
            (
                condition,
                str(row["layer"]),
                row["place"],
                row["state"],
                f"{share(row['auc'])} [{share(row['auc_low'])}, {share(row['auc_high'])}]",
                f"{share(row['share_positive'])} / {share(row['share_negative'])}",
                _effect(row, "effect"),
                _effect(row, "effect_twins"),
                f"{per_cent(row['percentile'])} of {row['n_controls']}" if row["n_controls"] else "–",
            )
            for row in chosen.to_dict("records")
        ]
    contrast = result.settings["contrast"]
    between_what = {
        "harmful": "harmful requests against harmless twins",
        "refusal": "refused against fulfilled harmful requests",
    }
    columns = (
        *("condition", "layer", "place", "what may be said", "AUC [95 %]", "above threshold"),
        *("ablated: on harmful", "on twins", "larger than"),
    )
    return Table(
        f"probes_{contrast}",
        f"Probes, {between_what[contrast]}",
        columns,
        tuple(rows),
        "Chosen by cross-validation on the select side, measured on the evaluate side. Above threshold: share of each class, the"
        " paper's probe score. Ablated: change of the refusal score in nats without that direction. Larger than: control"
        " directions that mix both classes. That classes can be told apart is no sign of refusal; the effect is.",
    )


def _effect(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None or row[name] != row[name]:
        return "–"
    return f"{signed(row[name])} {between(row[f'{name}_low'], row[f'{name}_high'])}"


def without_heads_table(result: ProbesAfterAblation) -> Table:
    """Where groups lie on the probes with the heads removed, beside random sets."""
    rows = tuple(
        (
            row["condition"],
            row["group"],
            str(row["layer"]),
            row["place"],
            str(row["n"]),
            f"{share(row['before'])} → {share(row['after'])}",
            f"{signed(row['change'])} {between(row['change_low'], row['change_high'])}",
            f"{share(row['random'])} [{share(row['random_low'])}, {share(row['random_high'])}]",
            f"{per_cent(row['percentile'])} of {row['n_controls']}",
            p_value(row["p_controls"]),
        )
        if row["state"] == "measured"
        else (
            row["condition"],
            row["group"],
            str(row["layer"]),
            row["place"],
            *("–",) * 5,
            row["state"],
        )
        for row in result.table.to_dict("records")
    )
    columns = (
        *("condition", "requests", "layer", "place", "n", "above threshold", "change"),
        *("random sets [95 %]", "larger than", "p among sets"),
    )
    return Table(
        "probes_without_heads",
        "Share above the probe's threshold with the found heads removed, and with random heads of the same layers",
        columns,
        rows,
        "p: rank among the random sets, one place at a time, not corrected. It says where the stream lies, not what the model answers.",
        folded=len(rows) > 24,
    )


def cliff_table(curves: Mapping[tuple[str, str], Cliff]) -> Table:
    """The probe along chains of thought, and its drop where the block closes."""
    rows = tuple(
        (
            kind,
            condition,
            str(len(one.per_request)),
            *(
                f"{signed(drop[name])} {between(drop[f'{name}_low'], drop[f'{name}_high'])}"
                for name in ("plateau", "end", "drop")
            ),
            share(drop["p_fall"]),
        )
        for (kind, condition), one in curves.items()
        for drop in one.drop.to_dict("records")
    )
    return Table(
        "cliff",
        "A probe of thinking off, along given chains of thought",
        ("requests", "condition", "n", "over the chain", "at the closing tag", "drop", "falls on"),
        rows,
        "Margin: +1 at the probe's mean of harmful requests, −1 at that of harmless ones. Falls on: share of requests.",
    )


def words_tables(result: StudyResult) -> list[Table]:
    """The commonest first words per condition, and every reply's."""
    base = result.outcomes[result.outcomes["model"] == "base"]
    common = []
    for kind in ("harmful", "harmless"):
        for condition in result.conditions:
            part = base[(base["kind"] == kind) & (base["condition"] == condition)]
            counts = part.groupby(["first_words", "outcome"], sort=False).size()
            for (words, outcome), count in counts.sort_values(ascending=False, kind="stable")[:3].items():
                common.append((kind, condition, Token(words), outcome, f"{count} of {len(part)}"))
    every = tuple(
        (
            Token(row["prompt"]),
            row["kind"],
            row["condition"],
            row["outcome"],
            row["where"],
            Token(row["first_words"]),
        )
        for row in base.to_dict(orient="records")
    )
    note = (
        "At most six words (60 characters) of a reply are stored; of replies to harmful requests nothing else is kept. In"
        " open, without an answer, they are the CoT's."
    )
    return [
        Table(
            "common_words",
            "Commonest first words of the base model's replies",
            ("requests", "condition", "first words", "judged", "count"),
            tuple(common),
            note,
        ),
        Table(
            "words",
            f"First words of all {len(every)} replies of the base model",
            ("prompt", "requests", "condition", "judged", "found in", "first words"),
            every,
            note,
            folded=True,
        ),
    ]


def time_table(result: AnyResult) -> Table:
    """Seconds per stage beside what the plan counted."""
    plan = numbers.plan_of(result) or {"steps": []}
    rows = []
    for stage, seconds in result.timings.items():
        steps = [step for step in plan["steps"] if step["stage"] == stage]
        bound = "≤ " if any(step.get("at_most") for step in steps) else ""
        rows.append(
            (
                stage,
                duration(seconds),
                f"{sum(step['rows'] for step in steps):,}" if steps else "–",
                f"{bound}{sum(step['passes'] for step in steps):,}" if steps else "–",
                f"{bound}{sum(step['tokens'] for step in steps):,}" if steps else "–",
            )
        )
    estimate = f", planned {duration(plan['seconds'])}" if "seconds" in plan else ""
    rows.append(("all", f"{duration(sum(result.timings.values()))}{estimate}", "", "", ""))
    return Table(
        "timings",
        "Time per stage, and what the plan counted",
        ("stage", "measured", "rows", "forward passes", "tokens"),
        tuple(rows),
        "Measured: all runs of this folder together, without loading models. A study stopped at its gate does none of the"
        " later stages.",
    )


def parameter_table(result: AnyResult) -> Table:
    """Everything that decides the numbers: model, weights, requests, settings, versions."""
    design = result.design
    facts = design["facts"]
    rows: list[tuple[str, str]] = [
        ("model", Token(design["model"])),
        ("digest of its weights", Token(design["weights_digest"])),
        *((f"tuned model {name}", Token(source)) for name, source in result.asked["tuned"].items()),
        ("chat format", Token(design["chat_format"])),
        *((key.replace("_", " "), Token(value)) for key, value in facts.items() if key != "name"),
        ("requests, select side", f"{design['n_select']} harmful and their twins"),
        (
            "requests, evaluate side",
            f"{design['n_evaluate']} harmful of {design['n_families_evaluate']} families and their twins;"
            f" {design['n_reasoning']} reasoning questions",
        ),
        ("digest of the requests", Token(design["prompts_digest"])),
        *((key.replace("_", " "), Token(value)) for key, value in design["settings"].items()),
        *((name, Token(version)) for name, version in design["versions"].items()),
    ]
    return Table("parameters", "Parameters and versions", ("", "value"), tuple(rows))


def removal_table(result: EffectTables, what: str = "found heads", unit: str = "heads") -> Table:
    """What removing a set does, beside random sets."""
    rows = tuple(
        (
            row["measure"],
            row["kind"],
            row["condition"],
            str(row["n"]),
            f"{plain(row['before'])} → {plain(row['after'])}",
            f"{signed(row['change'], 3)} {between(row['change_low'], row['change_high'], 3)}",
            p_value(row["p"]),
            f"{signed(row['random'], 3)} {between(row['random_low'], row['random_high'], 3)}",
            f"{per_cent(row['percentile'])} of {row['n_controls']}" if row["n_controls"] else "–",
            row["unit"],
        )
        for row in result.table.to_dict("records")
    )
    columns = (
        *("measure", "on", "condition", "n", "before → after", "change [95 %]", "p", "random sets [95 %]"),
        *("larger than", "unit"),
    )
    return Table(
        "removal",
        f"What removing the {what} does, on the evaluate side",
        columns,
        rows,
        "p: corrected over the conditions of one measure and kind. Random sets: as many "
        + unit
        + " in each layer; replies are written"
        " for a few of them only. refuse on harmless is over-refusal; other is neither refusal nor compliance; correct and answer"
        f" are of reasoning questions; kl is of {result.settings['neutral']}.",
        folded=len(rows) > 24,
    )


def statistics_tables(result: StudyResult) -> list[Table]:
    """What heads do beside what their removal does: all of them, how steadily, and pairs."""
    told = result.statistics
    if told is None:
        return []

    def shown(value: float) -> str:
        return "–" if math.isnan(value) else plain(value, 2)

    rows = tuple(
        (
            numbers.head_name(row["layer"], row["head"]),
            *(
                shown(row[name])
                for name in (
                    *(
                        "effect_select",
                        "estimate",
                        "direct",
                        "direct_twins",
                        "argmax_shift",
                        "argmax_shift_twins",
                    ),
                    *("mass_shift", "mass_shift_twins", "sink", "entropy_share", "kurtosis"),
                )
            ),
        )
        for row in told["heads"].to_dict("records")
    )
    about, agreement = told["reliability"], told["estimates"]
    ranked = (
        f" The estimate ranks heads as their removal does with r = {share(agreement['rank_correlation'])}, and"
        f" {agreement['top_shared']} of its first {agreement['top']} are among the exact first."
        if agreement.get("top")
        else ""
    )
    steady = tuple(
        (
            name,
            share(one["value"]),
            between(one["low"], one["high"]),
            str(one["n_families"]),
            str(one["n_heads"]),
        )
        for name, one in about.items()
    )
    tables = [
        Table(
            "head_statistics",
            f"All {len(rows)} heads: what they write and how they look",
            (
                *(
                    "head",
                    "removal, select",
                    "estimate",
                    "direct",
                    "direct, twins",
                    "argmax moves",
                    "… twins",
                ),
                *("mass moves", "… twins", "sink", "entropy", "kurtosis"),
            ),
            rows,
            "Removal, estimate (gradient × activation): nats, on the select side; direct: nats that leave with the head's own output at"
            " the last row. Argmax moves: share of requests on which its argmax leaves the role word (open) for the empty block (off);"
            " mass moves: mass on the role word, open − off. Sink: mass on the first token; entropy: share of that of an even look, in off."
            f" Kurtosis: how far its attention within a chain is heaped on few sentences.{ranked}",
            folded=True,
        )
    ]
    if steady:
        tables.append(
            Table(
                "reliability",
                "How steadily heads are ranked: halves of the requests against each other",
                ("statistic", "reliability", "over splits [95 %]", "families", "heads"),
                steady,
                "Spearman and Brown: 1 is the same order in both halves. A positional head is steady as well.",
            )
        )
    if told["pairs"] is not None:
        rows = tuple(
            (
                row["pair"],
                signed(row["effect_first"]),
                signed(row["effect_second"]),
                signed(row["effect"]),
                f"{signed(row['interaction'])} {between(row['low'], row['high'])}",
                p_value(row["p"]),
                row["kind"],
            )
            for row in told["pairs"].to_dict("records")
        )
        tables.append(
            Table(
                "pairs",
                "Pairs of heads removed together, on the evaluate side",
                ("pair", "first", "second", "both", "interaction [95 %]", "p", "kind"),
                rows,
                "Nats. Redundant: both together do more than the sum, so that they stand in for each other. Overlapping: less. p: corrected"
                " over the pairs.",
            )
        )
    return tables


def restored_table(table: pd.DataFrame) -> Table:
    """Whether editing the found heads under a chain of thought brings refusal back."""
    rows = tuple(
        (
            row["condition"],
            row["edit"],
            row["kind"],
            row["measure"],
            str(row["n"]),
            f"{plain(row['off'])} / {plain(row['baseline'])} → {plain(row['edited'])}",
            f"{signed(row['effect'])} {between(row['effect_low'], row['effect_high'])}",
            p_value(row["p"]),
            "–"
            if math.isnan(row["restored"])
            else f"{signed(row['restored'])} {between(row['restored_low'], row['restored_high'])}",
            f"{signed(row['random'])} {between(row['random_low'], row['random_high'])}",
            str(row["n_controls"]),
        )
        if row["state"] == "measured"
        else (
            *(row["condition"], row["edit"], row["kind"], row["measure"], str(row["n"]), row["state"]),
            *("–",) * 5,
        )
        for row in table.to_dict("records")
    )
    columns = (
        *("condition", "edit", "on", "measure", "n", "off / in condition → edited", "effect [95 %]", "p"),
        *("of the gap restored", "random sets [95 %]", "sets"),
    )
    return Table(
        "restored",
        "Refusal under a given chain of thought, with the found heads edited",
        columns,
        rows,
        "block: the heads lose the keys of the chain. move: what they give it goes to the think tags. patch: their outputs are those"
        " of thinking off. An edit that raises refusal on twins as well restores nothing. Of the gap restored: – where refusal in"
        " the condition is not shown to be lower than in off.",
        folded=len(rows) > 24,
    )


def compared_table(name: str, result: HeadComparison) -> Table:
    """The heads of the base and of one tuned model, matched."""
    rows = tuple(
        (
            numbers.head_name(row["layer"], row["head"]),
            f"{row['verdict_base']} → {row['verdict_tuned']}",
            f"{signed(row['effect_base'])} → {signed(row['effect_tuned'])}",
            f"{signed(row['change'])} {between(row['change_low'], row['change_high'])}",
            p_value(row["p"]),
            f"{signed(row['change_specificity'])} {between(row['change_specificity_low'], row['change_specificity_high'])}",
        )
        for row in result.table.to_dict("records")
    )
    level, rank = result.baseline["harmful"], result.correlation
    return Table(
        f"compared_{name}",
        f"Heads of the base and of {name}, matched by layer and number",
        ("head", "verdict", "effect on harmful", "change [95 %]", "p", "change of specificity [95 %]"),
        rows,
        f"Mean refusal score of harmful requests: {signed(level['base'])} → {signed(level['tuned'])} nats: a model that refuses less"
        f" has less to lose, and every effect shrinks. Rank correlation of effects {share(rank['value'])} [{share(rank['low'])},"
        f" {share(rank['high'])}]. p: corrected over the heads.",
        folded=len(rows) > 24,
    )


def asked_table(settings: Mapping[str, Any]) -> Table:
    """What a measurement was asked for, on which model and requests."""
    hidden = ("model", "contrasts", "rule", "digests", "outcomes")
    rows = [("model", Token(settings["model"].get("name", "?")))]
    rows += [(key.replace("_", " "), Token(value)) for key, value in settings.items() if key not in hidden]
    return Table("asked", "What was asked", ("", "value"), tuple(rows), folded=True)


def file_table(result: AnyResult) -> Table:
    """The files of the study's folder."""
    files = numbers.files_of(result)
    rows = tuple((Token(name), size(n_bytes)) for name, n_bytes in files)
    total = size(sum(n_bytes for _, n_bytes in files))
    return Table("files", f"{len(files)} files, {total} in all", ("file", "size"), rows, folded=True)


def _in_order(result: StudyResult, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rank = {condition: place for place, condition in enumerate(result.conditions)}
    return sorted(rows, key=lambda row: (row["kind"] != "harmful", rank[row["condition"]]))
