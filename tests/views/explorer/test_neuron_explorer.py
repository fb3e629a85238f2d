"""The neuron explorer's numbers against other ways to them, and its page in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.measures.held_out import chosen_by
from rim_lens.views import (
    NeuronView,
    neuron_explorer_html,
    neuron_study_view,
    neuron_view,
    write_neuron_explorer,
)
from rim_lens.views.explorer.neuron_reading import WITHHELD
from rim_lens.views.text import visible
from tests.views.browser import (
    HOSTILE,
    act_until,
    explorer_page,
    harmless,
    pick,
    resize,
)

MEMBERS = [(0, 5), (0, 200), (1, 3), (1, 7), (1, 42)]
EFFECTS = {(1, 3): -0.75, (0, 9): 0.25}
WIDTH = 256


@pytest.fixture(scope="module")
def toys() -> Any:
    base, tuned = rl.load_model("toy"), rl.load_model("toy:deviate")
    asked = [
        rl.load_prompts(kind, language="toy", split="evaluate")[:6]
        for kind in ("harmful", "harmless", "reasoning")
    ]
    return base, tuned, rl.ChatFormat.from_model(base), asked


@pytest.fixture(scope="module")
def view(toys: Any) -> NeuronView:
    base, tuned, chat, asked = toys
    return neuron_view(base, chat, MEMBERS, *asked, tuned=tuned, effects=EFFECTS)


def column(view: NeuronView, name: str) -> np.ndarray:
    (one,) = (one for one in view.data["columns"] if one["name"] == name)
    if "minus" in one:
        first, second = (view.arrays[view.data["columns"][place]["values"]] for place in one["minus"])
        return first - second
    return view.arrays[one["values"]]


DROP, RISE = "term of δ⁻ (safety drop)", "term of δ⁺ (reasoning rise)"


def test_terms_and_numbers_are_those_of_entanglement(toys: Any, view: NeuronView) -> None:
    base, tuned, chat, (harmful, harmless, reasoning) = toys
    found = rl.entanglement(base, tuned, chat, harmful, reasoning, MEMBERS, harmless=harmless, n_boot=2)
    for line, metric in zip(view.data["numbers"], ("safety_drop", "reasoning_rise", "ras"), strict=True):
        row = found.row(metric)
        assert line["set"] == pytest.approx(row["value"], abs=1e-9)
        assert line["all"] == pytest.approx(found.value(metric, "all"), abs=1e-9)
        assert [line["random"], line["percentile"]] == pytest.approx([row["random"], row["percentile"]])
    sets = found.sets[found.sets["of"] == "random"].reset_index(drop=True)
    for place, one in enumerate(view.data["random"]):
        members = [divmod(int(at), WIDTH) for at in view.arrays[one["members"]]]
        assert members == [tuple(pair) for pair in found.settings["controls"][place]]
        assert one["ras"] == pytest.approx(sets["ras"][place], abs=1e-9)
    # One by one: each neuron as a set of its own, from activations pooled another way.
    for model, kind, prompts, think in (
        (base, "harmful, base", harmful, "off"),
        (tuned, "harmful, tuned", harmful, "off"),
        (base, "reasoning, base", reasoning, "careful"),
        (tuned, "reasoning, tuned", reasoning, "careful"),
    ):
        pooled = rl.pooled_activations(model, chat, prompts, think=think)
        np.testing.assert_allclose(column(view, kind), pooled.mean("prompt").values.ravel(), atol=1e-5)
    sides = [
        column(view, f"{kind}, {role}") for kind in ("harmful", "reasoning") for role in ("base", "tuned")
    ]
    for place in range(0, 512, 7):
        alone = rl.reciprocal_activation_shift(*(one[[place]] for one in sides))
        for name, value in ((DROP, alone.safety_drop), (RISE, alone.reasoning_rise)):
            expected = 0.0 if np.isnan(value) else value  # left out, and counted: it adds nothing
            assert column(view, name)[place] == pytest.approx(expected, rel=2e-3, abs=1e-5)
    members = [layer * WIDTH + neuron for layer, neuron in MEMBERS]
    assert column(view, RISE)[members].mean() == pytest.approx(found.value("reasoning_rise"), rel=1e-5)


def test_between_a_model_and_itself_nothing_moves(toys: Any) -> None:
    base, _, chat, asked = toys
    view = neuron_view(base, chat, MEMBERS, *asked, tuned=base, response="none", n_read=0)
    assert not column(view, DROP).any()
    assert not column(view, RISE).any()
    assert not column(view, "reasoning: tuned − base").any()
    assert [line["set"] for line in view.data["numbers"]] == [0, 0, 0]
    assert view.data["read"] == {}


def test_activations_over_tokens_are_the_cache_s_on_the_top_prompts(toys: Any, view: NeuronView) -> None:
    base, tuned, _, asked = toys
    assert len(view.data["read"]) == 512
    whole = view.arrays[view.data["activations"]]
    for layer, neuron in (*MEMBERS, (1, 200)):
        seen: dict[str, list[str]] = {}
        for prompt, starts in view.data["read"][str(layer * WIDTH + neuron)]:
            told = view.data["prompts"][prompt]
            seen.setdefault(told["kind"], []).append(told["id"])
            for source, model, start, shown in zip(
                view.sources, (base, tuned), starts, told["roles"], strict=True
            ):
                batch = source.batches[told["kind"]]
                row = [prompt_.id for prompt_ in batch.prompts].index(told["id"])
                one = batch.select([row])
                _, cache = model.run_with_cache(one.tokens, attention_mask=one.attention_mask)
                expected = cache[f"blocks.{layer}.mlp.hook_post"][0, :, neuron].numpy()
                values = whole[start : start + len(shown["tokens"])]
                np.testing.assert_allclose(values, expected, atol=1e-5)
                pooled = source.pooled[told["kind"]][row, layer, neuron]
                assert values[1:].max() == pytest.approx(pooled, abs=1e-5)  # all but the sink
        for kind, prompts in zip(("harmful", "harmless", "reasoning"), asked, strict=True):
            pooled = view.sources[0].pooled[kind][:, layer, neuron]
            best = np.argsort(-pooled, kind="stable")[:2]
            assert seen[kind] == [prompts[row].id for row in best]


def test_what_was_not_removed_is_not_tested(view: NeuronView) -> None:
    (effect,) = view.data["effects"]
    places = view.arrays[effect["places"]].astype(int).tolist()
    assert dict(zip(places, view.arrays[effect["values"]].tolist(), strict=True)) == {259: -0.75, 9: 0.25}
    assert view.data["tested"] == "The set as a whole: not tested."


def test_of_answers_to_harmful_requests_only_first_words_are_shown(toys: Any, view: NeuronView) -> None:
    base, tuned, chat, asked = toys

    def written(of: NeuronView, kind: str) -> list[str]:
        return [
            token
            for one in of.data["prompts"]
            if one["kind"] == kind
            for shown in one["roles"]
            for token in shown["tokens"][len(shown["tokens"]) - shown["written"] :]
        ]

    assert WITHHELD in written(view, "harmful")  # the tuned toy answers at length
    assert WITHHELD not in written(view, "harmless") + written(view, "reasoning")
    whole = neuron_view(base, chat, MEMBERS, *asked, tuned=tuned, keep_text=True, n_random_sets=1)
    assert len(written(whole, "harmful")) == len(written(view, "harmful"))
    assert WITHHELD not in written(whole, "harmful")


def test_one_model_and_a_set(toys: Any) -> None:
    base, _, chat, (harmful, harmless, _) = toys
    scores = np.arange(512.0).reshape(2, WIDTH)
    known = rl.NeuronSet.of(base, MEMBERS, scores=scores, activity=scores / 512)
    view = neuron_view(base, chat, known, harmful, harmless, response="none", n_read=2)
    assert [one["name"] for one in view.data["scatters"]] == [
        "harmful against harmless",
        "score against activity",
    ]
    pooled = rl.pooled_activations(base, chat, harmful, response="none").mean("prompt").values.ravel()
    np.testing.assert_allclose(column(view, "harmful"), pooled, atol=1e-5)
    assert view.arrays[view.data["set"]].tolist() == [298, 263, 259, 200, 5]  # by falling score
    assert set(view.data["read"]) == {"298", "263"}
    assert view.data["numbers"] == []
    with pytest.raises(rl.errors.NotEnoughData, match="nothing to draw neurons by"):
        neuron_view(base, chat, MEMBERS, harmful, response="none")


def test_what_has_no_room_is_told_with_the_box_it_lies_in(toys: Any, view: NeuronView) -> None:
    base, tuned, chat, asked = toys
    few = neuron_view(
        base, chat, MEMBERS, *asked, tuned=tuned, effects=EFFECTS, n_drawn=40, n_read=9, n_top=1
    )
    drawn = few.arrays[few.data["drawn"]].astype(int)
    assert (len(drawn), few.data["left_out"], len(few.data["read"])) == (40, 472, 9)
    random = few.arrays[few.data["random"][0]["members"]].astype(int).tolist()
    assert {*(layer * WIDTH + neuron for layer, neuron in MEMBERS), 9, *random} <= set(drawn.tolist())
    rest = np.setdiff1d(np.arange(512), drawn)
    x0, x1, y0, y1 = few.data["scatters"][0]["box"]
    assert (x0, x1) == pytest.approx((column(view, DROP)[rest].min(), column(view, DROP)[rest].max()))
    assert (y0, y1) == pytest.approx((column(view, RISE)[rest].min(), column(view, RISE)[rest].max()))
    free = np.setdiff1d(drawn, [*random, 9, *(layer * WIDTH + neuron for layer, neuron in MEMBERS)])
    far = np.maximum(
        column(view, DROP) / column(view, DROP).max(), column(view, RISE) / column(view, RISE).max()
    )
    assert far[rest].max() <= far[free].min()
    assert "the other 472 lie in the hatched box" in few.data["about"]
    np.testing.assert_array_equal(column(few, DROP), column(view, DROP)[drawn])
    assert few.data["numbers"] == view.data["numbers"]  # of all neurons, whatever is drawn
    small = neuron_view(base, chat, MEMBERS, *asked, tuned=tuned, max_bytes=60_000)
    assert small.n_bytes < 60_000
    assert 0 < len(small.data["read"]) < 512
    with pytest.raises(rl.errors.ViewTooLarge, match="5 neurons alone"):
        neuron_view(base, chat, MEMBERS, *asked, tuned=tuned, max_bytes=200)


def test_what_cannot_be_shown_is_refused(toys: Any) -> None:
    base, tuned, chat, (harmful, harmless, _) = toys
    with pytest.raises(rl.errors.NotEnoughData, match="no reasoning prompt"):
        neuron_view(base, chat, MEMBERS, harmful, harmless, tuned=tuned)
    with pytest.raises(rl.errors.UnknownNeuron, match="256"):
        neuron_view(base, chat, [(0, 256)], harmful, harmless)
    with pytest.raises(rl.errors.CaptureError, match=r"effect of neuron \(2, 0\)"):
        neuron_view(base, chat, MEMBERS, harmful, harmless, effects={(2, 0): 1.0})
    chosen = rl.NeuronSet.of(base, MEMBERS, made_by=chosen_by(harmful))
    with pytest.raises(rl.errors.StatisticsError):
        neuron_view(base, chat, chosen, harmful, harmless)


def test_a_saved_study_is_enough(tmp_path: Path) -> None:
    settings = rl.NeuronSettings(m=20, n_random_sets=10, written=False, gate=False, response="none")
    study = rl.NeuronStudy(
        "toy",
        tuned={"<b>deviate": "toy:deviate"},
        n_requests=8,
        settings=settings,
        parts=("writers", "entanglement"),
    )
    result = study.run(tmp_path)
    view = neuron_study_view(rl.load_neuron_study(tmp_path))
    found = result.entanglement["<b>deviate"]
    for line, metric in zip(view.data["numbers"], ("safety_drop", "reasoning_rise", "ras"), strict=True):
        assert line["set"] == pytest.approx(found.value(metric), abs=1e-9)
        assert line["p"] == pytest.approx(found.row(metric)["p"])
    assert result.neurons is not None
    assert result.writers is not None
    members = view.arrays[view.data["set"]].astype(int)
    assert [divmod(int(place), WIDTH) for place in members] == result.neurons.ranked()
    assert column(view, DROP)[members].mean() == pytest.approx(found.value("safety_drop"), rel=1e-5)
    names = [one["name"] for one in view.data["effects"]]
    assert names == ["effect of removing it", "of that, straight into the logits"]
    totals = dict(
        zip(
            view.arrays[view.data["effects"][0]["places"]],
            view.arrays[view.data["effects"][0]["values"]],
            strict=True,
        )
    )
    for row in result.writers.itertuples():
        assert totals[row.layer * WIDTH + row.neuron] == pytest.approx(row.total, rel=1e-5)
    assert f"verdict “{result.neurons.effects.verdict}”" in view.data["tested"]
    assert (view.data["read"], view.data["roles"][1]["name"]) == ({}, "<b>deviate")
    assert "<b>" not in neuron_explorer_html(view).replace('"<b>', "")
    with pytest.raises(rl.errors.NotEnoughData, match="'confirm' was asked for"):
        neuron_study_view(result, "confirm")


@pytest.fixture
def opened(view: NeuronView, browser: Any, tmp_path: Path) -> Any:
    for one in view.data["prompts"]:
        for shown in one["roles"]:
            shown["tokens"][: len(HOSTILE)] = [visible(token) for token in HOSTILE]
    path = write_neuron_explorer(view, tmp_path / "neurons.html")
    with explorer_page(browser, path) as page:
        yield page


@pytest.mark.chromium
def test_the_page_can_ask_for_nothing(opened: Any, tmp_path: Path) -> None:
    harmless(opened, tmp_path / "neurons.html", HOSTILE)


def text_of(browser: Any, what: str) -> str:
    return browser.execute_script(f"return document.querySelector('[data-what={what}]').textContent")


def chosen(browser: Any) -> int:
    layer, neuron = map(int, re.findall(r"\d+", text_of(browser, "neuron")))
    return layer * WIDTH + neuron


def said(browser: Any) -> tuple[float, float]:
    numbers = re.findall(r"(?:\)|\+|−|tuned|base) (−?[\d.e-]+)(?:,|$)", text_of(browser, "said"))
    first, second = (float(text.replace("−", "-")) for text in numbers)
    return first, second


@pytest.mark.chromium
def test_click_and_keys_choose_a_neuron_and_tell_its_numbers(view: NeuronView, opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    drop, rise = column(view, DROP), column(view, RISE)
    assert chosen(opened) == view.data["start"] == 5
    act_until(
        opened,
        lambda it: it.find_element(By.CSS_SELECTOR, "[data-what=strip]"),
        lambda it: chosen(it) != 5,
    )
    canvas = opened.find_element(By.CSS_SELECTOR, "[data-what=scatter]")
    canvas.send_keys(Keys.HOME)
    assert chosen(opened) == 5
    seen = set()
    for key, axis, sign in (
        (Keys.ARROW_UP, rise, 1),
        (Keys.ARROW_RIGHT, drop, 1),
        (Keys.ARROW_DOWN, rise, -1),
    ):
        before = chosen(opened)
        canvas.send_keys(key)
        place = chosen(opened)
        seen.add(place)
        assert sign * (axis[place] - axis[before]) > 0
        assert said(opened) == pytest.approx((drop[place], rise[place]), rel=1e-5)
    assert len(seen) == 3
    # A click where the farthest neuron stands: found by the page's own axes, on either scale.
    for scale in ("spread", "linear"):
        pick(opened, "scale-of", scale)
        far = int(np.argmax(drop))
        pick(opened, "goto", f"L{far // WIDTH}N{far % WIDTH}")
        assert chosen(opened) == far
        x, y = where_the_ring_is(opened)
        pick(opened, "goto", "L0N5")
        opened.execute_script(
            "const c = document.querySelector('[data-what=scatter]'), r = c.getBoundingClientRect();"
            "c.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: r.left + arguments[0], clientY: r.top + arguments[1]}))",
            x,
            y,
        )
        assert chosen(opened) == far
    pick(opened, "scatter-of", "1")
    expected = [column(view, name)[far] for name in ("harmful: base − tuned", "reasoning: tuned − base")]
    assert said(opened) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    pick(opened, "goto", "L7N1")
    assert "no such neuron" in opened.execute_script("return document.querySelector('.wrong').textContent")
    assert chosen(opened) == far


def where_the_ring_is(browser: Any) -> tuple[float, float]:
    """Where the ring around the chosen neuron is: what changes when another is chosen elsewhere and back."""
    script = """
    const c = document.querySelector('[data-what=scatter]'), goto_ = document.querySelector('[data-what=goto]');
    const copy = document.createElement('canvas'), pen = copy.getContext('2d', { willReadFrequently: true });
    copy.width = c.width; copy.height = c.height;
    const shot = () => { pen.clearRect(0, 0, c.width, c.height); pen.drawImage(c, 0, 0); return pen.getImageData(0, 0, c.width, c.height); };
    const here = goto_.value, one = shot();
    goto_.value = 'L0N5'; goto_.dispatchEvent(new Event('change'));
    const home = shot();
    goto_.value = here; goto_.dispatchEvent(new Event('change'));
    let x = 0, y = 0, n = 0;
    for (let place = 0; place < one.data.length; place += 4) {
      if ([0, 1, 2].every((at) => one.data[place + at] === home.data[place + at])) continue;
      const column = (place / 4) % c.width, row = Math.floor(place / 4 / c.width);
      if (column > c.width / 2) { x += column; y += row; n++; }
    }
    return [x / n, y / n];
    """
    return tuple(browser.execute_script(script))


@pytest.mark.chromium
def test_strip_counts_and_effects(view: NeuronView, opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    strip = opened.find_element(By.CSS_SELECTOR, "[data-what=strip]")
    effect = "return document.querySelector('[data-what=facts] [data-of=effect] td.n').textContent"
    assert opened.execute_script(effect) == "not tested"
    assert "Layer 0 holds 2 of the set's 5" in text_of(opened, "strip-said")
    strip.send_keys(Keys.ARROW_RIGHT)
    assert chosen(opened) == 200
    strip.send_keys(Keys.ARROW_DOWN)
    assert chosen(opened) == 256 + 42  # the nearest of that layer
    assert "Layer 1 holds 3 of the set's 5" in text_of(opened, "strip-said")
    strip.send_keys(Keys.ARROW_LEFT * 2)
    assert chosen(opened) == 259
    assert opened.execute_script(effect) == "-0.7500".replace("-", "−")
    for line in view.data["numbers"]:
        cells = opened.execute_script(
            "return [...document.querySelectorAll('[data-what=numbers] tr')].find(row => row.dataset.of === arguments[0])"
            ".querySelectorAll('td.n')[0].title",
            line["metric"],
        )
        assert float(cells) == pytest.approx(line["set"], rel=1e-6)


@pytest.mark.chromium
def test_tokens_are_literal_and_hovering_tells_the_float(view: NeuronView, opened: Any) -> None:
    prompt, starts = view.data["read"]["5"][0]
    values = view.arrays[view.data["activations"]][starts[1] :]
    box = "document.querySelectorAll('[data-what=tokens-harmful-tuned]')[0]"
    texts = opened.execute_script(
        f"return [...{box}.querySelectorAll('.token')].map(token => token.textContent)"
    )
    assert texts == view.data["prompts"][prompt]["roles"][1]["tokens"]
    assert texts[: len(HOSTILE)] == [visible(token) for token in HOSTILE]
    opened.execute_script(
        f"{box}.querySelectorAll('.token')[1].dispatchEvent(new MouseEvent('mousemove', {{bubbles: true, clientX: 300, clientY: 300}}))"
    )
    tip = opened.execute_script("return document.querySelector('.tip').textContent")
    assert HOSTILE[1] in tip
    assert float(tip.rsplit(" ", 1)[1].replace("−", "-")) == pytest.approx(float(values[1]), rel=1e-6)
    # The colour is that of the float: on the light page the most active token is darkest, one near 0 is white.
    sizes = np.abs(values[: len(texts)])
    colours = opened.execute_script(
        f"return [{sizes.argmax()}, {sizes.argmin()}].map(key => {box}.querySelectorAll('.token')[key].style.backgroundColor)"
    )
    dark, light = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert dark + 150 < light


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    resize(opened, width)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = opened.execute_script(
        "const c = document.querySelector('[data-what=scatter]'); const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(Array.from({length: d.length / 4}, (_, i) => d[4 * i] + ',' + d[4 * i + 1])).size"
    )
    assert drawn > 8


def test_the_page_holds_its_data_and_one_script(view: NeuronView) -> None:
    page = neuron_explorer_html(view)
    assert page.count("'sha256-") + page.count("&#x27;sha256-") == 1
    (told,) = re.findall(r'id="view">(.*?)</script>', page, re.DOTALL)
    assert json.loads(told) == json.loads(json.dumps(view.data))
