from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.views import HeadView, explorer_html, head_view, write_explorer
from rim_lens.views.explorer.building import packed
from rim_lens.views.text import visible
from tests.views.browser import (
    HOSTILE,
    act_until,
    explorer_page,
    harmless,
    pick,
)

EFFECTS = {(0, 5): -1.25, (1, 3): 0.4}


@pytest.fixture(scope="module")
def toy() -> Any:
    model = rl.load_model("toy")
    return (
        model,
        rl.ChatFormat.from_model(model),
        rl.load_prompts("harmful", language="toy", split="select")[:3],
    )


@pytest.fixture(scope="module")
def view(toy: Any) -> HeadView:
    model, chat, requests = toy
    return head_view(model, chat, requests, ("off", "careful"), effects=EFFECTS, shown=2)


def _pattern(model: Any, batch: rl.SpanBatch, row: int) -> np.ndarray:
    """[layer, head, query, key] of the real tokens, from the cache of TransformerLens itself."""
    one = batch.select([row])
    _, cache = model.run_with_cache(one.tokens, attention_mask=one.attention_mask)
    return np.stack(
        [cache[f"blocks.{layer}.attn.hook_pattern"][0].numpy() for layer in range(model.cfg.n_layers)]
    )


def test_masses_groups_and_rows_are_those_of_the_cache(toy: Any, view: HeadView) -> None:
    model, _, requests = toy
    for place, (name, batch) in enumerate(view.batches.items()):
        told = view.data["conditions"][place]
        assert told["name"] == name
        whole = [_pattern(model, batch, row) for row in range(len(requests))]
        for span_place, span in enumerate(told["spans"]):
            expected = np.mean(
                [
                    pattern[:, :, -1][..., batch.select([row]).spans[span][0].numpy()].sum(-1)
                    for row, pattern in enumerate(whole)
                ],
                axis=0,
            )
            np.testing.assert_allclose(view.arrays[told["mass"]][span_place], expected, atol=1e-5)
        for row in range(2):
            shown = view.data["prompts"][row]["conditions"][place]
            of, table = np.array(shown["group_of"]), view.arrays[shown["summary"]]
            np.testing.assert_allclose(table.sum(-1), 1, atol=1e-5)
            for start in range(len(shown["groups"])):
                for stop in range(len(shown["groups"])):
                    block = whole[row][:, :, of == start][..., of == stop]
                    np.testing.assert_allclose(table[:, :, start, stop], block.sum(-1).mean(-1), atol=1e-5)
            np.testing.assert_allclose(
                table[:, :, -1, of[0]], whole[row][:, :, -1, of == of[0]].sum(-1), atol=1e-5
            )
            for key, rows in shown["rows"].items():
                layer, head = map(int, key.split("."))
                expected = packed(whole[row][layer, head], 0)
                np.testing.assert_allclose(view.arrays[rows["values"]], expected, atol=1e-6)


def test_what_was_not_removed_is_not_tested(view: HeadView) -> None:
    (effect,) = view.data["effects"]
    values = view.arrays[effect["values"]]
    assert np.isfinite(values).sum() == len(EFFECTS)
    assert values[0, 5] == np.float32(-1.25)
    assert view.data["start"]["head"] == [0, 5]  # the largest effect first
    assert "0.5" in view.data["prompts"][0]["conditions"][0]["rows"]


def test_a_long_thought_is_cut_into_few_groups(toy: Any) -> None:
    model, chat, requests = toy
    thought = "3 4 > 0 6 > 6 > 1"

    def steps(text: str) -> list[str]:
        pieces = text.split(" >")
        return [piece + " >" for piece in pieces[:-1]] + [pieces[-1]]

    view = head_view(model, chat, requests[:1], {"long": thought}, max_sentences=2, split=steps)
    (shown,) = view.data["prompts"][0]["conditions"]
    groups = [group for group in shown["groups"] if group["span"] == "cot"]
    assert [group["name"] for group in groups] == ["cot 1–2", "cot 3–4"]
    assert groups[0]["sentence"] == "3 4 > 0 6 >"
    inside = [
        token
        for token, of in zip(shown["tokens"], shown["group_of"], strict=True)
        if shown["groups"][of] is groups[0]
    ]
    assert "".join(inside).split() == ["3", "4", ">", "0", "6", ">"]


def test_a_window_keeps_the_last_rows_and_the_budget_is_held_before_any_pass(toy: Any) -> None:
    model, chat, requests = toy
    view = head_view(model, chat, requests[:1], ("careful",), heads=[(1, 3)], last=4)
    (shown,) = view.data["prompts"][0]["conditions"]
    rows, n = shown["rows"]["1.3"], len(shown["tokens"])
    assert rows["first"] == n - 4
    expected = packed(_pattern(model, view.batches["careful"], 0)[1, 3][-4:], n - 4)
    np.testing.assert_allclose(view.arrays[rows["values"]], expected, atol=1e-6)
    with pytest.raises(rl.errors.ViewTooLarge, match="keep fewer heads or rows"):
        head_view(model, chat, requests, max_bytes=3000)
    with pytest.raises(rl.errors.UnknownSpan, match="'system'"):
        head_view(model, chat, requests, span="system")
    with pytest.raises(rl.errors.ConditionError, match="not a SpanBatch of the 1 prompts"):
        head_view(model, chat, requests[:1], {"off": chat.render(requests[1:2], think="off")})
    with pytest.raises(rl.errors.UnknownHead):
        head_view(model, chat, requests, heads=[(99, 0)])


class Scripts(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_names_its_one_script_and_gives_the_arrays_back(view: HeadView) -> None:
    page = explorer_html(view)
    tags = Scripts(page).tags
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 1
    assert [t for t, a in tags if t in ("img", "iframe", "object")] == []
    for place, array in enumerate(view.arrays):
        text = re.search(rf'id="array-{place}">([^<]*)<', page)
        assert text
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text[1]), "<f4"), array.ravel())
    assert json.loads(re.search(r'id="view">(.*?)</script>', page, re.DOTALL)[1]) == json.loads(  # type: ignore[index]
        json.dumps(view.data)
    )


@pytest.fixture
def opened(view: HeadView, browser: Any, tmp_path: Path) -> Any:
    for one in view.data["prompts"][0]["conditions"]:
        one["tokens"][: len(HOSTILE)] = [visible(token) for token in HOSTILE]
    path = write_explorer(view, tmp_path / "explorer.html")
    with explorer_page(browser, path) as page:
        yield page


def _said(browser: Any) -> str:
    return browser.execute_script("return document.querySelector('[data-what=said]').textContent")


def _number(said: str) -> float:
    return float(said.split(": ")[1].partition(" ")[0].replace("−", "-"))


@pytest.mark.chromium
def test_click_and_keys_choose_a_head_and_tell_its_number(view: HeadView, opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    off, careful = (view.data["conditions"][place] for place in (0, 1))
    think = [one["spans"].index("think") for one in (off, careful)]
    shift = view.arrays[off["mass"]][think[0]] - view.arrays[careful["mass"]][think[1]]
    act_until(
        opened,
        lambda it: it.find_element(By.CSS_SELECTOR, ".map"),
        lambda it: "head 3" in _said(it) or "head 4" in _said(it),
    )
    canvas = opened.find_element(By.CSS_SELECTOR, ".map")
    canvas.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT * 9, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert _said(opened).startswith("Layer 1, head 1:")
    assert _number(_said(opened)) == pytest.approx(float(shift[1, 1]), abs=1e-6)
    pick(opened, "stat", "effect0")
    assert _said(opened) == "Layer 1, head 1: not tested"
    canvas.send_keys(Keys.ARROW_RIGHT * 2)
    assert _number(_said(opened)) == pytest.approx(0.4)
    pick(opened, "stat", "massB")
    pick(opened, "span", "request")
    held = view.arrays[careful["mass"]][careful["spans"].index("request")][1, 3]
    assert _number(_said(opened)) == pytest.approx(float(held), abs=1e-6)


@pytest.mark.chromium
def test_two_conditions_side_by_side_with_exact_masses(view: HeadView, opened: Any) -> None:
    cells = "return [...document.querySelectorAll('[data-what=masses] tr[data-span=request] td.n')].map(cell => cell.title)"
    shown = view.data["prompts"][0]["conditions"]
    layer, head = view.data["start"]["head"]
    expected = []
    for one in shown:
        last = view.arrays[one["rows"][f"{layer}.{head}"]["values"]][-len(one["tokens"]) :]
        expected.append(
            sum(value for value, atom in zip(last, one["atoms"], strict=True) if atom == "request")
        )
    told = [float(text) for text in opened.execute_script(cells)]
    assert told == pytest.approx([*expected, expected[0] - expected[1]], abs=1e-5)
    # Another query in the first condition: its row, not that of the last token.
    opened.execute_script("document.querySelectorAll('[data-what=tokens0] .token')[4].click()")
    row = packed_row(view.arrays[shown[0]["rows"][f"{layer}.{head}"]["values"]], 4)
    inside = sum(value for value, atom in zip(row, shown[0]["atoms"], strict=False) if atom == "request")
    assert float(opened.execute_script(cells)[0]) == pytest.approx(float(inside), abs=1e-5)


def packed_row(values: np.ndarray, query: int) -> np.ndarray:
    start = query * (query + 1) // 2
    return values[start : start + query + 1]


@pytest.mark.chromium
def test_the_page_can_ask_for_nothing(opened: Any, tmp_path: Path) -> None:
    harmless(opened, tmp_path / "explorer.html", HOSTILE)


@pytest.mark.chromium
def test_tokens_are_literal_and_hovering_tells_the_float(view: HeadView, opened: Any) -> None:
    texts = opened.execute_script(
        "return [...document.querySelectorAll('[data-what=tokens1] .token')].map(token => token.textContent)"
    )
    assert texts[: len(HOSTILE)] == [visible(token) for token in HOSTILE]
    layer, head = view.data["start"]["head"]
    opened.execute_script(
        "document.querySelectorAll('[data-what=tokens1] .token')[1].dispatchEvent("
        "new MouseEvent('mousemove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    tip = opened.execute_script("return document.querySelector('.tip').textContent")
    assert HOSTILE[1] in tip
    careful = view.data["prompts"][0]["conditions"][1]
    values = view.arrays[careful["rows"][f"{layer}.{head}"]["values"]]
    assert float(tip.rsplit(" ", 1)[1]) == pytest.approx(
        float(packed_row(values, len(careful["tokens"]) - 1)[1]), rel=1e-5
    )


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    for mode in ("groups", "tokens"):
        opened.execute_script(f"document.querySelector('[data-what=mode-{mode}]').click()")
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    opened.execute_script("document.querySelector('[data-what=mode-groups]').click()")
    drawn = opened.execute_script(
        "const c = document.querySelector('[data-what=pattern1]'); const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(Array.from({length: d.length / 4}, (_, i) => d[4 * i] + ',' + d[4 * i + 1])).size"
    )
    assert drawn > 8  # something is drawn, in more than a few colours
