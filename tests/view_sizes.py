"""docs/views.md: how large the pages are, and how long they take to open, in headless Chromium.

``python -m tests.view_sizes`` makes every kind of page under runs/views, opens each several times, writes
docs/evidence/views.json, and the page from it. The suite holds the page to the evidence, the goals to the numbers, and a
sample measured anew (tests/test_view_sizes.py). About five CPU-minutes, most of them for the largest explorer.

Opening ends when the browser has drawn and is idle again; a click ends with the second frame after it. Both are wall-clock
times and hang on what else the machine does. What the page's main thread computed does not, and stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rim_lens as rl
from rim_lens.lens import Model, wrap_hf
from rim_lens.measures.pages import write_json
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from rim_lens.organisms.toy.recipe import one_thread
from rim_lens.prompts.records import Prompt
from rim_lens.prompts.toy import PAD, USER
from rim_lens.provenance import provenance
from tests.views.browser import errors_of, offline_chromium

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "views.json"
PAGE = ROOT / "docs" / "views.md"
MADE = ROOT / "runs" / "views"
COMMAND = "make evidence-views"

N_LOADS = 7
N_CLICKS = 5
# layers, heads, tokens of the long condition
SIZES = ((12, 12, 512), (24, 16, 1024), (32, 32, 2048))
NEURONS = ((32, 8192),)  # layers, neurons in each
KINDS = ("harmful", "harmless", "reasoning")
EXPLORER_GOAL = {"megabytes": 40.0, "seconds": 3.0}
REPORT_GOAL = {"megabytes": 12.0, "seconds": 3.0}
_WATCH = """
addEventListener("load", () => requestAnimationFrame(() => requestAnimationFrame(() => requestIdleCallback(
  () => { window.shownAt = performance.now(); }))));
addEventListener("click", (event) => requestAnimationFrame(() => requestAnimationFrame(
  () => { window.clickTook = performance.now() - event.timeStamp; })), true);
"""


@dataclass(frozen=True)
class Made:
    """A kind of page: how it is made, and what it shall keep.

    Attributes:
        make: Writes it into a folder.
        what: It holds, in words.
        goal: Most megabytes and seconds; empty where none is set.
        heads: Layers and heads of an explorer whose middle heads have full rows: they are clicked.
    """

    make: Callable[[Path], Path]
    what: str
    goal: Mapping[str, float]
    heads: tuple[int, int] | None = None


# --- pages --------------------------------------------------------------------------------------------


def random_model(n_layers: int, n_heads: int, n_tokens: int, d_mlp: int = 8, seed: int = 0) -> Model:
    """A random GPT-2, two wide in each head, that reads the toy's words."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=len(TOKEN),
        n_positions=n_tokens,
        n_embd=2 * n_heads,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=d_mlp,
        bos_token_id=None,
        eos_token_id=TOKEN[USER],
        pad_token_id=TOKEN[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return wrap_hf(model.eval(), toy_tokenizer())


def explorer(n_layers: int, n_heads: int, n_tokens: int) -> Callable[[Path], Path]:
    """The head explorer's page of a random model: thinking off, beside a chain of thought that fills its context."""

    def make(folder: Path) -> Path:
        model = random_model(n_layers, n_heads, n_tokens)
        chat = rl.ChatFormat.from_model(model)
        requests = rl.load_prompts("harmful", language="toy", split="select")[:1]
        thought = filling(chat, requests, n_tokens)
        heads = [(n_layers // 2, n_heads // 2 + place) for place in range(-4, 4)]
        view = rl.views.head_view(
            model, chat, requests, {"off": None, "long": thought}, heads=heads, split=lines
        )
        return rl.views.write_explorer(view, folder / "explorer.html")

    return make


def filling(chat: rl.ChatFormat, requests: Sequence[Prompt], n_tokens: int) -> str:
    """A chain of thought that makes the prompt so many tokens long."""
    room = n_tokens - int(chat.render(requests, think="off").lengths.max())
    return " ".join((["3", "4", ">", "0", "6", ">"] * n_tokens)[:room])


def lines(text: str, n_words: int = 48) -> list[str]:
    """A text in pieces of so many words, which stand for sentences.

    >>> lines("a b c d e", 2)
    ['a b ', 'c d ', 'e']
    """
    words = text.split(" ")
    pieces = [" ".join(words[start : start + n_words]) for start in range(0, len(words), n_words)]
    return [piece + " " for piece in pieces[:-1]] + pieces[-1:]


def toy_explorer(folder: Path) -> Path:
    """What the toy's own page holds: three requests, two conditions, all rows of eight heads."""
    model = rl.load_model("toy")
    requests = rl.load_prompts("harmful", language="toy", split="select")[:3]
    heads = [(1, head) for head in range(8)]
    view = rl.views.head_view(model, rl.ChatFormat.from_model(model), requests, shown=3, heads=heads)
    return rl.views.write_explorer(view, folder / "explorer.html")


def toy_neurons(folder: Path) -> Path:
    """The neuron explorer of the toy and its variant, every neuron drawn."""
    return neuron_page(rl.load_model("toy"), rl.load_model("toy:deviate"), folder)


def neurons(n_layers: int, d_mlp: int) -> Callable[[Path], Path]:
    """The neuron explorer of two random models."""

    def make(folder: Path) -> Path:
        models = [random_model(n_layers, 8, 24, d_mlp, seed) for seed in range(2)]
        return neuron_page(*models, folder)

    return make


def neuron_page(base: Model, tuned: Model, folder: Path) -> Path:
    """Six requests, twins and questions, sixteen neurons in the set."""
    chat = rl.ChatFormat.from_model(base)
    asked = [rl.load_prompts(kind, language="toy", split="evaluate")[:6] for kind in KINDS]
    chosen = [(layer, neuron) for layer in range(2) for neuron in range(8)]
    view = rl.views.neuron_view(base, chat, chosen, *asked, tuned=tuned, response="none")
    return rl.views.write_neuron_explorer(view, folder / "neurons.html")


def circuit_page(folder: Path) -> Path:
    """The circuit explorer of `planted`: its circuit, decoys and the sink, under two contrasts."""
    model, truth = rl.load_model("planted"), planted_truth()
    chat = rl.ChatFormat.from_model(model)
    asked = [rl.load_prompts(kind, language="toy") for kind in KINDS]
    heads = [*truth.heads, *truth.decoy_heads, *truth.sink_heads]
    neurons = {"and": truth.neurons, "decoy": truth.decoy_neurons}
    search = rl.CircuitSearch(limit=8, n_random=6, n_random_senders=1)
    found = rl.circuit(model, chat, heads, neurons, *asked[:2], contrasts=("twins", "careful"), search=search)
    view = rl.views.circuit_view(found, model, chat, *asked[:2])
    return rl.views.write_circuit_explorer(view, folder / "circuit.html")


def circuitsvis(n_heads: int, n_tokens: int) -> Callable[[Path], Path]:
    """Patterns of several heads, and coloured tokens, in CircuitsVis' own elements."""

    def make(folder: Path) -> Path:
        model = random_model(2, n_heads, n_tokens)
        chat = rl.ChatFormat.from_model(model)
        requests = rl.load_prompts("harmful", language="toy", split="select")[:1]
        batch = chat.render(requests, think=filling(chat, requests, n_tokens))
        heads = [(1, head) for head in range(n_heads)]
        rows = rl.capture(model, batch, rl.AttentionRows(heads))["attention_rows"]
        patterns = rl.views.head_patterns(model, batch, heads)
        page = rl.views.circuitsvis_heads(chat, batch, patterns) + rl.views.circuitsvis_tokens(
            chat, batch, rows
        )
        return page.write(folder / "circuitsvis.html")

    return make


def report(words: str) -> Callable[[Path], Path]:
    """The report that a command of rim-lens writes."""

    def make(folder: Path) -> Path:
        code = "from rim_lens.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", code, *words.split(), "--out", str(folder)], check=True, cwd=ROOT
        )
        return folder / "report.html"

    return make


def _report(words: str) -> Made:
    return Made(report(words), f"`rim-lens {words}`", REPORT_GOAL)


PAGES: dict[str, Made] = {
    "head explorer, toy": Made(toy_explorer, "2 × 8 heads, 3 requests, 2 conditions", EXPLORER_GOAL, (2, 8)),
    **{
        f"head explorer, {layers} × {heads}": Made(
            explorer(layers, heads, tokens),
            f"{layers} × {heads} heads, {tokens} tokens beside thinking off",
            EXPLORER_GOAL,
            (layers, heads),
        )
        for layers, heads, tokens in SIZES
    },
    "neuron explorer, toy": Made(toy_neurons, "512 neurons in 2 models", EXPLORER_GOAL),
    **{
        f"neuron explorer, {layers} × {width}": Made(
            neurons(layers, width), f"{layers} × {width} neurons in 2 models", EXPLORER_GOAL
        )
        for layers, width in NEURONS
    },
    "circuit explorer, planted": Made(
        circuit_page, "6 heads and sets of neurons, 50 edges, 2 contrasts", EXPLORER_GOAL
    ),
    "study report": _report("demo"),
    "neuron report": _report("neurons toy --requests 24 --m 13"),
    "checkpoint report": _report(
        "compare toy --train careful,deviate --seeds 0 --steps 30 --checkpoints 3 --requests 8 --m 24"
    ),
    "CircuitsVis, small": Made(circuitsvis(8, 24), "8 heads of 24 tokens", {}),
    "CircuitsVis, at its limit": Made(circuitsvis(16, 64), "16 heads of 64 tokens", {}),
}


# --- measuring ----------------------------------------------------------------------------------------


def measured(name: str, folder: Path, n_loads: int = N_LOADS) -> dict[str, Any]:
    """One line of the table."""
    made = PAGES[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = made.make(folder)
    with offline_chromium() as driver:
        driver.set_window_size(1280, 1000)
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        loads, busy = zip(*(_load(driver, path) for _ in range(n_loads)), strict=True)
        clicks = _clicks(driver, *made.heads) if made.heads else []
        said = errors_of(driver)
    if wrong := [one for one in said if "WebGL" not in one]:
        raise RuntimeError(f"{name} complained: {wrong}")
    return {
        "page": name,
        "what": made.what,
        "goal": dict(made.goal),
        "megabytes": path.stat().st_size / 1e6,
        "load_s": list(loads),
        "busy_s": list(busy),
        "click_ms": clicks,
    }


def _load(driver: Any, path: Path) -> tuple[float, float]:
    """Seconds until the page is drawn, and of its main thread's work."""
    driver.get("about:blank")
    before = _busy(driver)
    driver.get(path.as_uri())
    shown = _soon(driver, "return window.shownAt")
    return shown / 1000, _busy(driver) - before


def _busy(driver: Any) -> float:
    told = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(one["value"] for one in told if one["name"] == "TaskDuration")


def _soon(driver: Any, script: str) -> float:
    from selenium.webdriver.support.ui import WebDriverWait

    return float(WebDriverWait(driver, 120, poll_frequency=0.05).until(lambda it: it.execute_script(script)))


def _clicks(driver: Any, n_layers: int, n_heads: int) -> list[float]:
    """Milliseconds from a click on a head to its pattern, for heads with full rows, each for the first time."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    canvas = driver.find_element(By.CSS_SELECTOR, ".map")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    width, height = canvas.size["width"], canvas.size["height"]
    took = []
    for place in range(N_CLICKS):
        layer, head = n_layers // 2, n_heads // 2 - 2 + place
        x = (
            34 + (width - 38) * (head + 0.5) / n_heads - width / 2
        )  # the map's margins: 34 left, 4 right, 18 above, 4 below
        y = 18 + (height - 22) * (layer + 0.5) / n_layers - height / 2
        driver.execute_script("window.clickTook = 0")
        ActionChains(driver).move_to_element_with_offset(canvas, int(x), int(y)).click().perform()
        took.append(_soon(driver, "return window.clickTook"))
        shown = driver.execute_script(
            "return [document.querySelector('[data-what=said]').textContent, document.querySelector('.rlx').textContent]"
        )
        if (
            not shown[0].startswith(f"Layer {layer}, head {head}:")
            or "Token colour: attention" not in shown[1]
        ):
            raise RuntimeError(f"a click on layer {layer}, head {head} gave {shown[0]!r}")
    return took


def page(found: Mapping[str, Any]) -> str:
    """The page, from the file's content."""
    n_loads, n_clicks = len(found["pages"][0]["load_s"]), len(found["pages"][0]["click_ms"])
    rows = [
        "# Views: how large, and how long to open",
        "",
        f"`{found['command']}`, {found['date']}, {found['browser']}, offline, window of 1280 × 1000, on {found['cores']} cores whose"
        f" load was {found['load_average']:.1f} meanwhile.",
        "",
        f"Opening: from the address to a drawn page and an idle browser, median (fastest to slowest) of n = {n_loads} loads. Work: what",
        "the page's main thread computed until then, median; it does not hang on what else the machine does. Click: from a click on a head",
        f"to its drawn pattern, median of n = {n_clicks} heads, each for the first time. Goals stand in brackets.",
        "",
        "| Page | Holds | MB | Opening, s | Work, s | Click, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found["pages"]:
        goal = one["goal"]
        size = f"{one['megabytes']:.2f}" + (f" (≤ {goal['megabytes']:g})" if goal else "")
        load = f"{_median(one['load_s']):.2f}" + (f" (≤ {goal['seconds']:g})" if goal else "")
        spread = f"{min(one['load_s']):.2f} to {max(one['load_s']):.2f}"
        click = f"{_median(one['click_ms']):.0f}" if one["click_ms"] else "–"
        rows.append(
            f"| {one['page']} | {one['what']} | {size} | {load}, {spread} | {_median(one['busy_s']):.2f} | {click} |"
        )
    largest = found["pages"][found["largest"]]
    return "\n".join(
        [
            *rows,
            "",
            f"The largest explorer ({largest['what']}) was read with at most {found['peak_gigabytes']:.1f} GB of memory in the whole process;"
            f" the patterns of all its heads at once would be {found['patterns_gigabytes']:.1f} GB. Each head's attention is summed over spans and",
            "sentences as soon as its layer has run, and full rows are kept of the eight heads that were named. A page is filled with such",
            "rows up to its limit (`max_bytes`), which is why the long ones are near it.",
            "",
            "CircuitsVis draws its small pictures one after another and is slow where the explorer is not; beyond"
            f" {found['max_cells']} cells the wrapper refuses, and says what to use instead.",
            "",
        ]
    )


def _median(values: list[float]) -> float:
    return statistics.median(values)


def peak_gigabytes() -> float:
    """The most memory that this process held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


def browser_version() -> str:
    """The browser, as it calls itself."""
    with offline_chromium() as driver:
        return f"Chromium {driver.capabilities['browserVersion'].split('.')[0]} (headless)"


def measure(only: Sequence[str] = ()) -> None:
    """Make and open every page, or only some; write docs/evidence/views.json."""
    from rim_lens.views.circuitsvis import MAX_CELLS

    layers, heads, tokens = SIZES[-1]
    with one_thread():
        lines_ = []
        for name in only or PAGES:
            print(name, flush=True)  # noqa: T201 - it takes minutes
            lines_.append(measured(name, MADE / name.replace(" ", "-").replace(",", "")))
    if only:
        content = json.loads(EVIDENCE.read_text(encoding="utf-8"))
        by_name = {line["page"]: line for line in [*content["pages"], *lines_]}
        content["pages"] = [by_name[name] for name in PAGES if name in by_name]
        content["largest"] = list(PAGES).index(f"head explorer, {layers} × {heads}")
        write_json(EVIDENCE, content)
        return
    content = provenance(COMMAND, ("torch", "transformers", "transformer-lens", "plotly", "circuitsvis"))
    content |= {
        "browser": browser_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[2],
        "largest": list(PAGES).index(f"head explorer, {layers} × {heads}"),
        "peak_gigabytes": peak_gigabytes(),
        "patterns_gigabytes": layers * heads * tokens**2 * 4 / 1e9,
        "max_cells": MAX_CELLS,
        "pages": lines_,
    }
    write_json(EVIDENCE, content)


def main() -> None:
    """Measure, and write evidence and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--page", action="store_true", help="write the page anew from what was measured before"
    )
    parser.add_argument("only", nargs="*", help="measure these pages alone; the others stay as they were")
    asked = parser.parse_args()
    if not asked.page:
        measure(asked.only)
    PAGE.write_text(page(json.loads(EVIDENCE.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
