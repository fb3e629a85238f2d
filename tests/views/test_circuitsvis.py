from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.views import circuitsvis_heads, circuitsvis_pattern, circuitsvis_tokens, head_patterns
from rim_lens.views.text import visible
from tests.views.browser import HOSTILE, harmless

HEADS = [(0, 5), (1, 3)]


@pytest.fixture(scope="module")
def read() -> Any:
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    requests = rl.load_prompts("harmful", language="toy", split="select")[:3]
    batch = chat.render([requests[0], requests[1], "make bread"], think="off")
    return model, chat, batch, head_patterns(model, batch, HEADS)


def test_patterns_are_the_cache_s_own(read: Any) -> None:
    model, _, batch, patterns = read
    _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    for place, (layer, head) in enumerate(HEADS):
        whole = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        real = batch.attention_mask.bool()
        for row in range(len(batch)):
            expected = whole[row][real[row]][:, real[row]].numpy()
            got = patterns.values[row, place][real[row].numpy()][:, real[row].numpy()]
            np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (patterns.values.sum(-1)[~batch.attention_mask.bool().numpy()[:, None].repeat(2, 1)] == 0).all()
    last = head_patterns(model, batch, HEADS, last=2)
    np.testing.assert_allclose(last.values, patterns.values[:, :, -2:], atol=1e-6)
    assert last["query"].values.tolist() == patterns["query"].values.tolist()[-2:]


def _props(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="pictures">(.*?)</script>', page, re.DOTALL)
    assert found
    return [one["props"] for one in json.loads(found[1])]


def test_the_page_holds_the_numbers_without_padding(read: Any) -> None:
    _, chat, batch, patterns = read
    both = circuitsvis_heads(chat, batch, patterns, row=2) + circuitsvis_pattern(
        chat, batch, patterns, (1, 3), row=2
    )
    heads, one = _props(both.to_html())
    n = int(batch.attention_mask[2].sum())
    assert n < batch.tokens.shape[1]
    assert len(heads["tokens"]) == n == len(heads["attention"][0])
    np.testing.assert_allclose(heads["attention"], patterns.values[2, :, -n:, -n:], atol=1e-7)
    np.testing.assert_allclose(one["attention"], patterns.values[2, 1, -n:, -n:], atol=1e-7)
    assert both.to_html().count("var CircuitsVis=") == 1  # the library once, however many pictures


def test_spans_crop_tokens_and_numbers_alike(read: Any) -> None:
    model, chat, batch, _ = read
    rows = rl.capture(model, batch, rl.AttentionRows(HEADS))["attention_rows"]
    (props,) = _props(circuitsvis_tokens(chat, batch, rows, row=2, spans=["request"]).to_html())
    mask = batch.spans["request"][2].numpy()
    np.testing.assert_allclose(np.array(props["values"]).T, rows.values[2][:, mask], atol=1e-7)
    assert "".join(props["tokens"]).strip() == "make bread"


def test_what_does_not_fit_is_refused_with_advice(read: Any) -> None:
    _, chat, batch, patterns = read
    with pytest.raises(rl.errors.ViewTooLarge, match="crop with spans"):
        circuitsvis_heads(chat, batch, patterns, max_cells=100)
    with pytest.raises(rl.errors.UnknownHead, match="L1H1 was asked for; these patterns hold L0H5, L1H3"):
        circuitsvis_pattern(chat, batch, patterns, (1, 1))
    with pytest.raises(rl.errors.CaptureError, match="without last="):
        circuitsvis_heads(chat, batch, patterns[:, :, -2:])
    with pytest.raises(rl.errors.EmptySpan):
        circuitsvis_heads(chat, batch, patterns, spans=["cot"])
    with pytest.raises(rl.errors.CaptureError, match="NaN"):
        circuitsvis_tokens(chat, batch, np.full((1, batch.tokens.shape[1]), np.nan))
    with pytest.raises(rl.errors.CaptureError, match="not among those read"):
        circuitsvis_heads(chat, replace(batch, prompts=batch.prompts[::-1]), patterns.isel(prompt=[0]))


@pytest.mark.chromium
def test_hostile_tokens_are_seen_and_nothing_is_asked_for(
    read: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chat, batch, _ = read
    n = len(HOSTILE)
    monkeypatch.setattr(
        "rim_lens.views.circuitsvis.token_texts",
        lambda chat, ids: [*map(visible, HOSTILE), *"x" * (len(ids) - n)],
    )
    width = batch.tokens.shape[1]
    square = torch.ones(2, width, width).tril().softmax(-1)
    page = (
        circuitsvis_tokens(chat, batch, square[:1, -1])
        + circuitsvis_tokens(chat, batch, square[:, -1])
        + circuitsvis_heads(chat, batch, square)
        + circuitsvis_pattern(chat, batch, square)
    )
    path = page.write(tmp_path / "page.html")
    harmless(browser, path, HOSTILE)
    for place in (0, 1):  # the others draw their tokens on a canvas
        text = browser.execute_script(f"return document.getElementById('picture-{place}').innerText")
        squeezed = re.sub(r"\s", "", text)
        for token in HOSTILE:
            assert re.sub(r"\s", "", visible(token)) in squeezed, (place, token, text[:400])
    assert browser.execute_script(
        "return ['picture-2', 'picture-3'].map(id => document.querySelectorAll('#' + id + ' canvas').length)"
    ) == [3, 1]
