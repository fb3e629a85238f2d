"""How to run a study again: the command, and the same in Python."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rim_lens.study.stages import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rim_lens.study import StudyResult

# Settings that the command line can give; others need Python.
OPTIONS = ("max_new_tokens", "gate")
OF_HEADS = ("conditions", "n_test")  # and these, in rim-lens heads


def command(result: StudyResult) -> str | None:
    """The shell command that runs this study again, or None where only Python can (own model, requests or setting)."""
    design = result.design
    parts = tuple(result.asked["parts"])
    own = "neurons" not in parts
    options = (*OPTIONS, *(OF_HEADS if own else ()))
    if "given" in (*result.asked["tuned"].values(), *design["requests"].values()) or set(
        _changed(design)
    ) - set(options):
        return None
    study = {"heads", "probes", "neurons"}
    if not by_name(design) or (not own and not set(parts) <= study):
        return None
    words = ["rim-lens", "heads" if own else "study", design["model"], "--out", "FOLDER"]
    if design["n_requests"] is not None:
        words += ["--requests", str(design["n_requests"])]
    for source in result.asked["tuned"].values():
        words += ["--tuned", source]
    if own:
        words += ["--think", ",".join(result.conditions), "--n-test", str(design["settings"]["n_test"])]
    if own and "statistics" not in parts:
        words.append("--no-statistics")
    if own and "removing" not in parts:
        words.append("--no-removing")
    if ("probes" in parts) != own:
        words.append("--probes" if "probes" in parts else "--no-probes")
    words += ["--max-new-tokens", str(design["settings"]["max_new_tokens"])]
    facts = design["facts"]
    if facts["device"] != "cpu":
        words += ["--device", facts["device"]]
    if facts["dtype"] != "torch.float32":
        words += ["--dtype", facts["dtype"].removeprefix("torch.")]
    if not design["settings"]["gate"]:
        words.append("--no-gate")
    return shlex.join(words)


def python(result: StudyResult) -> str:
    """The same in Python, with every setting that is not the default."""
    design = result.design
    model = repr(design["model"]) if by_name(design) else "model"
    tuned = {
        name: repr(source) if source != "given" else f"tuned_model_{place}"
        for place, (name, source) in enumerate(result.asked["tuned"].items())
    }
    arguments = [model]
    if tuned:
        arguments.append(f"tuned={{{', '.join(f'{name!r}: {source}' for name, source in tuned.items())}}}")
    arguments += [f"{kind}={kind}" for kind, source in design["requests"].items() if source == "given"]
    if design["n_requests"] is not None:
        arguments.append(f"n_requests={design['n_requests']}")
    parts = tuple(result.asked["parts"])
    if parts != ("heads", "neurons"):
        arguments.append(f"parts={parts!r}")
    if model != "model":
        facts = design["facts"]
        arguments += [f"device={facts['device']!r}"] if facts["device"] != "cpu" else []
        arguments += [f"dtype={facts['dtype']}"] if facts["dtype"] != "torch.float32" else []
    changed = _changed(design)
    if changed:
        arguments.append(
            f"settings=rl.Settings({', '.join(f'{key}={value!r}' for key, value in changed.items())})"
        )
    needs = ["import torch", ""] if any("=torch." in argument for argument in arguments) else []
    lines = [*needs, "import rim_lens as rl", "", f"study = rl.Study({', '.join(arguments)})"]
    lines += ["print(study.plan())", 'result = study.run("FOLDER")']
    return "\n".join(lines)


def _changed(design: Mapping[str, Any]) -> dict[str, Any]:
    defaults = Settings()
    asked = {
        key: tuple(value) if isinstance(value, list) else value for key, value in design["settings"].items()
    }
    return {key: value for key, value in asked.items() if value != getattr(defaults, key, value)}


def by_name(design: Mapping[str, Any]) -> bool:
    """Whether the recorded model is something `load_model` takes, not the name of a given one, which may have been changed."""
    from pathlib import Path

    import rim_lens.organisms  # noqa: F401 - registers its names
    from rim_lens.lens.loading import known_sources

    model = str(design["model"])
    known = model.partition(":")[0] in known_sources() or "/" in model or Path(model).exists()
    return known and not design.get("given", False)
