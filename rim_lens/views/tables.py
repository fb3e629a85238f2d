"""A study as tables of text: the same ones in the page, in Markdown and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rim_lens.views import numbers
from rim_lens.views.words import between, duration, p_value, per_cent, plain, share, signed, size

if TYPE_CHECKING:
    from rim_lens.study import StudyResult


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


def gate_table(result: StudyResult) -> Table:
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


def head_tables(result: StudyResult) -> list[Table]:
    """Tested heads one by one, and the set beside its controls; nothing where none were found."""
    if not result.heads.found:
        return []
    rows = tuple(
        (
            row["name"],
            "yes" if row["found"] else "",
            f"{signed(row['effect'])} {between(row['effect_low'], row['effect_high'])}",
            f"{signed(row['effect_twins'])} {between(row['twins_low'], row['twins_high'])}",
            f"{signed(row['specificity'])} {between(row['specificity_low'], row['specificity_high'])}",
            p_value(row["p"]),
            f"{per_cent(row['percentile'])} of {row['n_controls']}" if row["tested"] else "–",
            row["verdict"],
        )
        for row in numbers.head_effects(result).to_dict(orient="records")
        if row["tested"]
    )
    columns = (
        *("head", "found", "effect on harmful", "effect on twins", "specificity", "p"),
        *("of its layer", "verdict"),
    )
    effect = result.heads.set
    whole, gap = effect["effect"], effect["specificity"]
    names = ", ".join(numbers.head_name(*head) for head in result.heads.found)
    together = (
        ("heads", names),
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
        ("larger in size than", f"{per_cent(effect['percentile'])} of n = {effect['n_controls']} other sets"),
        ("p among these sets", p_value(effect["control_p"])),
        ("requests", str(whole["n"])),
    )
    return [
        Table(
            "head_set",
            "The found set, all zeroed together, on the evaluate side",
            ("", "value"),
            together,
            "Other sets have as many heads in each layer; all of them where fewer exist than were asked for.",
        ),
        Table(
            "heads",
            "Heads zeroed one by one, on the evaluate side",
            columns,
            rows,
            "Nats, edited − baseline. p: corrected over the tested heads. Specificity: harmful − twins. Of its layer: the heads"
            " there that are not tested (all others where all are) with a smaller effect in size.",
            folded=len(rows) > 24,
        ),
    ]


def shift_table(result: StudyResult) -> Table | None:
    """RAS per tuned model; None where there is none."""
    shifts = result.shift["tuned"]
    if not shifts:
        return None
    rows = tuple(
        (
            Token(name),
            neurons,
            plain(part["value"]),
            plain(part["safety_drop"]),
            plain(part["reasoning_rise"]),
            _sides(part, "n_used"),
            _sides(part, "n_excluded"),
            per_cent(found["percentile"]) if key == "safety" and found["percentile"] is not None else "–",
            _random_range(found["random"]) if key == "safety" else "–",
        )
        for name, found in shifts.items()
        for key, neurons in (
            ("safety", f"safety set ({result.shift['set_size']})"),
            ("all", "all neurons"),
        )
        for part in (found[key],)
    )
    columns = (
        *("tuned model", "neurons", "RAS", "safety drop", "reasoning rise", "used", "left out"),
        *("percentile", "random sets: median (range)"),
    )
    return Table(
        "shift",
        "Reciprocal activation shift, base to tuned",
        columns,
        rows,
        "In the unit of the activations. Percentile: among random sets of the same size per layer. Used and left out: neurons on safety / reasoning prompts; a neuron with an"
        " activation that is not positive is left out. Not established as specific: see the verdict.",
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


def time_table(result: StudyResult) -> Table:
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


def parameter_table(result: StudyResult) -> Table:
    """Everything that decides the numbers: model, weights, requests, settings, versions."""
    design = result.design
    facts = design["facts"]
    rows: list[tuple[str, str]] = [
        ("model", Token(design["model"])),
        ("digest of its weights", Token(design["weights_digest"])),
        *((f"tuned model {name}", Token(source)) for name, source in design["tuned"].items()),
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


def file_table(result: StudyResult) -> Table:
    """The files of the study's folder."""
    files = numbers.files_of(result)
    rows = tuple((Token(name), size(n_bytes)) for name, n_bytes in files)
    total = size(sum(n_bytes for _, n_bytes in files))
    return Table("files", f"{len(files)} files, {total} in all", ("file", "size"), rows, folded=True)


def _in_order(result: StudyResult, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rank = {condition: place for place, condition in enumerate(result.conditions)}
    return sorted(rows, key=lambda row: (row["kind"] != "harmful", rank[row["condition"]]))


def _sides(part: dict[str, Any], key: str) -> str:
    sides = part.get(key)
    return f"{sides['safety']} / {sides['reasoning']}" if sides else "–"


def _random_range(values: list[float | None]) -> str:
    import numpy as np

    usable = [value for value in values if value is not None]
    if not usable:
        return "–"
    return f"{plain(float(np.median(usable)))} ({plain(min(usable))} to {plain(max(usable))})"
