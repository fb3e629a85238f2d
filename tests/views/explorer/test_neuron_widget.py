"""The neuron explorer's kernel: scores are those of the same editors, and ticking moves them in the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.organisms.planted import planted_truth
from rim_lens.views import NeuronExplorer
from rim_lens.views.explorer.page import module
from tests.views.explorer.kernel import Kernel


@pytest.fixture(scope="module")
def explorer() -> NeuronExplorer:
    base, tuned = rl.load_model("planted"), rl.load_model("planted:1")
    asked = [
        rl.load_prompts(kind, language="toy", split="evaluate")[:2]
        for kind in ("harmful", "harmless", "reasoning")
    ]
    chat = rl.ChatFormat.from_model(base)
    neurons = planted_truth().neurons
    return NeuronExplorer(base, chat, neurons, *asked, tuned=tuned, n_continued=4, n_read=2, n_random_sets=3)


def test_scores_are_those_of_the_same_editors_in_both_models(explorer: NeuronExplorer) -> None:
    neurons = list(planted_truth().neurons)
    steps = [
        {"operation": "ablate", "neurons": [list(one) for one in neurons[:5]], "factor": None},
        {"operation": "scale", "neurons": [list(neurons[5])], "factor": 0.5},
    ]
    told, _ = explorer.answer({"kind": "apply", "steps": steps, "prompt": 1})
    assert [one["name"] for one in told["conditions"]] == ["off", "careful", "off, tuned", "careful, tuned"]
    for one in told["conditions"]:
        model, batch = explorer.models[one["name"]], explorer.batches[one["name"]].select([1])
        with rl.AblateNeurons(neurons[:5]).on(model), rl.ScaleNeurons([neurons[5]], 0.5).on(model):
            expected = float(rl.refusal_score(model, batch)[0])
        assert one["score"] == pytest.approx(expected, abs=1e-5)
        assert one["baseline"] == pytest.approx(float(rl.refusal_score(model, batch)[0]), abs=1e-5)
    first = told["conditions"][0]
    assert first["score"] < first["baseline"] - 1  # they carry refusal: we put it there
    last = explorer.code().splitlines()[-1]
    scope = {"rl": rl, "model": explorer.models["off"], "batch": explorer.batches["off"]}
    again = eval(last, scope)  # noqa: S307
    assert float(again[1]) == pytest.approx(first["score"], abs=1e-5)
    table = explorer.scores
    assert table[table["condition"] == "off"]["score"].tolist() == pytest.approx(
        again.values.tolist(), abs=1e-5
    )
    assert explorer.undo().undo().edits == []
    with pytest.raises(rl.errors.UnknownNeuron):
        explorer.answer({"kind": "apply", "prompt": 0, "steps": [{**steps[0], "neurons": [[9, 9]]}]})
    with pytest.raises(rl.errors.CaptureError, match="'explode'"):
        explorer.answer({"kind": "explode"})


def test_tokens_fetched_are_the_cache_s(explorer: NeuronExplorer) -> None:
    told, buffers = explorer.answer({"kind": "tokens", "neuron": [1, 17]})
    assert [one["kind"] for one in told["prompts"]] == ["harmful"] * 2 + ["harmless"] * 2 + ["reasoning"] * 2
    for one in told["prompts"]:
        for role, source in enumerate(explorer.view.sources):
            batch = source.batches[one["kind"]]
            alone = batch.select([[prompt.id for prompt in batch.prompts].index(one["id"])])
            model = explorer.models["off" if role == 0 else "off, tuned"]
            _, cache = model.run_with_cache(alone.tokens, attention_mask=alone.attention_mask)
            values = np.frombuffer(buffers[one["values"][role]], "<f4")
            np.testing.assert_allclose(values, cache["blocks.1.mlp.hook_post"][0, :, 17].numpy(), atol=1e-5)


def test_the_widget_carries_the_module_and_the_numbers(explorer: NeuronExplorer) -> None:
    pytest.importorskip("anywidget")
    widget = explorer.widget
    assert widget._esm == module("neurons")
    assert widget.view == explorer.view.data
    assert len(widget.view["scored"]) == 2


@pytest.mark.chromium
def test_ticking_neurons_moves_the_score_to_python_s_value(
    explorer: NeuronExplorer, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    explorer.reset()
    kernel = Kernel(explorer, browser, tmp_path)
    kernel.wait_for(1)
    off = explorer.batches["off"].select([0])
    model = explorer.models["off"]
    assert kernel.scores()["off"] == pytest.approx(float(rl.refusal_score(model, off)[0]), rel=1e-5)
    neurons = list(planted_truth().neurons)

    def choose(layer: int, neuron: int) -> None:
        browser.execute_script(
            "const to = document.querySelector('[data-what=goto]'); to.value = arguments[0];"
            "to.dispatchEvent(new Event('change'))",
            f"L{layer}N{neuron}",
        )

    for one in neurons:
        choose(*one)
        browser.find_element(By.CSS_SELECTOR, "[data-what=tick]").click()
    browser.find_element(By.CSS_SELECTOR, "[data-what=ablate]").click()
    kernel.wait_for(2)
    expected = float(rl.refusal_score(model, off, rl.AblateNeurons(neurons))[0])
    assert kernel.scores()["off"] == pytest.approx(expected, rel=1e-5)
    assert (
        explorer.code().splitlines()[-1]
        == browser.find_element(By.CSS_SELECTOR, "[data-what=code]").text.splitlines()[-1]
    )
    # Another request is scored under the same edits.
    browser.execute_script(
        "const menu = document.querySelector('[data-what=scored]'); menu.value = '1'; menu.dispatchEvent(new Event('change'))"
    )
    kernel.wait_for(3)
    other = explorer.batches["off"].select([1])
    expected = float(rl.refusal_score(model, other, rl.AblateNeurons(neurons))[0])
    assert kernel.scores()["off"] == pytest.approx(expected, rel=1e-5)
    # A neuron that the page does not hold is read when it is looked at.
    choose(0, 111)
    kernel.pump(
        lambda: (
            "Reading"
            not in browser.execute_script("return document.querySelector('[data-what=prompts]').textContent")
        )
    )
    told, buffers = explorer.answer({"kind": "tokens", "neuron": [0, 111]})
    browser.execute_script(
        "document.querySelector('[data-what=tokens-harmful-base] .token:nth-of-type(3)').dispatchEvent("
        "new MouseEvent('mousemove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    tip = browser.execute_script("return document.querySelector('.tip').textContent")
    expected = float(np.frombuffer(buffers[told["prompts"][0]["values"][0]], "<f4")[2])
    assert float(tip.rsplit(" ", 1)[1].replace("−", "-")) == pytest.approx(expected, rel=1e-5)
    kernel.close()
