"""The report of a study of neurons: one self-contained page, and the same for machines as Markdown and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.study.neuron_results import PARTS
from rim_lens.study.neurons import NeuronSettings
from rim_lens.views import neuron_tables, numbers, plots, tables
from rim_lens.views.neuron_words import LIMITS, neuron_findings, neuron_question
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
from rim_lens.views.reproduce import by_name
from rim_lens.views.text import visible

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.study import NeuronStudyResult
    from rim_lens.views.finding import Finding

FORMAT_VERSION = 1
# What `rim-lens neurons` can give; others need Python.
OPTIONS = {
    "pairs": "--pairs",
    "m": "--m",
    "min_fraction": "--min-fraction",
    "n_random_sets": "--random-sets",
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
}


def write_neuron_report(result: NeuronStudyResult, path: str | Path | None = None) -> Path:
    """Write the report of a study of neurons: ``report.html``, and beside it ``report.md`` and ``report.json``.

    Args:
        result: A study that came to its end, stopped at its gate, or as far as it came, which the report says.
        path: Of the page; ``report.html`` in the study's folder when None. The other two take its name.

    Returns:
        The path of the page. It opens offline in any browser.

    Raises:
        StudyFolderError: A file of the folder is corrupt.
    """
    target = Path(path) if path is not None else result.path / "report.html"
    said = neuron_findings(result)
    sections = _sections(result)
    page = Page(
        "neurons",
        result.design["model"],
        neuron_question(result),
        said,
        sections,
        result.design["versions"]["rim_lens"],
    )
    write_text(target, page_html(page))
    write_text(target.with_suffix(".md"), page_markdown(page))
    write_text(target.with_suffix(".json"), _json(result, said, sections))
    return target


def neuron_study_html(result: NeuronStudyResult) -> str:
    """A small summary for a notebook: the verdict and the neurons, in a frame that can run nothing."""
    found = result.neurons
    shown = [] if found is None else [neuron_tables.set_table(found, result.writers)]
    return frame("neurons", result.design["model"], neuron_question(result), neuron_findings(result), shown)


def neuron_command(result: NeuronStudyResult) -> str | None:
    """The shell command that runs this study again, or None where only Python can (own model, requests or setting)."""
    design = result.design
    settings, changed = design["settings"], _changed(design["settings"])
    given = {*result.asked["tuned"].values(), *design["requests"].values()}
    if "given" in given or set(changed) - {*OPTIONS, "gate"} or not by_name(design):
        return None
    words = ["rim-lens", "neurons", design["model"]]
    for source in result.asked["tuned"].values():
        words += ["--tuned", source]
    if design["n_requests"] is not None:
        words += ["--requests", str(design["n_requests"])]
    for name, option in OPTIONS.items():
        if name in changed:
            words += [option, str(settings[name])]
    words += ["--multiverse"] if "multiverse" in result.parts else []
    words += [] if settings["gate"] else ["--no-gate"]
    facts = design["facts"]
    words += ["--device", facts["device"]] if facts["device"] != "cpu" else []
    words += ["--dtype", facts["dtype"].removeprefix("torch.")] if facts["dtype"] != "torch.float32" else []
    return shlex.join(words)


def neuron_python(result: NeuronStudyResult) -> str:
    """The same in Python, with every setting that is not the default."""
    design = result.design
    named = by_name(design)
    arguments = [repr(design["model"]) if named else "model"]
    if result.tuned:
        sources = (
            f"{name!r}: {source!r}" if source != "given" else f"{name!r}: tuned_model_{place}"
            for place, (name, source) in enumerate(result.asked["tuned"].items())
        )
        arguments.append(f"tuned={{{', '.join(sources)}}}")
    arguments += [f"{kind}={kind}" for kind, source in design["requests"].items() if source == "given"]
    if design["n_requests"] is not None:
        arguments.append(f"n_requests={design['n_requests']}")
    if result.parts != PARTS[:-1]:
        arguments.append(f"parts={result.parts!r}")
    facts = design["facts"]
    if named:
        arguments += [f"device={facts['device']!r}"] if facts["device"] != "cpu" else []
        arguments += [f"dtype={facts['dtype']}"] if facts["dtype"] != "torch.float32" else []
    changed = _changed(design["settings"])
    if changed:
        told = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        arguments.append(f"settings=rl.NeuronSettings({told})")
    needs = ["import torch", ""] if any("=torch." in argument for argument in arguments) else []
    lines = [*needs, "import rim_lens as rl", "", f"study = rl.NeuronStudy({', '.join(arguments)})"]
    return "\n".join([*lines, "print(study.plan())", 'result = study.run("FOLDER")'])


def _changed(asked: dict[str, Any]) -> dict[str, Any]:
    defaults = {one.name: getattr(NeuronSettings(), one.name) for one in fields(NeuronSettings)}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
    return {key: value for key, value in told.items() if value != defaults.get(key, value)}


# --- what it holds -----------------------------------------------------------------------------------


def _sections(result: NeuronStudyResult) -> list[Section]:
    measured = neuron_sections(result)
    if measured:
        measured.append(Section("limits", "What none of this shows", LIMITS))
    return [*measured, _methods(result), _reproduce(result), _files(result)]


def neuron_sections(result: NeuronStudyResult) -> list[Section]:
    """The set, what removing it does, and each tuned model; none where no set was looked for."""
    if result.neurons is None:
        return []
    return [
        _chosen(result),
        *_removed(result),
        *(section for name in result.tuned for section in _tuned(result, name)),
    ]


def _chosen(result: NeuronStudyResult) -> Section:
    found = result.neurons
    assert found is not None  # noqa: S101 - told to the type checker: sections of a set are of one that is there
    figures = _drawn(
        (
            "by_layer",
            lambda: plots.neurons_by_layer({"chosen": found}),
            "Where in the model the set sits. Neurons of the last layers write into the logits almost directly.",
            "That a layer with many neurons matters more: with a rule per layer, every layer gives some.",
        ),
        (
            "sweep",
            lambda: plots.neuron_sweep(_sweep(found.made_by), result.design["settings"]["m"]),
            "Solid lines: the size of the set over m. Dotted: by chance. Where the two come near, pairs do not agree.",
            "Which m is right: the paper states none.",
        ),
    )
    return Section(
        "chosen",
        "The neurons",
        (
            "Of each pair, the m neurons whose pooled activation rises most from the less refused form to the more refused one; of"
            " these, those that enough pairs share. Chosen on the select side, in the base model.",
        ),
        figures if len(found) else figures[1:],
        [
            *([neuron_tables.set_table(found, result.writers)] if len(found) else []),
            neuron_tables.sweep_table(found.made_by),
        ],
    )


def _sweep(made_by: dict[str, Any]) -> Any:
    import pandas as pd

    return pd.DataFrame(made_by["sweep"])


def _removed(result: NeuronStudyResult) -> list[Section]:
    found, dose, writers = result.neurons, result.dose, result.writers
    if found is None or found.effects is None:
        return []
    figures = []
    if dose is not None:
        figures += _drawn(
            (
                "dose",
                lambda: plots.dose_effects(dose),
                "Vermillion should leave the grey band, and blue stay near 0: then the first neurons are about refusal.",
                "The smallest set that carries refusal: the ranking was not chosen for the whole set's effect.",
            )
        )
    if writers is not None:
        figures += _drawn(
            (
                "writers",
                lambda: plots.direct_and_total(writers),
                "Marks on the dotted diagonal write the words of a refusal themselves; marks at height 0 work through what reads them.",
                "Sums: effects of single neurons do not add up to that of the set.",
            )
        )
    shown = [tables.removal_table(found.effects, "chosen neurons", "neurons")]
    shown += [] if dose is None else [neuron_tables.dose_table(dose)]
    return [
        Section(
            "removed",
            "What removing them does",
            (
                "The neurons were set to zero on requests that did not choose them, beside random sets with as many neurons in each"
                " layer. Neurons of refusal change it on harmful requests and little else: not on twins, not reasoning, and not the"
                " prediction of neutral text (kl; here reasoning questions of the select side).",
            ),
            figures,
            shown,
        )
    ]


def _tuned(result: NeuronStudyResult, name: str) -> list[Section]:
    found, restored, universes = (
        part.get(name) for part in (result.entanglement, result.restored, result.multiverse)
    )
    figures, shown = [], []
    if found is not None:
        figures += _drawn(
            (
                f"rivals_{name}",
                lambda: plots.entanglement_rivals(found),
                "The diamond right of the grey cloud: that metric is larger on the set than on random sets matched in activity.",
                "The test. p stands in the table, among sets chosen along a contrast for no reason.",
            )
        )
        shown.append(neuron_tables.entanglement_table(name, found))
    if restored is not None:
        shown.append(neuron_tables.neurons_restored_table(name, restored))
    if universes is not None:
        figures += _drawn(
            (
                f"universes_{name}",
                lambda: plots.specification_curve(universes),
                "How many universes lie below the dotted line, and whether the conclusion hangs on one choice.",
                "A test: the universes share prompts and models.",
            )
        )
        shown.append(neuron_tables.multiverse_table(name, universes))
    if not shown:
        return []
    return [
        Section(
            f"tuned_{name}",
            f"After tuning: {name}",
            (
                "RAS is large where tuning moved the same neurons down on harmful requests and up on reasoning prompts. It is no proof"
                " that these neurons lost the refusal: what putting their old activations back restores stands below it.",
            ),
            figures,
            shown,
        )
    ]


def _drawn(*wanted: tuple[str, Callable[[], go.Figure], str, str]) -> list[Figure]:
    """Figures of those that have something to draw."""
    drawn = []
    for key, draw, look, not_shown in wanted:
        try:
            drawn.append(Figure(key, draw(), look, not_shown))
        except ValueError:  # nothing to hold against, or nothing there: the table says why
            continue
    return drawn


def _methods(result: NeuronStudyResult) -> Section:
    settings = result.design["settings"]
    return Section(
        "methods",
        "Methods, parameters, versions",
        (
            f"Pairs. {'A harmless twin against its request' if settings['pairs'] == 'twins' else 'A request against the same with a sentence of malicious intent'},"
            " select side. Gate: the refusal score of the one side is higher (sign flips over families), at least half of it is"
            " refused, and more than of the other.",
            "Refusal score. Log-odds, in nats, of a refusing first word: log-sum-exp of the logits of refusal openers minus that of all"
            " other tokens, at the first token that is not whitespace. Activations: mlp.hook_post.",
            "Tests. Signs of paired differences flipped by request family, corrected over conditions (or sizes). Intervals: bootstrap"
            " over families, Wilson for shares, 95 %. Random sets have as many neurons in each layer.",
            "Verdict. refusal: harmful requests move (p ≤ .05), twins at least a quarter less (p ≤ .05), and by that difference the set"
            " stands out among random sets (p ≤ .05). What the others mean: see rim_lens.NeuronEffects.verdict_in.",
        ),
        tables=[tables.parameter_table(result)],
    )


def _reproduce(result: NeuronStudyResult) -> Section:
    line = neuron_command(result)
    code = tuple(
        (language, "\n".join(visible(part) for part in text.split("\n")))
        for language, text in (("shell", line), ("Python", neuron_python(result)))
        if text
    )
    if result.neurons is not None and len(result.neurons):
        look = 'view = rl.views.neuron_study_view(rl.load_neuron_study("FOLDER"))  # every neuron, to click through'
        code += (("Python", f'{look}\nrl.views.write_neuron_explorer(view, "neurons.html")'),)
    return Section(
        "reproduce",
        "How to reproduce",
        ("The same folder goes on where a run was stopped; an empty one measures everything anew.",),
        code=code,
    )


def _files(result: NeuronStudyResult) -> Section:
    return Section("files", "Time and files", tables=[tables.time_table(result), tables.file_table(result)])


def neuron_measures(result: NeuronStudyResult) -> dict[str, Any]:
    """The numbers of a study of neurons as plain data; none where no set was looked for."""
    found = result.neurons
    if found is None:
        return {}
    return {
        "neurons": found.to_dataframe().to_dict(orient="records"),
        "made_by": found.made_by,
        "effects": None if found.effects is None else found.effects.table.to_dict(orient="records"),
        "verdict_of_set": None if found.effects is None else found.effects.verdict,
        "dose": None if result.dose is None else result.dose.to_dict(orient="records"),
        "writers": None if result.writers is None else result.writers.to_dict(orient="records"),
        "entanglement": {
            name: one.table.to_dict(orient="records") for name, one in result.entanglement.items()
        },
        "restored": {name: one.to_dict(orient="records") for name, one in result.restored.items()},
        "multiverse": {name: one.to_dict(orient="records") for name, one in result.multiverse.items()},
    }


def _json(result: NeuronStudyResult, said: list[Finding], sections: list[Section]) -> str:
    whole = {
        "format_version": FORMAT_VERSION,
        "question": neuron_question(result),
        "verdict": [finding.to_dict() for finding in said],
        "caveats": list(LIMITS),
        "gate": result.gate,
        "missing": list(result.missing),
        **neuron_measures(result),
        "design": result.design,
        "plan": numbers.plan_of(result),
        "timings": result.timings,
        "reproduce": {"command": neuron_command(result), "python": neuron_python(result)},
        "files": [{"path": name, "bytes": n_bytes} for name, n_bytes in numbers.files_of(result)],
        "sections": [section.key for section in sections],
        "written": now(),
    }
    return json.dumps(finite(whole), indent=1, allow_nan=False) + "\n"
