"""Composition of weights: how much of what a sender writes lies where a receiver reads, whatever the prompt.

The score of two maps A (what the sender makes of its input) and B (what the receiver makes of its) is ‖B A‖ / (‖B‖ ‖A‖), Frobenius norms
(Elhage et al. 2021, "A mathematical framework for transformer circuits"). A is a head's OV or the output weights of neurons; B
is QK read by the query's or the key's side, OV, or the input weights of neurons (gates among them). The scale of the receiver's norm
counts to its weights, norms on queries and keys are left out.

`all_composition_scores` of TransformerLens gives the same of all heads at once where norms are folded in; this one gives chosen
pairs, neurons as well, on weights as they are.

What it does not show: that the path is used. Weights say what could be heard; `path_effects` says what is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.lens import Model, ModelFacts, model_facts, quiet
from rim_lens.measures.circuits.nodes import Edge, Node, checked_nodes, edges_between, head_node
from rim_lens.measures.controls import percentile_among

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("edge", "sender", "receiver", "input", "composition", "percentile", "n_controls")


class _Map(NamedTuple):
    """A linear map in two factors, input side first, in double: x → x @ first @ second."""

    first: Float[Tensor, "from rank"]
    second: Float[Tensor, "rank to"]


def composition(model: Model, senders: Iterable[Node], receivers: Iterable[Node]) -> pd.DataFrame:
    """Composition scores of heads and neurons.

    Weights alone: how well one part's output fits another's input, whatever the prompt. It does not show that the one hears the
    other on any prompt, or that it matters; `path_effects` measures that.

    Args:
        model: Any HookedTransformer or TransformerBridge.
        senders: Heads and nodes of neurons; other nodes have no weights and are left out.
        receivers: Likewise.

    Returns:
        One row per edge: edge, sender, receiver, input, composition (0 to 1), and its percentile among the other heads of the
        sender's layer into the same input (NaN for neurons), with their number.

    Raises:
        UnknownHead, UnknownNeuron: The model lacks a node.
        UnsupportedModel: The MLP is a mixture of experts.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> table = rl.composition(model, [rl.head_node((0, 5))], [rl.head_node((1, 1))])
    >>> table["input"].tolist()
    ['q', 'k', 'v']
    """
    import pandas as pd

    facts = model_facts(model)
    told, hear = list(senders), list(receivers)
    kinds = ("head", "neurons")
    checked_nodes([node for node in (*told, *hear) if node.kind in kinds], facts)
    edges = [
        edge
        for edge in edges_between(told, hear)
        if edge.sender.kind in kinds and edge.receiver.kind in kinds
    ]
    written: dict[Node, _Map] = {}
    rows = []
    for edge in edges:
        heard = _heard(model, facts, edge)
        others = [
            head_node((edge.sender.layer, head))
            for head in range(facts.n_heads)
            if edge.sender.kind == "head" and head not in edge.sender.members
        ]
        for node in (edge.sender, *others):
            if node not in written:
                written[node] = _written(model, facts, node)
        score = _score(written[edge.sender], heard)
        controls = [_score(written[node], heard) for node in others]
        rows.append(
            {
                "edge": str(edge),
                "sender": edge.sender.name,
                "receiver": edge.receiver.name,
                "input": edge.input,
                "composition": score,
                "percentile": percentile_among(score, controls).percentile if controls else float("nan"),
                "n_controls": len(controls),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _score(sender: _Map, receiver: _Map) -> float:
    """‖sender receiver‖ / (‖sender‖ ‖receiver‖), from products no larger than the ranks."""
    between = sender.second @ receiver.first
    left, right = sender.first.T @ sender.first, receiver.second @ receiver.second.T
    whole = torch.einsum("ij,jk,kl,il->", left, between, right, between)
    norms = _norm(sender) * _norm(receiver)
    return float(whole.clamp(min=0).sqrt() / norms) if norms else 0.0


def _norm(one: _Map) -> float:
    return float(((one.first.T @ one.first) * (one.second @ one.second.T)).sum().clamp(min=0).sqrt())


def _written(model: Model, facts: ModelFacts, node: Node) -> _Map:
    block = model.blocks[node.layer]
    if node.kind == "head":
        (head,) = node.members
        return _Map(_weight(block.attn, "V", facts, head), block.attn.W_O[head].detach().double().cpu())
    weight = block.mlp.W_out[list(node.members)].detach().double().cpu()
    return _Map(torch.eye(len(weight), dtype=torch.float64), weight)


def _heard(model: Model, facts: ModelFacts, edge: Edge) -> _Map:
    node, block = edge.receiver, model.blocks[edge.receiver.layer]
    if edge.input == "mlp":
        scale = _scale(block.ln2, facts)
        weights = [
            getattr(block.mlp, name)[:, list(node.members)]
            for name in ("W_in", "W_gate")
            if getattr(block.mlp, name, None) is not None
        ]
        first = scale[:, None] * torch.cat([weight.detach().double().cpu() for weight in weights], dim=1)
        return _Map(first, torch.eye(first.shape[1], dtype=torch.float64))
    scale = _scale(block.ln1, facts)[:, None]
    (head,) = node.members
    if edge.input == "v":
        return _Map(
            scale * _weight(block.attn, "V", facts, head), block.attn.W_O[head].detach().double().cpu()
        )
    query, key = (scale * _weight(block.attn, way, facts, head) for way in "QK")
    return _Map(query, key.T) if edge.input == "q" else _Map(key, query.T)


def _weight(attention: object, way: str, facts: ModelFacts, head: int) -> Float[Tensor, "d_model d_head"]:
    """A query head's weights; of keys and values, those that it shares."""
    weight = getattr(attention, f"W_{way}").detach()
    return weight[head // (facts.n_heads // weight.shape[0])].double().cpu()


def _scale(norm: object, facts: ModelFacts) -> Float[Tensor, " d_model"]:
    """What a norm multiplies each channel by, beside the row's own scale; 1 where it has been folded in.

    Found by what it makes of a row of mean 0 and mean square 1, since some norms hold their weight as its distance from 1.
    """
    signs = torch.ones(facts.d_model, dtype=facts.dtype, device=facts.device)
    signs[1::2] = -1
    rows = torch.stack([signs, -signs])[None]
    with torch.no_grad(), quiet():
        one, other = norm(rows)[0].double()  # type: ignore[operator]
    return ((one - other) / 2 * signs).cpu()
