"""Edges against path patching done by brute force: everything else is frozen by hooks, one prompt at a time, no padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import (
    ConditionError,
    ReferenceMismatch,
    StatisticsError,
    UnknownHead,
    UnknownNeuron,
    UnknownSpan,
    UnsupportedModel,
)
from rim_lens.lens import hooked, model_facts
from rim_lens.measures.circuits.directions import direction_node
from rim_lens.measures.circuits.instead import ablated, patched
from rim_lens.measures.circuits.nodes import (
    END,
    Edge,
    Node,
    edges_between,
    head_node,
    neuron_nodes,
    span_node,
)
from rim_lens.measures.circuits.paths import PathRun, path_effects
from rim_lens.measures.heads.direct import direct_effects
from tests.families import FAMILIES, Case, _case, wrapped
from tests.speaking import ids_of

OPENERS = ["w5", "w9"]
SENDER, RECEIVER = head_node((0, 1)), head_node((1, 2))
LOW, HIGH = neuron_nodes("some", [(0, 3), (0, 7), (0, 20), (1, 4), (1, 5)])
SPAN = span_node("request")


def other_tokens(batch: SpanBatch) -> SpanBatch:
    """The same spans with other words, so that every token has its counterpart at its own place."""
    real = batch.attention_mask.bool()
    return replace(batch, tokens=torch.where(real, (batch.tokens * 7 + 3) % 69 + 2, batch.tokens))


class Brute:
    """One prompt of a model and of its source, and passes in which all but the path is frozen."""

    def __init__(self, model: Any, ids: list[int], other: list[int]) -> None:
        self.model, self.facts = model, model_facts(model)
        self.tokens = torch.tensor([ids])
        names = [
            f"blocks.{layer}.{site}"
            for layer in range(self.facts.n_layers)
            for site in ("attn.hook_z", "mlp.hook_post", "hook_attn_out", "hook_mlp_out", "hook_resid_pre")
        ]
        self.clean = self.run([], names)[1]
        self.source = self.run([], names, torch.tensor([other]))[1]

    def run(
        self,
        edits: list[tuple[str, Callable[[Tensor], Tensor]]],
        keep: list[str],
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def kept(tensor: Tensor, hook: Any, name: str) -> None:
            seen[name] = tensor.clone()

        def changed(tensor: Tensor, hook: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
            return change(tensor.clone())

        # What is kept is read before it is edited.
        hooks = [(name, partial(kept, name=name)) for name in keep]
        hooks += [(name, partial(changed, change=change)) for name, change in edits]
        with torch.no_grad(), hooked(self.model, hooks):
            logits = self.model(self.tokens if tokens is None else tokens, return_type="logits")[0, -1]
        return logits, seen

    def score(self, edits: list[Any]) -> float:
        chances = self.run(edits, [])[0].double().softmax(dim=-1)
        return float(chances[[5, 9]].sum().logit())

    def sent(self, sender: Node) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The sender's output of the source run in place of its own."""
        site = "attn.hook_z" if sender.kind == "head" else "mlp.hook_post"
        name = f"blocks.{sender.layer}.{site}"
        return name, partial(_columns, columns=list(sender.members), new=self.source[name])

    def frozen(self, sender: Node) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Everything written after the sender is as it was."""
        written = [
            f"blocks.{layer}.{site}"
            for layer in range(self.facts.n_layers)
            for site in ("hook_attn_out", "hook_mlp_out")
        ]
        first = 2 * sender.layer + (1 if sender.kind == "head" else 2)
        return [(name, partial(_instead, new=self.clean[name])) for name in written[first:]]

    def effect(self, edge: Edge) -> float:
        node, layer = edge.receiver, edge.receiver.layer
        if edge.sender.kind == "span":
            raise AssertionError("spans have an oracle of their own")
        before = [self.sent(edge.sender), *self.frozen(edge.sender)]
        if node.kind == "end":
            return self.score(before) - self.score([])
        if node.kind == "neurons":
            name = f"blocks.{layer}.mlp.hook_post"
            heard = self.run(before, [name])[1][name]
            return self.score(
                [(name, partial(_columns, columns=list(node.members), new=heard))]
            ) - self.score([])
        return self.by_head(node, edge.input, self.run(before, [f"blocks.{layer}.attn.hook_{edge.input}"])[1])

    def by_head(self, node: Node, way: str, heard: dict[str, Tensor]) -> float:
        """Queries, keys or values of all heads of the layer as heard; of what comes of it, the one head's output alone."""
        projection, z = f"blocks.{node.layer}.attn.hook_{way}", f"blocks.{node.layer}.attn.hook_z"
        put = self.run([(projection, partial(_instead, new=heard[projection]))], [z])[1][z]
        return self.score([(z, partial(_columns, columns=list(node.members), new=put))]) - self.score([])

    def span_effect(self, edge: Edge, mask: Tensor) -> float:
        """The layer reads the source's stream on the span, by keys or values alone."""
        layer = edge.receiver.layer
        stream, projection = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_{edge.input}"
        spliced = torch.where(mask[None, :, None], self.source[stream], self.clean[stream])
        heard = self.run([(stream, partial(_instead, new=spliced))], [projection])[1]
        return self.by_head(edge.receiver, edge.input, heard)


def _columns(tensor: Tensor, columns: list[int], new: Tensor) -> Tensor:
    tensor[:, :, columns] = new[:, :, columns]
    return tensor


def _instead(tensor: Tensor, new: Tensor) -> Tensor:
    return new


@pytest.mark.family_contract
def test_edges_are_those_of_brute_force(case: Case) -> None:
    """Every kind of sender, receiver and input; norms before and on queries and keys, grouped heads, gates, rotation, padding."""
    batch = case.batch.select([0, 3])
    source = other_tokens(batch)
    edges = [
        edge
        for edge in edges_between([SENDER, LOW, HIGH, SPAN], [RECEIVER, LOW, HIGH, END])
        if edge.sender.layer >= 0 or edge.receiver is RECEIVER
    ]
    assert len(edges) == 3 + 3 + 2 + 1 + 2 + 3  # into the head, low, high, the end
    found = path_effects(
        case.model,
        batch,
        [SENDER, LOW, HIGH, SPAN],
        [RECEIVER, LOW, HIGH, END],
        patched(source),
        openers=OPENERS,
        max_rows=3,
    )
    assert found["edge"].values.tolist() == list(map(str, edges))
    for row in range(2):
        real = batch.attention_mask[row].bool()
        brute = Brute(case.model, ids_of(batch, row), ids_of(source, row))
        for edge in edges:
            expected = (
                brute.span_effect(edge, batch.spans[edge.sender.name][row][real])
                if edge.sender.kind == "span"
                else brute.effect(edge)
            )
            value = float(found["effect"].sel(edge=str(edge))[row])
            assert value == pytest.approx(expected, abs=1e-4), (str(edge), row)
        np.testing.assert_allclose(found["baseline"][row], brute.score([]), atol=1e-4)
    # Each number above has something to tell, and no two are told apart by luck alone.
    sizes = np.abs(found["effect"].values).max(axis=0)
    assert (sizes > 1e-3).all(), dict(zip(map(str, edges), sizes, strict=True))
    assert not any(point.fwd_hooks for point in case.model.hook_dict.values())


def test_zeroed_heads_reach_the_end_by_their_direct_effects(case_gqa: Case) -> None:
    heads = [head_node(head) for head in case_gqa.facts.heads()]
    found = path_effects(case_gqa.model, case_gqa.batch, heads, [END], ablated(), openers=OPENERS)
    direct = direct_effects(case_gqa.model, case_gqa.batch, openers=OPENERS)
    np.testing.assert_allclose(
        found["effect"].values.reshape(direct["direct_effect"].shape), direct["direct_effect"], atol=2e-5
    )


def test_zeroed_heads_reach_a_direction_by_what_they_write_along_it(case_gqa: Case) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    node = direction_node(case_gqa.model, vector, layer=1)
    heads = [head_node(head) for head in case_gqa.facts.heads()]
    found = path_effects(case_gqa.model, case_gqa.batch, heads, [node], ablated(), openers=OPENERS)["effect"]
    direct = direct_effects(case_gqa.model, case_gqa.batch, direction=vector, layer=1, openers=OPENERS)
    assert found.sizes["edge"] == 6  # heads of layer 1 come too late
    np.testing.assert_allclose(found, -direct["projection"].sel(layer=0), atol=2e-5)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="TransformerLens 4 patches paths on bridges alone")
def test_transformer_lens_gives_the_same_where_it_works() -> None:
    """Heads of a model without grouped keys, one prompt, no padding."""
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this TransformerLens has no direct paths")
    model = wrapped("gpt2_gelu", "bridge")
    batch = _case("gpt2_gelu", "bridge").batch.select([0])
    source = other_tokens(batch)
    caches = {}
    for name, one in (("clean", source), ("corrupted", batch)):  # "clean" is what is patched in
        caches[name] = model.run_with_cache(one.tokens)[1]

    def score(logits: Tensor) -> Tensor:
        return logits[0, -1].double().softmax(dim=-1)[[5, 9]].sum().logit()

    receivers = [head_node((1, head)) for head in range(4)]
    ours = path_effects(model, batch, [SENDER], receivers, patched(source), openers=OPENERS)
    for way in "qkv":
        theirs = patching.get_act_patch_direct_path(
            model, batch.tokens, caches["clean"], caches["corrupted"], score, 0, 1, way, verbose=False
        )
        ways = [f"{SENDER.name} → {node.name}.{way}" for node in receivers]
        np.testing.assert_allclose(
            ours["effect"].sel(edge=ways)[0] + float(ours["baseline"][0]), theirs[1].numpy(), atol=1e-4
        )


def test_the_same_source_changes_nothing_and_costs_nothing(case_gqa: Case, monkeypatch: Any) -> None:
    run = PathRun(
        case_gqa.model, case_gqa.batch, [SENDER, LOW, SPAN], [RECEIVER, END], patched(case_gqa.batch), OPENERS
    )
    monkeypatch.setattr(run, "_scores", lambda *_: pytest.fail("a pass was made"))
    assert np.abs(run.effects(edges_between([SENDER, LOW, SPAN], [RECEIVER, END]))).max() == 0


def test_a_span_without_its_values_is_a_head_that_reads_zeros_there(case_gqa: Case) -> None:
    batch = case_gqa.batch.select([0])
    found = path_effects(case_gqa.model, batch, [SPAN], [RECEIVER], ablated(), openers=OPENERS)["effect"]
    brute = Brute(case_gqa.model, ids_of(batch, 0), ids_of(batch, 0))
    name = "blocks.1.attn.hook_v"
    values = brute.run([], [name])[1][name]
    values[:, batch.spans["request"][0]] = 0
    assert float(found.sel(edge="request → L1H2.v")[0]) == pytest.approx(
        brute.by_head(RECEIVER, "v", {name: values}), abs=1e-4
    )
    assert np.isnan(found.sel(edge="request → L1H2.k")).all()


def test_mistakes(case_gqa: Case) -> None:
    model, batch = case_gqa.model, case_gqa.batch
    effects = partial(path_effects, model, batch, openers=OPENERS)
    with pytest.raises(UnknownHead):
        effects([head_node((2, 0))], [END], ablated())
    with pytest.raises(UnknownNeuron, match="holds no neuron"):
        effects([Node("none", "neurons", 0, ())], [END], ablated())
    with pytest.raises(UnknownSpan):
        span_node("nowhere")
    with pytest.raises(StatisticsError, match="no node"):
        effects([], [END], ablated())
    with pytest.raises(StatisticsError, match="no edge runs"):
        effects([RECEIVER], [SENDER], ablated())
    with pytest.raises(StatisticsError, match="no such way"):
        effects([SENDER], [END], ablated(), edges=[Edge(RECEIVER, SENDER, "q")])
    with pytest.raises(StatisticsError, match="two nodes"):
        effects([Node("a", "head", 0, (1,)), Node("a", "head", 0, (2,))], [END], ablated())
    with pytest.raises(ReferenceMismatch, match="4 are read"):
        effects([SENDER], [END], patched(batch.select([0])))
    with pytest.raises(ReferenceMismatch, match="reference"):
        ablated("mean")
    with pytest.raises(StatisticsError, match="a stream is patched"):
        effects([SPAN], [RECEIVER], ablated("mean", batch))
    with pytest.raises(ConditionError, match="open"):
        path_effects(model, replace(batch, think="open"), [SENDER], [END], ablated(), openers=OPENERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_reads_otherwise_is_refused(family: str) -> None:
    model = wrapped("llama", family)
    batch = _case("llama", family).batch.select([0])
    with (
        hooked(model, [("blocks.1.attn.hook_k", lambda tensor, hook: tensor * 1.1)]),
        pytest.raises(UnsupportedModel, match="k of L1H2 is not norm and projection"),
    ):
        path_effects(model, batch, [SENDER], [RECEIVER], ablated(), openers=OPENERS)
