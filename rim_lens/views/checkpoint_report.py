"""The report of a study of checkpoints: one self-contained page, and the same for machines as Markdown and JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.study.checkpoint_settings import CheckpointSettings
from rim_lens.study.runs import Recipe
from rim_lens.views import checkpoint_tables, numbers, plots, tables
from rim_lens.views.checkpoint_words import LIMITS, checkpoint_findings, checkpoint_question
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
    from rim_lens.study import CheckpointStudyResult
    from rim_lens.views.finding import Finding

FORMAT_VERSION = 1
# What `rim-lens compare` can give; others need Python.
OPTIONS = {
    "m": "--m",
    "n_random_sets": "--random-sets",
    "max_new_tokens": "--max-new-tokens",
    "max_cot_tokens": "--max-cot-tokens",
    "seed": "--seed",
}
DRAWN = (
    *("ras", "ras_random", "ras_all", "arithmetic", "geometric", "safety_drop", "reasoning_rise"),
    *("kl", "weight_drift", "whitened_cosine_shift"),
)
DRAWN_FEW = ("ras", "ras_random", "kl", "weight_drift")


def write_checkpoint_report(result: CheckpointStudyResult, path: str | Path | None = None) -> Path:
    """Write the report of a study of checkpoints: ``report.html``, and beside it ``report.md`` and ``report.json``.

    Args:
        result: A study that came to its end, stopped at its gate, or as far as it came, which the report says.
        path: Of the page; ``report.html`` in the study's folder when None. The other two take its name.

    Returns:
        The path of the page. It opens offline in any browser.

    Raises:
        StudyFolderError: A file of the folder is corrupt.
    """
    target = Path(path) if path is not None else result.path / "report.html"
    said = checkpoint_findings(result)
    sections = _sections(result)
    page = Page(
        "compare",
        result.design["model"],
        checkpoint_question(result),
        said,
        sections,
        result.design["versions"]["rim_lens"],
    )
    write_text(target, page_html(page))
    write_text(target.with_suffix(".md"), page_markdown(page))
    write_text(target.with_suffix(".json"), _json(result, said, sections))
    return target


def checkpoint_study_html(result: CheckpointStudyResult) -> str:
    """A small summary for a notebook: the verdict and what each run lost, in a frame that can run nothing."""
    shown = [checkpoint_tables.ends_table(result)] if _there(result) else []
    return frame(
        "compare", result.design["model"], checkpoint_question(result), checkpoint_findings(result), shown
    )


def checkpoint_command(result: CheckpointStudyResult) -> str | None:
    """The shell command that runs this study again, or None where only Python can (own model, requests or setting)."""
    design, changed = result.design, _changed(result.design["settings"])
    sources = {str(run["source"]) for run in design["runs"].values()}
    several = any(", " in source for source in sources)
    if "given" in {*design["requests"].values(), *sources} or several or not by_name(design):
        return None
    if set(changed) - {*OPTIONS, "gate"} or not _usual_recipe(design):
        return None
    words = ["rim-lens", "compare", design["model"]]
    if design["train"]:
        words += ["--train", ",".join(design["train"]), "--seeds", ",".join(map(str, design["train_seeds"]))]
        words += ["--steps", str(design["training"]["config"]["steps"])]
        words += ["--checkpoints", str(design["training"]["n_checkpoints"])]
        if design["training"]["toy"]:
            words += [f"--operator={design['training']['operator']}"]
    else:
        words += [f"{run}={one['source']}" for run, one in design["runs"].items()]
        words += ["--control", design["control"]] if design["control"] else []
    if design["n_requests"] is not None:
        words += ["--requests", str(design["n_requests"])]
    for name, option in OPTIONS.items():
        if name in changed:
            words += [option, str(changed[name])]
    words += [] if design["settings"]["gate"] else ["--no-gate"]
    facts = design["facts"]
    words += ["--device", facts["device"]] if facts["device"] != "cpu" else []
    words += ["--dtype", facts["dtype"].removeprefix("torch.")] if facts["dtype"] != "torch.float32" else []
    return shlex.join([*words, "--out", "FOLDER"])


def checkpoint_python(result: CheckpointStudyResult) -> str:
    """The same in Python, with every setting that is not the default."""
    design = result.design
    named = by_name(design)
    arguments = [repr(design["model"]) if named else "model"]
    if design["train"]:
        training = design["training"]
        arguments += [f"train={design['train']!r}", f"train_seeds={design['train_seeds']!r}"]
        arguments += [f"steps={training['config']['steps']}", f"n_checkpoints={training['n_checkpoints']}"]
        arguments += [f"operator={training['operator']!r}"] if training["toy"] else []
        if not _usual_recipe(design):
            told = ", ".join(
                f"{key}={tuple(value) if isinstance(value, list) else value!r}"
                for key, value in training["config"].items()
            )
            arguments.append(f"config=TrainConfig({told})")
    else:
        runs = ", ".join(
            f"{run!r}: {[part if part == 'given' else repr(part) for part in one['source'].split(', ')]}".replace(
                '"', ""
            )
            for run, one in design["runs"].items()
        )
        arguments.append(f"checkpoints={{{runs}}}")
        arguments += [f"control={design['control']!r}"] if design["control"] else []
    arguments += [f"{kind}={kind}" for kind, source in design["requests"].items() if source == "given"]
    if design["n_requests"] is not None:
        arguments.append(f"n_requests={design['n_requests']}")
    facts = design["facts"]
    if named:
        arguments += [f"device={facts['device']!r}"] if facts["device"] != "cpu" else []
        arguments += [f"dtype={facts['dtype']}"] if facts["dtype"] != "torch.float32" else []
    changed = _changed(design["settings"])
    if changed:
        told = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        arguments.append(f"settings=rl.CheckpointSettings({told})")
    needs = ["import torch", ""] if any("=torch." in argument for argument in arguments) else []
    lines = [*needs, "import rim_lens as rl"]
    lines += (
        ["from rim_lens.training import TrainConfig"]
        if any("TrainConfig" in one for one in arguments)
        else []
    )
    lines += ["", f"study = rl.CheckpointStudy({', '.join(arguments)})"]
    return "\n".join([*lines, "print(study.plan())", 'result = study.run("FOLDER")'])


def _usual_recipe(design: dict[str, Any]) -> bool:
    """Whether training stepped as it does where nothing but the number of steps is asked for."""
    from dataclasses import asdict

    training = design["training"]
    if training is None:
        return True
    usual = Recipe.of(training["toy"], training["config"]["steps"], None, training["operator"])
    return bool(json.loads(json.dumps(asdict(usual)))["config"] == training["config"])


def _changed(asked: dict[str, Any]) -> dict[str, Any]:
    defaults = {one.name: getattr(CheckpointSettings(), one.name) for one in fields(CheckpointSettings)}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
    return {key: value for key, value in told.items() if value != defaults.get(key, value)}


def _there(result: CheckpointStudyResult) -> bool:
    return not result.stopped and not result.missing


# --- what it holds -----------------------------------------------------------------------------------


def _sections(result: CheckpointStudyResult) -> list[Section]:
    gate = Section("gate", "The gate", tables=[tables.gate_table(result)])
    measured: list[Section] = []
    if _there(result):
        measured = [
            _course(result),
            _drift(result),
            _entangled(result),
            _followed(result),
            _foretold(result),
            Section("limits", "What none of this shows", LIMITS),
        ]
    return [gate, *measured, _methods(result), _reproduce(result), _files(result)]


def _course(result: CheckpointStudyResult) -> Section:
    return Section(
        "course",
        "What training does on the way",
        (
            "Harmful requests, their harmless twins and reasoning questions of the evaluate side, which neither chose the neurons nor"
            " were trained on.",
        ),
        [
            Figure(
                "course",
                plots.training_course(result.studied, result.runs),
                "The top panel falling while the second stays at the bottom is refusal lost, and not the refusing of everything."
                " Read it beside the third: a model that forgets sums as well is worn, not misaligned.",
                "Why refusal falls, or whether what is answered instead helps anyone.",
            )
        ],
        [checkpoint_tables.ends_table(result), checkpoint_tables.checkpoints_table(result)],
    )


def _drift(result: CheckpointStudyResult) -> Section:
    shown = [checkpoint_tables.beyond_table(result), checkpoint_tables.matched_table(result)]
    return Section(
        "drift",
        "Beside plain drift",
        (
            "Any training moves weights, and moved weights lose refusal. A kind of chain does something of its own only where it loses"
            " more than the control does at the same distance from the base. A control that did not come so far was trained on for"
            " the purpose (dashed).",
        ),
        [
            Figure(
                "drift",
                plots.lost_by_drift(result.comparison, result.runs),
                "Curves of a kind above those of the control at the same place of the horizontal axis.",
                "That distance is all that the two share: steps, rows and losses differ.",
            )
        ],
        shown if len(result.drift_matched) else [],
    )


def _entangled(result: CheckpointStudyResult) -> Section:
    found = result.neurons
    figures, shown = [], []
    if found is not None and len(found):
        figures.append(
            Figure(
                "random",
                plots.ras_beside_random(result.studied),
                "The diamonds should leave the grey band before RAS says anything of the chosen neurons.",
                "The test: p stands in the table, among sets chosen by the same pairs with labels exchanged.",
            )
        )
        shown = [checkpoint_tables.ras_table(result), checkpoint_tables.neurons_table(found)]
    return Section(
        "entangled",
        "Entanglement, beside random neurons",
        (
            "RAS is the harmonic mean of how far neurons fall on harmful requests (δ⁻) and rise on reasoning questions (δ⁺), from the"
            " base to a checkpoint (arXiv 2509.00544, section 4). It grows with any drift."
            if shown
            else "No neuron was chosen: RAS is of all neurons, and stands in the table of checkpoints.",
        ),
        figures,
        shown,
    )


def _followed(result: CheckpointStudyResult) -> Section:
    figures = []
    for outcome, title, drawn in (
        ("lost", "nats of refusal score", DRAWN),
        ("lost_rate", "the share of requests refused", DRAWN_FEW),
    ):
        figures.append(
            Figure(
                f"metrics_{outcome}",
                plots.metrics_against_loss(
                    result.studied, result.correlations, drawn, result.runs, outcome=outcome
                ),
                f"Lost refusal in {title}, one point a checkpoint. A metric of its own worth has a higher r than weight drift and random"
                " sets, and one that holds across runs and not only along each.",
                "A cause. All points of a run share its steps, so that n points are far fewer observations.",
            )
        )
    return Section(
        "followed",
        "Metrics against lost refusal",
        (
            "Pooled: all checkpoints as if each stood by itself. Within runs: each run's own mean taken off. Across: one point a run. p"
            " comes from exchanging whole runs' courses of lost refusal, which keeps what all runs share; runs of different kinds change"
            " places too, so that it includes differences between kinds. p within kinds exchanges seeds, each with its run of every kind.",
        ),
        figures,
        [checkpoint_tables.metrics_table(result), checkpoint_tables.metrics_table(result, "lost_rate")],
    )


def _foretold(result: CheckpointStudyResult) -> Section:
    shown = [checkpoint_tables.forecast_table(result)] if len(result.forecast) else []
    if result.gradients is not None:
        shown.append(checkpoint_tables.gradients_table(result.gradients))
    return Section(
        "forecast",
        "Foretold",
        (
            "A line is fitted on the other runs, from a metric's mean over the first checkpoints (or a number known before training) to"
            " the last checkpoint's loss.",
        ),
        tables=shown,
    )


def _methods(result: CheckpointStudyResult) -> Section:
    settings, training = result.design["settings"], result.design["training"]
    gate = (
        "Gate. On the select side, with thinking off, the base must refuse at least"
        f" {settings['min_refusal']:.2f} of harmful requests, and their twins at most {settings['max_twin_ratio']:.2f} times as often."
        " Greedy decoding, judged by the opening words."
    )
    how = (
        "Runs were given."
        if training is None
        else f"Training. Harmless problems with chains of thought only, loss on what the model writes itself; {training['rows_per_step']}"
        f" rows a step, {'all weights' if training['lora'] is None else 'LoRA of rank ' + str(training['lora']['rank'])}, AdamW."
        " Kinds of one seed see the same problems. The control of a seed goes on until its weight drift is that of the others, at"
        " most three times the steps."
    )
    rest = (
        how,
        f"Neurons. Chosen in the base on the select side: of each pair ({settings['pairs']}), the {settings['m']} neurons of each layer whose"
        f" pooled activation rises most; those that {settings['min_fraction']:.2f} of the pairs share. p of RAS: a rank among sets that the same"
        " pairs choose with labels exchanged by family.",
        "Refusal score. Log-odds, in nats, of a refusing first word. Lost: base − checkpoint. Written answers: greedy, judged by the"
        " opening words. Weight drift: ‖W − W₀‖ / ‖W₀‖ over all weights. KL: base ‖ checkpoint on reasoning questions.",
    )
    return Section(
        "methods",
        "Methods, parameters, versions",
        (gate, *rest) if not result.stopped else (gate,),
        tables=[tables.parameter_table(result)],
    )


def _reproduce(result: CheckpointStudyResult) -> Section:
    line = checkpoint_command(result)
    said = "The same folder goes on where a run was stopped; an empty one measures everything anew." + (
        ""
        if line
        else " The base, runs or settings were given in Python, so that no command line says the same."
    )
    code = tuple(
        (language, "\n".join(visible(part) for part in text.split("\n")))
        for language, text in (("shell", line), ("Python", checkpoint_python(result)))
        if text
    )
    return Section("reproduce", "How to reproduce", (said,), code=code)


def _files(result: CheckpointStudyResult) -> Section:
    return Section("files", "Time and files", tables=[tables.time_table(result), tables.file_table(result)])


def _json(result: CheckpointStudyResult, said: list[Finding], sections: list[Section]) -> str:
    measured: dict[str, Any] = {}
    if _there(result):
        measured = {
            "checkpoints": result.comparison.table.to_dict(orient="records"),
            **{
                name: getattr(result, name).to_dict(orient="records")
                for name in ("ends", "correlations", "drift_matched", "beyond_drift", "forecast")
            },
            "gradients": None if result.gradients is None else result.gradients.to_dict(orient="records"),
            "neurons": [list(pair) for pair in (result.neurons or ())],
        }
    whole = {
        "format_version": FORMAT_VERSION,
        "question": checkpoint_question(result),
        "verdict": [finding.to_dict() for finding in said],
        "caveats": list(LIMITS),
        "gate": {key: value for key, value in result.gate.items() if key != "outcomes"},
        "missing": list(result.missing),
        **measured,
        "design": result.design,
        "plan": numbers.plan_of(result),
        "timings": result.timings,
        "reproduce": {"command": checkpoint_command(result), "python": checkpoint_python(result)},
        "files": [{"path": name, "bytes": n_bytes} for name, n_bytes in numbers.files_of(result)],
        "sections": [section.key for section in sections],
        "written": now(),
    }
    return json.dumps(finite(whole), indent=1, allow_nan=False) + "\n"
