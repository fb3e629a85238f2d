"""The report of a study of neurons: what it says agrees with what was measured, and nothing in it runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import rim_lens as rl
from rim_lens import views
from rim_lens.organisms.planted import planted_truth
from rim_lens.study.neuron_results import PARTS
from rim_lens.views.neuron_report import neuron_command, neuron_python
from rim_lens.views.neuron_words import neuron_findings
from tests.views.browser import HOSTILE, harmless

SETTINGS = rl.NeuronSettings(m=8, scope="model", min_fraction=1.0, n_random_sets=20, max_new_tokens=6)
EVIL = "<img onerror=x>"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> rl.NeuronStudyResult:
    study = rl.NeuronStudy(
        "planted", tuned={EVIL: "planted:1"}, n_requests=12, settings=SETTINGS, parts=PARTS
    )
    return study.run(tmp_path_factory.mktemp("neurons"))


def said_of(result: rl.NeuronStudyResult, topic: str) -> views.Finding:
    (found,) = (one for one in neuron_findings(result) if one.topic.startswith(topic))
    return found


def test_what_is_planted_is_said_to_be_shown(result):
    removed = said_of(result, "Refusal without these neurons, off")
    assert removed.status == "shown"
    effect = result.neurons.effects.row("score", "harmful", "off")
    assert f"{effect['change']:.2f}".replace("-", "−") in removed.text
    assert said_of(result, "How many neurons it takes").status == "shown"
    assert "0 of 8 neurons are logit writers" in said_of(result, "Writers").text
    # Another seed's noise moved nothing that was chosen: there is no RAS of neurons that are silent.
    assert said_of(result, "RAS after tuning").status in ("cannot tell", "not shown")
    assert said_of(result, "Refusal restored").status == "not shown"


def test_a_set_that_does_nothing_is_not_said_to_be_about_refusal(tmp_path):
    settings = rl.NeuronSettings(m=30, n_random_sets=20, written=False, max_new_tokens=6)
    found = rl.NeuronStudy("toy", n_requests=24, settings=settings, parts=["dose"]).run(tmp_path)
    verdict = found.neurons.effects.verdict
    status = said_of(found, "Refusal without these neurons, off").status
    assert (status == "shown") == (verdict == "refusal")
    assert f"(verdict: {verdict})" in said_of(found, "Refusal without these neurons, off").text


def test_the_page_markdown_and_json_say_the_same(result):
    page = rl.write_neuron_report(result)
    html, markdown = page.read_text(), page.with_suffix(".md").read_text()
    read = json.loads(page.with_suffix(".json").read_text())
    for finding in neuron_findings(result):
        assert finding.topic.split("<")[0].strip() in html
    assert EVIL not in html
    for layer, neuron in planted_truth().neurons:
        assert f"| L{layer}N{neuron} |" in markdown
    assert [(row["layer"], row["neuron"]) for row in read["neurons"]] == list(planted_truth().neurons)
    assert read["verdict_of_set"] == "refusal"
    effects = result.neurons.effects.table
    assert np.allclose(
        [row["change"] for row in read["effects"]], effects["change"].to_numpy(), equal_nan=True
    )
    assert {"chosen", "removed", "methods", "reproduce"} <= set(read["sections"])
    assert "sandbox" in result._repr_html_()


@pytest.mark.chromium
def test_the_page_opens_offline_and_runs_nothing_of_what_it_shows(result, browser, tmp_path):
    named = replace(result, design={**result.design, "model": " ".join(HOSTILE)})
    harmless(browser, rl.write_neuron_report(named, tmp_path / "report.html"), [" ".join(HOSTILE), EVIL])
    drawn = "return [...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('svg.main-svg').length)"
    assert all(browser.execute_script(drawn))


def test_how_to_run_it_again_is_what_was_run(result, tmp_path):
    assert neuron_command(result) is None  # a scope and sets that only Python can say
    code = neuron_python(result).replace("FOLDER", str(tmp_path / "again"))
    scope: dict[str, object] = {}
    exec(code, scope)  # noqa: S102 - what the report tells its reader to run
    again = scope["result"]
    assert again.neurons == result.neurons
    assert again.neurons.effects.to_dict() == result.neurons.effects.to_dict()
    plain = rl.NeuronStudy(
        "toy", n_requests=8, settings=rl.NeuronSettings(m=3, max_new_tokens=6), parts=PARTS[:-1]
    )
    words = neuron_command(plain.run(tmp_path / "plain"))
    assert words == "rim-lens neurons toy --requests 8 --m 3 --max-new-tokens 6"


def test_the_terminal_shows_the_neurons_and_the_verdict(result):
    console = Console(record=True, width=120)
    views.print_neurons(result, console)
    text = console.export_text()
    assert "Refusal without these neurons, off" in text
    for layer, neuron in planted_truth().neurons:
        assert f"L{layer}N{neuron}" in text
