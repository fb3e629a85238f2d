"""The circuit explorer's numbers against other ways to them, where its nodes stand, and its page in a browser."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import NotEnoughData, ReferenceMismatch, ViewTooLarge
from rim_lens.measures.circuits.nodes import (
    END,
    Edge,
    Node,
    edges_between,
    head_node,
    neuron_nodes,
    span_node,
)
from rim_lens.views import CircuitView, circuit_explorer_html, circuit_view, write_circuit_explorer
from rim_lens.views.layered import TALL, layered, points
from rim_lens.views.text import visible
from tests.verdicts import toy_requests
from tests.views.browser import (
    HOSTILE,
    act_until,
    explorer_page,
    harmless,
    pick,
    resize,
)

NAMES = (" ".join(HOSTILE), "careful")  # what a user may call a circuit


@pytest.fixture(scope="module")
def view(planted_circuits: dict[str, rl.Circuit]) -> CircuitView:
    model = rl.load_model("planted")
    named = dict(zip(NAMES, planted_circuits.values(), strict=True))
    return circuit_view(named, model, rl.ChatFormat.from_model(model), *toy_requests(), shown=2)


def column(view: CircuitView, circuit: int, contrast: str, name: str) -> dict[str, float]:
    (told,) = (one for one in view.data["circuits"][circuit]["contrasts"] if one["key"] == contrast)
    return dict(zip((edge["key"] for edge in view.data["edges"]), told["columns"][name], strict=True))


# --- numbers ------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_circuits(
    view: CircuitView, planted_circuits: dict[str, rl.Circuit]
) -> None:
    for place, circuit in enumerate(planted_circuits.values()):
        for contrast in circuit.settings["contrasts"]:
            table = circuit.edges[circuit.edges["contrast"] == contrast].set_index("edge")
            for name in ("effect", "effect_low", "effect_high", "p", "share", "back"):
                assert column(view, place, contrast, name) == pytest.approx(table[name].to_dict())
        told = view.data["circuits"][place]
        nodes = [node["key"] for node in view.data["nodes"]]
        assert {name for name, kept in zip(nodes, told["kept"], strict=True) if kept} == {
            node.name for node in circuit.kept()
        }
        for share in told["shares"]:
            row = circuit.row(share["name"], "harmful", share["node"])
            assert (share["share"], share["low"], share["high"]) == pytest.approx(
                (row["share"], row["share_low"], row["share_high"])
            )
    first = view.data["circuits"][0]
    assert [share["n_random"] for share in first["shares"][:2]] == [3, 3]
    assert "Of 3 random circuits of its shape" in first["shares"][0]["told"]
    # Each request's own effect, and their mean.
    whole = view.arrays[first["contrasts"][0]["requests"]]
    assert whole.shape == (len(view.data["edges"]), first["n"])
    means = dict(zip((edge["key"] for edge in view.data["edges"]), whole.mean(axis=1), strict=True))
    assert means == pytest.approx(column(view, 0, "twins", "effect"), abs=1e-4)


def test_differences_are_those_of_compare_circuits(
    view: CircuitView, planted_circuits: dict[str, rl.Circuit]
) -> None:
    (told,) = view.data["differences"]
    assert (told["first"], told["second"], told["contrast"]) == (0, 1, "twins")
    table = rl.compare_circuits(*planted_circuits.values(), contrast="twins").set_index("edge")
    for name in ("change", "change_low", "p"):
        shown = dict(zip((edge["key"] for edge in view.data["edges"]), told[name], strict=True))
        assert shown == pytest.approx(table[name].to_dict())
    assert table["change"]["L1H1 → refusal"] > 10  # under a chain of thought the reader says nothing


def test_what_nodes_look_at_is_the_cache_s(view: CircuitView) -> None:
    """Masses, rows and activations from TransformerLens's own cache, on the requests that are shown."""
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    ids = view.data["circuits"][0]["requests"]
    bad, good = ({one.id: one for one in kind} for kind in toy_requests())
    asked = [bad[name] for name in ids]
    batches = {
        "off": chat.render(asked, think="off"),
        "twins": chat.render([good[str(one.twin)] for one in asked], think="off"),
        "careful": rl.render_conditions(chat, asked, ["careful"])["careful"],
    }
    runs = {run["name"]: run for run in view.data["circuits"][0]["runs"]}
    assert list(runs) == ["off", "twins", "careful"]
    for name, run in runs.items():
        batch, shown = batches[name], run["prompts"]
        assert (run["n"], len(shown)) == (len(ids), 2)
        patterns = []
        for row in range(len(batch)):
            one = batch.select([row])
            _, cache = model.run_with_cache(one.tokens, attention_mask=one.attention_mask)
            pattern = cache["blocks.1.attn.hook_pattern"][0, 1].numpy()
            patterns.append(pattern[-1][one.spans["request"][0].numpy()].sum())
            if row < 2:
                kept = shown[row]["rows"]["L1H1"]
                rows = np.concatenate([line[: place + 1] for place, line in enumerate(pattern)])
                np.testing.assert_allclose(view.arrays[kept["values"]], rows, atol=1e-5)
                told = shown[row]["activations"]["and L0"]
                values = view.arrays[told["values"]]
                its = [int(label.split("N")[1]) for label in told["names"]]
                post = cache["blocks.0.mlp.hook_post"][0].numpy()
                members = next(node for node in view.data["nodes"] if node["key"] == "and L0")["members"]
                np.testing.assert_allclose(values[0], post[:, members].mean(axis=1), atol=1e-5)
                np.testing.assert_allclose(values[1:], post[:, its].T, atol=1e-5)
        mass = view.arrays[run["masses"]["L1H1"]][run["spans"].index("request")]
        assert mass == pytest.approx(np.mean(patterns), abs=1e-5)


def test_circuits_alone_are_enough_and_what_does_not_fit_is_refused(
    planted_circuits: dict[str, rl.Circuit], tmp_path: Path
) -> None:
    circuit = planted_circuits["off"]
    circuit.save(tmp_path / "kept")
    view = circuit_view(rl.Circuit.load(tmp_path / "kept"))
    assert view.data["circuits"][0]["runs"] == []
    assert "planted" in view.data["title"]
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    with pytest.raises(NotEnoughData, match="without its chat format"):
        circuit_view(circuit, model)
    with pytest.raises(NotEnoughData, match="no circuit"):
        circuit_view({})
    with pytest.raises(ReferenceMismatch, match="other weights"):
        circuit_view(circuit, rl.load_model("planted:1"), chat, *toy_requests())
    with pytest.raises(ViewTooLarge, match="shown="):
        circuit_view(circuit, max_bytes=100)
    fewer = rl.circuit(
        model,
        chat,
        [(1, 1)],
        [],
        *toy_requests(),
        search=rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0),
    )
    with pytest.raises(ReferenceMismatch, match="other nodes"):
        circuit_view({"one": circuit, "other": fewer})


def test_circuits_of_other_requests_are_shown_and_not_compared(
    planted_circuits: dict[str, rl.Circuit],
) -> None:
    from dataclasses import replace

    circuit = planted_circuits["off"]
    other = replace(circuit, settings={**circuit.settings, "evaluate_digest": "another"})
    view = circuit_view({"one": circuit, "other": other})
    assert view.data["differences"] == []
    assert "requests differ" in view.data["not_compared"][0]


# --- where things stand -------------------------------------------------------------------------------


def many(seed: int) -> tuple[list[Node], list[Edge], np.ndarray]:
    """Thirty nodes: ten heads in one layer, others drawn, sets of neurons with long names."""
    rng = np.random.default_rng(seed)
    heads = {(3, head) for head in range(10)} | {
        (int(rng.integers(12)), int(rng.integers(10, 99))) for _ in range(13)
    }
    sets = neuron_nodes("a set with a long name", [(layer, 3) for layer in (0, 3, 7, 11)])
    nodes = [span_node("request"), span_node("think"), *map(head_node, sorted(heads)), *sets, END]
    edges = edges_between(nodes, nodes)
    return nodes, edges, np.abs(rng.normal(size=len(edges)))


@pytest.mark.parametrize("seed", range(3))
def test_thirty_nodes_do_not_touch_and_layers_go_down(seed: int) -> None:
    nodes, edges, weights = many(seed)
    found = layered(nodes, edges, weights.tolist())
    assert set(found.places) == {node.name for node in nodes}
    for one, other in itertools.combinations(found.places.values(), 2):
        apart = abs(one.y - other.y) >= TALL + 2 or abs(one.x - other.x) >= (one.wide + other.wide) / 2 + 2
        assert apart, (one, other)
    for place in found.places.values():
        assert place.wide / 2 <= place.x <= found.width - place.wide / 2
        assert TALL / 2 <= place.y <= found.height - TALL / 2
    for edge, curve in zip(edges, found.curves, strict=True):
        start, end = found.places[edge.sender.name], found.places[edge.receiver.name]
        assert start.y < end.y
        assert (curve[0] == (start.x, start.y + TALL / 2)).all()
        assert abs(curve[3][0] - end.x) < end.wide / 2
        assert np.all(np.diff(points(curve)[:, 1]) > -1e-9)  # it never turns back
    labels = [name for name, _ in found.rows]
    assert (labels[0], labels[-1]) == ("spans", "refusal")


def test_heavy_edges_cross_less_and_keep_off_other_nodes() -> None:
    """Three chains, given in an order in which they cross: they come out side by side; a long edge goes around what lies between."""
    chains = [[head_node((layer, head)) for layer in range(3)] for head in range(3)]
    crossed = [chains[0][0], chains[1][0], chains[2][0], chains[2][1], chains[0][1], chains[1][1]]
    crossed += [chains[1][2], chains[2][2], chains[0][2], END]
    edges = [Edge(a, b, "v") for chain in chains for a, b in itertools.pairwise(chain)]
    found = layered(crossed, edges, [1.0] * len(edges))
    orders = [
        sorted(range(3), key=lambda chain: found.places[chains[chain][layer].name].x) for layer in range(3)
    ]
    assert orders[0] == orders[1] == orders[2]
    line = [head_node((layer, 0)) for layer in range(4)]
    around = Edge(line[0], line[3], "v")
    found = layered([*line, END], [around], [1.0])
    between = [found.places[node.name] for node in line[1:3]]
    for x, y in points(found.curves[0], 60):
        assert all(abs(y - box.y) > TALL / 2 or abs(x - box.x) > box.wide / 2 for box in between)


# --- the page -----------------------------------------------------------------------------------------


@pytest.fixture
def opened(view: CircuitView, browser: Any, tmp_path: Path) -> Any:
    for run in view.data["circuits"][0]["runs"]:
        for prompt in run["prompts"]:
            prompt["tokens"][: len(HOSTILE)] = [visible(token) for token in HOSTILE]
    path = write_circuit_explorer(view, tmp_path / "circuit.html")
    with explorer_page(browser, path) as page:
        yield page


def text_of(browser: Any, what: str) -> str:
    return str(browser.execute_script(f"return document.querySelector('[data-what={what}]').innerText"))


def widths(browser: Any) -> dict[str, float]:
    return dict(
        browser.execute_script(
            "return [...document.querySelectorAll('.edge.found')].map(one => [one.dataset.edge, Number(one.dataset.width)])"
        )
    )


@pytest.mark.chromium
def test_the_page_can_ask_for_nothing_and_shows_names_literally(opened: Any, tmp_path: Path) -> None:
    harmless(opened, tmp_path / "circuit.html", HOSTILE)


@pytest.mark.chromium
def test_a_click_on_a_node_shows_what_it_looks_at(view: CircuitView, opened: Any) -> None:
    from selenium.webdriver.common.by import By

    act_until(
        opened,
        lambda it: it.find_element(By.CSS_SELECTOR, "[data-node=L1H1]"),
        lambda it: text_of(it, "chosen").startswith("L1H1: head, layer 1"),
    )
    run = view.data["circuits"][0]["runs"][0]
    row = "return document.querySelector('[data-what=masses] [data-of=request] td.n').title"
    assert float(opened.execute_script(row)) == pytest.approx(
        view.arrays[run["masses"]["L1H1"]][run["spans"].index("request")], rel=1e-5
    )
    for token in HOSTILE:
        assert "".join(visible(token).split()) in "".join(text_of(opened, "tokens0").split())
    # Another query, by the keyboard: its own row.
    tokens = opened.find_element(By.CSS_SELECTOR, "[data-what=tokens0]")
    from selenium.webdriver.common.keys import Keys

    tokens.send_keys(Keys.ARROW_LEFT)
    opened.execute_script(
        "document.querySelector('[data-what=tokens0] .token').dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    tip = opened.execute_script("return document.querySelector('.tip').textContent")
    whole, last = view.arrays[run["prompts"][0]["rows"]["L1H1"]["values"]], run["prompts"][0]["last"]
    assert float(tip.rsplit(" ", 1)[1]) == pytest.approx(float(whole[(last - 1) * last // 2]), rel=1e-5)
    # A set of neurons: its mean over tokens, and single members.
    opened.execute_script(
        "document.querySelector('[data-node=\"and L0\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    told = view.data["circuits"][0]["runs"][0]["prompts"][0]["activations"]["and L0"]
    values = view.arrays[told["values"]]
    for member in ("0", "2"):
        pick(opened, "member", member)
        shown = text_of(opened, "at0").split(": ")[1].split(" at ")[0]
        assert float(shown.replace("−", "-")) == pytest.approx(values[int(member)].max(), rel=1e-5)


@pytest.mark.chromium
def test_the_whole_graph_by_keyboard(view: CircuitView, opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    graph = opened.find_element(By.CSS_SELECTOR, "[data-what=graph]")
    graph.send_keys(Keys.ARROW_DOWN)
    nodes = view.data["nodes"]
    seen = [text_of(opened, "chosen").split(":")[0]]
    for key in [Keys.ARROW_RIGHT] + [Keys.ARROW_DOWN] * 4 + [Keys.ARROW_UP] * 4 + [Keys.ARROW_LEFT]:
        graph.send_keys(key)
        seen.append(text_of(opened, "chosen").split(":")[0])
    at = {node["name"]: (node["x"], node["y"]) for node in nodes}
    assert seen[0] == nodes[0]["name"]
    assert "refusal" in seen
    assert [at[b][1] > at[a][1] for a, b in itertools.pairwise(seen[1:6])] == [True] * 4
    assert text_of(opened, "said").startswith(seen[-1])
    graph.send_keys(Keys.ESCAPE)
    assert text_of(opened, "chosen").startswith("The circuit’s edges")
    # Edges are buttons of its table.
    button = opened.find_element(By.CSS_SELECTOR, "[data-what=edges] tbody button")
    button.send_keys(Keys.ENTER)
    assert text_of(opened, "chosen") == "request → L0H5.v"


@pytest.mark.chromium
def test_conditions_and_differences_change_widths_and_colours(view: CircuitView, opened: Any) -> None:
    effects = column(view, 0, "twins", "effect")
    found = {"request → L0H5.v", "L0H5 → and L0", "and L0 → L1H1.v", "think → L1H1.v", "L1H1 → refusal"}
    shown = widths(opened)
    assert set(shown) == found
    most = max(map(abs, effects.values()))
    for name, wide in shown.items():
        assert wide == pytest.approx(1 + 9 * abs(effects[name]) / most, abs=0.02)
    stroke = "return document.querySelector('.edge.found path').getAttribute('stroke')"
    assert opened.execute_script(stroke) == view.data["palette"]["blue"]  # negative: refuses less
    # A hint under the pointer: effect, interval, p.
    opened.execute_script(
        "document.querySelector('[data-hit=\"L1H1 → refusal\"]').dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    tip = opened.execute_script("return document.querySelector('.tip').innerText").splitlines()
    p = column(view, 0, "twins", "p")["L1H1 → refusal"]
    assert tip[0] == "L1H1 → refusal"
    assert f"{effects['L1H1 → refusal']:.2f}".replace("-", "−") in tip[1]
    assert float(tip[2].split("=")[1].split(",")[0]) == pytest.approx(p, rel=0.05)
    assert tip[-1] == "the circuit’s"
    # Another contrast, another circuit, and the difference of the two.
    pick(opened, "contrast", "careful")
    assert set(widths(opened)) == {"L1H1 → refusal"}
    pick(opened, "circuit", "1")
    assert "careful" in text_of(opened, "graph-title")
    pick(opened, "minus", "0")
    (told,) = view.data["differences"]
    change = dict(zip((edge["key"] for edge in view.data["edges"]), told["change"], strict=True))
    shown, most = widths(opened), max(map(abs, told["change"]))
    assert found <= set(shown)
    for name in found:
        assert shown[name] == pytest.approx(1 + 9 * abs(change[name]) / most, abs=0.02)
    assert (
        opened.execute_script(stroke.replace(".edge.found", '[data-edge="L1H1 → refusal"]'))
        == view.data["palette"]["found"]
    )
    pick(opened, "circuit", "0")
    pick(opened, "minus", "1")  # the other way round
    assert (
        opened.execute_script(stroke.replace(".edge.found", '[data-edge="L1H1 → refusal"]'))
        == view.data["palette"]["blue"]
    )


@pytest.mark.chromium
def test_random_circuits_stand_beside_the_shares_and_the_theme_follows(
    view: CircuitView, opened: Any
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    shares = text_of(opened, "shares")
    for share in view.data["circuits"][0]["shares"]:
        assert share["told"] in shares
    bars = "return document.querySelectorAll('.share .own, .share .random').length"
    assert opened.execute_script(bars) == 5 + 2
    ink = "return document.querySelector('[data-node=L1H1] text').getAttribute('fill')"
    try:
        for theme in ("light", "dark"):
            opened.execute_cdp_cmd(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            )
            # The page hears of it in a frame of its own.
            wanted = view.data["palette"][theme]["ink"]
            WebDriverWait(opened, 20).until(lambda it, wanted=wanted: it.execute_script(ink) == wanted)
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 800])
def test_labels_of_thirty_nodes_do_not_overlap_and_nothing_sticks_out(
    planted_circuits: dict[str, rl.Circuit], browser: Any, tmp_path: Path, width: int
) -> None:
    nodes, edges, weights = many(0)
    few = circuit_view(planted_circuits["off"])
    picture = layered(nodes, edges, weights.tolist())
    data = {**few.data, **_graph(few, nodes, edges, weights, picture)}
    path = write_circuit_explorer(CircuitView(data, few.arrays, few.circuits), tmp_path / "many.html")
    resize(browser, width)
    browser.get(path.as_uri())
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.graph .node text, .graph .row')].map(one => one.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == len(nodes) + len(picture.rows)
    for one, other in itertools.combinations(boxes, 2):
        beside = one["right"] <= other["left"] or other["right"] <= one["left"]
        assert beside or one["bottom"] <= other["top"] or other["bottom"] <= one["top"], (one, other)
    for shape, text in browser.execute_script(
        "return [...document.querySelectorAll('.graph .node')].map(one => [one.firstChild, one.querySelector('text')].map(it => it.getBoundingClientRect().toJSON()))"
    ):
        assert shape["left"] <= text["left"]
        assert text["right"] <= shape["right"]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def _graph(
    view: CircuitView, nodes: list[Node], edges: list[Edge], weights: np.ndarray, picture: Any
) -> dict[str, Any]:
    """The page's data of another graph, in place of the circuit's."""
    from rim_lens.views.explorer.circuit_building import _edge, _node

    n = len(edges)
    columns = {
        name: [None] * n if name != "n_controls" else [0] * n
        for name in view.data["circuits"][0]["contrasts"][0]["columns"]
    } | {"effect": weights.tolist()}
    contrast = {
        **view.data["circuits"][0]["contrasts"][0],
        "columns": columns,
        "found": (weights > 1.5).tolist(),
    }
    circuit = {**view.data["circuits"][0], "contrasts": [contrast], "kept": [True] * len(nodes)}
    return {
        "nodes": [_node(node, picture.places[node.name]) for node in nodes],
        "edges": [_edge(edge, nodes) for edge in edges],
        "circuits": [circuit],
        "differences": [],
        "picture": {
            "width": picture.width,
            "height": picture.height,
            "rows": [{"name": name, "y": y} for name, y in picture.rows],
            "curves": picture.curves.reshape(n, 8).tolist(),
        },
    }


def test_no_name_can_end_a_tag(view: CircuitView) -> None:
    page = circuit_explorer_html(view)
    assert "<img" not in page
    assert page.count("</script>") == 2 + len(view.arrays)


def test_a_tuned_model_beside_its_base_names_the_same_neurons() -> None:
    """Two models, two circuits of the same nodes: what stands under one name in both is one neuron."""
    base, tuned = rl.load_model("toy"), rl.load_model("toy:deviate")
    chat = rl.ChatFormat.from_model(base)
    requests = toy_requests()
    search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)
    neurons = [(0, neuron) for neuron in range(40)]
    asked = (chat, [(0, 7)], neurons, *requests)
    circuits = {
        "base": rl.circuit(base, *asked, search=search, contrasts=("twins", "tuned"), tuned=tuned),
        "tuned": rl.circuit(tuned, *asked, search=search, gate=False),
    }
    made = circuit_view(circuits, {"base": base, "tuned": tuned}, chat, *requests, tuned=tuned)
    told = [one["runs"] for one in made.data["circuits"]]
    assert [len(runs) for runs in told] == [3, 2]  # off, twins, and the base's words on the tuned model
    named = [
        prompt["activations"][key]["names"]
        for runs in told
        for run in runs
        for prompt in run["prompts"]
        for key in prompt["activations"]
    ]
    assert len(named) > 2
    assert all(one == named[0] for one in named)
    assert len(set(named[0])) == 12
