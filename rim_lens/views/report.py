"""A study's report: one self-contained page, and the same for machines as Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.chat.conditions import controls_of, is_control, leaves_open
from rim_lens.measures.probes.groups import CONTRASTS
from rim_lens.views import neuron_words, numbers, plots, reproduce, tables, verdict
from rim_lens.views.head_words import head_findings
from rim_lens.views.neuron_report import neuron_measures, neuron_sections
from rim_lens.views.page import (
    Figure,
    Page,
    Section,
    finite,
    frame,
    now,
    page_html,
    page_markdown,
    write_text,
)
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.measures.heads.result import RefusalHeads
    from rim_lens.measures.probes.result import ProbeResult
    from rim_lens.study import StudyResult
    from rim_lens.views.finding import Finding

FORMAT_VERSION = 1


def write_report(result: StudyResult, path: str | Path | None = None) -> Path:
    """Write a study's report: ``report.html``, and beside it ``report.md`` and ``report.json``.

    Args:
        result: A study that came to its end, or stopped at its gate.
        path: Of the page; ``report.html`` in the study's folder when None. The other two take its name.

    Returns:
        The path of the page. It opens offline in any browser.

    Raises:
        StudyFolderError: The study was interrupted, or its folder is incomplete.
    """
    target = Path(path) if path is not None else result.path / "report.html"
    said = verdict.findings(result)
    sections = _sections(result, said)
    page = Page(
        "study",
        result.design["model"],
        verdict.question(result),
        said,
        sections,
        result.design["versions"]["rim_lens"],
    )
    write_text(target, page_html(page))
    write_text(target.with_suffix(".md"), page_markdown(page))
    write_text(target.with_suffix(".json"), _json(result, said, sections))
    return target


def study_html(result: StudyResult) -> str:
    """A small summary for a notebook: the verdict and the main tables, in a frame that can run nothing.

    Raises:
        StudyFolderError: The study was interrupted, or its folder is incomplete.
    """
    said = verdict.findings(result)
    shown = (
        [tables.outcome_table(result), *tables.head_tables(result.heads)[:1]]
        if "heads" in result.parts
        else []
    )
    return frame(
        "study",
        result.design["model"],
        verdict.question(result),
        said,
        [tables.gate_table(result), *shown],
    )


def heads_html(heads: RefusalHeads) -> str:
    """What `rl.refusal_heads` found, for a notebook: verdicts, the tested heads, the set beside its controls, what was asked."""
    settings = heads.settings
    asked = {"n_select": settings["n_select"], "settings": settings}
    model = settings["model"].get("name", "the model")
    return frame(
        "heads",
        model,
        f"Which attention heads does refusal depend on in {model}?",
        head_findings(heads, asked),
        [*reversed(tables.head_tables(heads)), tables.asked_table(settings)],
    )


def probes_html(result: ProbeResult) -> str:
    """What `rl.probe` found, for a notebook: each ablated direction with its effect, and what was asked."""
    model = result.settings["model"].get("name", "the model")
    return frame(
        "probes",
        model,
        f"What tells {' from '.join(CONTRASTS[result.settings['contrast']])} requests apart in {model}, and does refusal depend"
        " on it?",
        [],
        [tables.probe_table(result), tables.asked_table(result.settings)],
    )


# --- what it holds -----------------------------------------------------------------------------------


def _sections(result: StudyResult, said: list[Finding]) -> list[Section]:
    gate = Section("gate", "The gate", tables=[tables.gate_table(result)])
    ending = [
        _methods(result, measured=len(said) > 1),
        _reproduce(result),
        Section(
            "files",
            "Time and files",
            (verdict.time_line(result),),
            tables=[tables.time_table(result), tables.file_table(result)],
        ),
    ]
    if len(said) == 1:  # stopped at the gate
        return [gate, *ending]
    return [
        gate,
        Section(
            "outcomes",
            "What it writes",
            figures=[
                Figure(
                    "outcomes",
                    plots.outcomes(result),
                    "Look at the blue part: it is what the model refuses. Compare careful with off, and then with"
                    " filler and unrelated, its controls. Whiskers: 95 % Wilson interval of the refused share. The last bar, where there is one: thinking off, with the heads found by ablation removed.",
                    "Whether an answer that is not refused helps anyone, or whether anything behind the opening words"
                    " changed.",
                )
            ],
            tables=[tables.outcome_table(result), tables.contrast_table(result)],
        ),
        Section(
            "scores",
            "How far it leans to refusing",
            figures=[
                Figure(
                    "scores",
                    plots.scores(result),
                    "Points above the dotted line lean to refusing. Look for conditions in which filled points"
                    " (harmful) come down to the hollow ones (their twins). Diamonds: means with 95 % intervals over families.",
                    "What is written after the first word. A word that opens refusals and answers alike moves the score"
                    " as well.",
                )
            ],
            tables=[tables.score_table(result)],
        ),
        _attention(result),
        _heads(result),
        *_statistics(result),
        *_removing(result),
        *_comparing(result),
        *_probes(result),
        *_neurons(result),
        Section(
            "words",
            "First words",
            ("Enough to judge the judge by. Control characters are written out.",),
            tables=tables.words_tables(result),
        ),
        Section("limits", "What none of this shows", _limits(result)),
        *ending,
    ]


def _limits(result: StudyResult) -> tuple[str, ...]:
    of_neurons = () if result.neurons is None else neuron_words.LIMITS
    return tuple(dict.fromkeys((*of_neurons, *verdict.ALWAYS)))


def _attention(result: StudyResult) -> Section:
    hint = "What a head does with what it reads. A head can look hard and carry nothing: see its ablation effect."
    thought = _thought(result)
    figures = [
        Figure(
            "attention_off",
            plots.attention_map(result, thought, "off"),
            "Each cell is a head; the menu changes the span. In the right panel, vermillion heads look at the span more"
            f" in {thought}, blue ones more with thinking off. Dots: heads found by ablation. The think block"
            " holds more tokens with a CoT than without, so that its mass can rise from length alone.",
            hint,
        )
    ]
    control = next((name for name in controls_of(thought) if name in result.conditions), None)
    if control and _has_span(result, "cot", thought, control):
        figures.append(
            Figure(
                "attention_filler",
                plots.attention_map(result, thought, control, span="cot"),
                f"The same against {control}, of equal length: what is left here is not length.",
                hint,
            )
        )
    if result.heads.found:
        figures.append(
            Figure(
                "attention_found",
                plots.attention_by_head(result),
                "Where each found head looks from the last prompt token, by condition; the spans' masses sum to 1.",
                hint,
            )
        )
        if {"open", "off"} <= set(result.conditions):
            figures += _looking(result, hint)
    return Section(
        "attention",
        "Where heads look",
        (
            "Mass: the sum of a row's post-softmax attention over a span's tokens, mean over requests. The row is that of"
            " the last prompt token, which produces the first word.",
        ),
        figures,
        [tables.attention_table(result, "think", thought, "off")]
        if _has_span(result, "think", thought, "off")
        else [],
    )


def _thought(result: StudyResult) -> str:
    """The chain of thought that attention is drawn for: careful, or the first other one, or a control."""
    closed = [name for name in result.conditions if name != "off" and not leaves_open(name)]
    own = [name for name in closed if not is_control(name)]
    return "careful" if "careful" in own else [*own, *closed, "off"][0]


def _has_span(result: StudyResult, span: str, *conditions: str) -> bool:
    return all(
        span in numbers.attention_mass(result, "harmful", name)["span"].values.tolist() for name in conditions
    )


def _looking(result: StudyResult, hint: str) -> list[Figure]:
    """One head key by key, and how far argmax keys lie from the header; only of studies that kept as much."""
    figures = []
    if result.attention_rows:
        figures.append(
            Figure(
                "head_pattern",
                plots.head_pattern(result),
                "One harmful request: where the first found head looks from the last prompt token, with thinking open and off.",
                hint + " One request is an example.",
            )
        )
    with result.attention("harmful", "open") as data:
        anchored = "attention_argmax_pos" in data
    if anchored:
        figures.append(
            Figure(
                "argmax_positions",
                plots.argmax_positions(result),
                "How far the key with most attention lies from the assistant header (0: its first token; the think block is to"
                " the right). A head that moves between open and off has two heaps.",
                hint + " Heads that move so on harmless twins as well are positional.",
            )
        )
    return figures


def _heads(result: StudyResult) -> Section:
    figures = [
        Figure(
            "head_scan",
            plots.head_scan(result),
            "Blue cells: without that head the model leans less to refusing. Dots: the heads chosen.",
            "A test. These are the requests that chose the heads, and heads that stand in for each other do not show"
            " one by one.",
        ),
        Figure(
            "head_bubbles",
            plots.head_bubbles(result),
            "Large marks: heads whose attention moves between the conditions. Coloured ones: heads whose removal moves refusal. Where"
            " attention told of refusal, the two would go together. The mark's shape is the verdict on other requests.",
            "Why a head's attention moves. Size and colour are of the select side and test nothing.",
        ),
    ]
    if result.heads.found:
        figures += [
            Figure(
                "tested_heads",
                plots.head_effects(result),
                "Found heads should lie to the left (an effect on harmful requests) and near 0 vertically (none on their"
                " twins). On the dotted diagonal an effect is the same on both, so not about refusal. Grey: the other"
                " heads of the same layers.",
                "How heads act together, or what they compute.",
            ),
            Figure(
                "head_set",
                plots.head_set(result),
                "The found set should lie outside the grey sets. Each grey set has as many heads in each layer.",
                "That the set is the only one: another set can do as much if it was not among these.",
            ),
        ]
    return Section(
        "heads",
        "Heads found by ablation",
        (
            "Each head was zeroed at every position and the refusal score measured again with thinking off, on the"
            " select side; a small set was built greedily and pruned. Its effect was then measured on other requests.",
            "The word refusal is said only of a head whose removal moves harmful requests, and their twins at least a quarter less; where a head looks"
            " decides between the words for heads without an effect, and nothing else. A head without an effect by itself may"
            " still do its work together with others.",
        ),
        figures,
        tables.head_tables(result.heads),
    )


def _statistics(result: StudyResult) -> list[Section]:
    told = result.statistics
    if told is None:
        return []
    missing = tuple(f"Not there: {name}. {why}" for name, why in told["reasons"].items())
    return [
        Section(
            "statistics",
            "What heads write, and who works with whom",
            (
                "All heads, on the evaluate side. None of these is an effect: removal is, and stands beside them. A head with a direct"
                " effect writes the words; one with an effect of removal and no direct one works through what reads it.",
                *missing,
            ),
            tables=tables.statistics_tables(result),
        )
    ]


def _removing(result: StudyResult) -> list[Section]:
    if result.removal is None:
        return []
    return [
        Section(
            "removing",
            "What removing the heads does",
            (
                "The found heads were zeroed together on requests that did not choose them, beside random sets with as many heads"
                " in each layer. Heads of refusal change refusal on harmful requests and little else: not reasoning, and not the"
                " prediction of neutral text (kl).",
                "Then they were edited under given chains of thought. If block or move brings refusal back, and the same on random"
                " heads does not, attention to the chain keeps these heads from their work; what filler shows as well is not about"
                " what the chain says.",
            ),
            figures=[
                Figure(
                    "removal",
                    plots.removal_beside_random(result.removal),
                    "In each condition the coloured marks (the found heads removed) should leave the grey bars (random heads of the"
                    " same layers) on harmful requests, and stay in them on twins, reasoning and neutral text. Whiskers: 95 %"
                    " intervals over families.",
                    "That only these heads do it. Where few random sets stand beside a mark (replies are written for a few), it is set"
                    " apart from nothing.",
                ),
                *(
                    []
                    if result.restored is None
                    else [
                        Figure(
                            "restored",
                            plots.restored_refusal(result.restored),
                            "Left: 1 is all that the chain took. Vermillion above the grey bar says that the score rises; green,"
                            " harmful minus twin, that it is refusal which comes back. Right: where blue (twins) rises as far as"
                            " vermillion, the edit raises every score.",
                            "That attention would move so by itself. A share is drawn only where a loss is shown.",
                        )
                    ]
                ),
            ],
            tables=[
                tables.removal_table(result.removal),
                *([] if result.restored is None else [tables.restored_table(result.restored)]),
            ],
        )
    ]


def _comparing(result: StudyResult) -> list[Section]:
    if not result.compared:
        return []
    return [
        Section(
            "comparing",
            "Heads after tuning",
            (
                "The same requests, the heads tested in the base and those that each tuned model's own select side chose. A changed"
                " effect does not say why it changed.",
            ),
            figures=[
                Figure(
                    f"compared_heads_{place}",
                    plots.compared_heads(result, name),
                    f"Heads on the dotted line do in {visible(name)} what they do in the base. Near the horizontal 0: an effect that"
                    " is gone. Look at the note of the table first: where the tuned model refuses less, every effect comes nearer"
                    " to 0.",
                    "Why an effect changed, or whether what a head reads is still the same. Verdicts change where an effect lies at"
                    " the border of the rule.",
                )
                for place, name in enumerate(result.compared)
            ],
            tables=[tables.compared_table(name, one) for name, one in result.compared.items()],
        )
    ]


def _probes(result: StudyResult) -> list[Section]:
    if "probes" not in result.parts:
        return []
    harmful, refusal, without = result.probes(), result.probes("refusal"), result.probes_without_heads
    apart = "That the model reads the direction there, or that separation means refusal: look at the ablations in the table."
    figures = [
        Figure(
            f"probes_{name}",
            plots.probe_curves(probes),
            f"The probe score: the share of {classes} requests above the threshold, by layer and place. Curves far apart: the two can"
            " be told apart there. Diamonds: directions that were ablated, filled where that lowers refusal, and not as much on twins.",
            apart,
        )
        for name, probes, classes in (
            ("harmful", harmful, "harmful and of harmless"),
            ("refusal", refusal, "refused and of fulfilled"),
        )
        if probes.probes
    ]
    if without is not None and (without.table["state"] == "measured").any():
        figures.append(
            Figure(
                "probes_without_heads",
                plots.probes_without_heads(without),
                "The vermillion line (the found heads removed) should leave the grey band (as many random heads of the same"
                " layers removed) before the heads can be said to feed the probe.",
                "What the model then answers.",
            )
        )
    if result.cliffs:
        figures.append(
            Figure(
                "cliff",
                plots.refusal_cliff(result.cliffs),
                "The probe of thinking off, along given chains of thought to their end. A fall where the block closes that filler"
                " shows as well is not about what the chain says.",
                "That refusal follows the margin: a direction may mean something else at another place.",
            )
        )
    return [
        Section(
            "probes",
            "What probes read",
            (
                "Differences of means between two classes at a layer and place, trained on the select side and held against the"
                " evaluate side; threshold: the midpoint of the class means (arXiv 2509.00544, section 3). Telling harmful from"
                " harmless requests apart is possible in nearly every model, also in one that never refuses.",
            ),
            figures,
            [
                tables.probe_table(harmful),
                tables.probe_table(refusal),
                *([tables.without_heads_table(without)] if without is not None else []),
                *([tables.cliff_table(result.cliffs)] if result.cliffs else []),
            ],
        )
    ]


def _neurons(result: StudyResult) -> list[Section]:
    if result.neurons is None:
        return []
    if not numbers.tuned_written(result):
        return neuron_sections(result.neurons)
    return [
        *neuron_sections(result.neurons),
        Section(
            "tuned_outcomes",
            "What tuned models write",
            figures=[
                Figure(
                    "tuned_outcomes",
                    plots.tuned_outcomes(result),
                    "Blue: refused with thinking off, by the base and by each tuned model. Grey replies are neither refusal"
                    " nor compliance.",
                    "Whether twins are spared: what the models write to these stands in the verdict and in the table of outcomes.",
                )
            ],
        ),
    ]


def _methods(result: StudyResult, measured: bool) -> Section:
    settings = result.design["settings"]
    gate = (
        "Gate. On the select side, with thinking off (an empty think block, closed), the model must refuse at least"
        f" {settings['min_refusal']:.2f} of harmful requests, and their twins at most {settings['max_twin_ratio']:.2f} times as often."
        " Greedy decoding, judged by the opening words: refuse, comply, or other (neither). Intervals: Wilson, 95 %."
    )
    rest = (
        "Conditions. off: an empty think block, closed. careful: a worked CoT put into the block, closed. filler:"
        " meaningless text of the same token length. unrelated: a sound CoT of another task, same length. open: the model"
        " writes its own CoT. In all but open the next token is the answer's. Others: see rim_lens.chat.conditions.",
        "Outcomes. Greedy decoding, judged by the opening words of the answer, or of the CoT where there is no answer:"
        " refuse, comply, or other (neither).",
        "Refusal score. Log-odds, in nats, of a refusing first word: log-sum-exp of the logits of refusal openers minus"
        " that of all other tokens, at the first token that is not whitespace.",
        f"Heads. Greedy search by ablation on the select side, at most {settings['max_heads']} heads, then pruned. Effect ="
        " edited − baseline. Specificity = effect on harmful requests − effect on their twins. What each verdict means stands"
        " in the table of verdicts.",
        "Tests. Signs of paired differences flipped by request family, corrected by the largest statistic. Intervals at"
        " 95 %: bootstrap over families; Wilson for shares. Random sets match the number of heads or neurons in each layer.",
        "Neurons. Of each pair of request and twin on the select side, the neurons whose activation (mlp.hook_post, maximum over"
        " tokens, request and answer) rises most; of these, those that half of the pairs share. RAS: mean over prompts first; a neuron"
        " whose activation is not positive in either model is left out of that side's sum and counted (arXiv 2509.00544, section 4).",
    )
    return Section(
        "methods",
        "Methods, parameters, versions",
        (gate, *rest) if measured else (gate,),
        tables=[tables.parameter_table(result)],
    )


def _reproduce(result: StudyResult) -> Section:
    line = reproduce.command(result)
    code = tuple(
        (language, "\n".join(visible(part) for part in text.split("\n")))
        for language, text in (("shell", line), ("Python", reproduce.python(result)))
        if text
    )
    said = "The same folder goes on where a run was stopped; an empty one measures everything anew." + (
        ""
        if line
        else " The model or its settings were given in Python, so that no command line says the same."
    )
    return Section(
        "reproduce",
        "How to reproduce",
        (
            said,
            "If requests of your own were given, give them again: the digest of the requests above must come out the"
            " same, as must that of the weights.",
        ),
        code=code,
    )


# --- the page ----------------------------------------------------------------------------------------


# --- for machines ------------------------------------------------------------------------------------


def _json(result: StudyResult, said: list[Finding], sections: list[Section]) -> str:
    measured: dict[str, Any] = {}
    if len(said) > 1:
        measured = {
            "outcomes": numbers.outcome_shares(result).to_dict(orient="records"),
            "scores": numbers.score_means(result).to_dict(orient="records"),
            "contrasts": {
                kind: {
                    measure: numbers.contrasts(result, measure, kind).to_dict(orient="records")
                    for measure in ("refused", "score")
                }
                for kind in numbers.KINDS
            },
            "heads": result.heads.to_dict(),
            **(
                {"removal": result.removal.table.to_dict(orient="records")}
                if result.removal is not None
                else {}
            ),
            **(
                {"restored": result.restored.to_dict(orient="records")} if result.restored is not None else {}
            ),
            **(
                {
                    "compared": {
                        name: {
                            "heads": one.table.to_dict(orient="records"),
                            "baseline": one.baseline,
                            "correlation": one.correlation,
                        }
                        for name, one in result.compared.items()
                    }
                }
                if result.compared
                else {}
            ),
            **(
                {
                    "probes": {
                        contrast: probes.table.to_dict(orient="records")
                        for contrast, probes in (
                            ("harmful", result.probes()),
                            ("refusal", result.probes("refusal")),
                        )
                    },
                    "probes_without_heads": None
                    if result.probes_without_heads is None
                    else result.probes_without_heads.table.to_dict(orient="records"),
                    "cliff": [
                        {"kind": kind, "condition": condition, **one.drop.to_dict(orient="records")[0]}
                        for (kind, condition), one in result.cliffs.items()
                    ],
                }
                if "probes" in result.parts
                else {}
            ),
            **({"neurons": neuron_measures(result.neurons)} if result.neurons is not None else {}),
        }
    gate = {key: value for key, value in result.gate.items() if key != "outcomes"}
    whole = {
        "format_version": FORMAT_VERSION,
        "question": verdict.question(result),
        "verdict": [finding.to_dict() for finding in said],
        "caveats": list(_limits(result)),
        "gate": gate,
        **measured,
        "design": result.design,
        "plan": numbers.plan_of(result),
        "timings": result.timings,
        "reproduce": {"command": reproduce.command(result), "python": reproduce.python(result)},
        "files": [{"path": name, "bytes": n_bytes} for name, n_bytes in numbers.files_of(result)],
        "sections": [section.key for section in sections],
        "written": now(),
    }
    return json.dumps(finite(whole), indent=1, allow_nan=False) + "\n"
