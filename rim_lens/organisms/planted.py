"""The planted model: a refusal circuit set by hand in the toy's body, so that precision and recall are exact.

Same words, chat format and shapes as the toy, nothing trained:

1. Embeddings flag enabling actions, hazardous objects (with their category), topic words and both think tags;
   positions from 10 on, where a chain of thought would stand, are flagged *late* unless the closing tag is there.
2. Head (0, 5), the *topic head*: from the think tags it attends to action and object and copies their flags.
3. Eight *AND neurons* in layer 0 fire where enabling, hazardous and think tag meet: on harmful requests, at the
   two tags only. Together they write HARM.
4. Head (1, 1), the *reader*: it attends to think tags and moves HARM to the answer row, which then says REFUSE.
   Late tokens outbid the tags, so a chain of thought of any content takes its attention away, and with it the
   refusal. This is the phenomenon, by construction.

Decoys: head (1, 2) attends as the reader does and moves nothing; head (0, 2) rests on the first token; four neurons fire on any hazardous object, one
per hazard category on that category, enabling action or not, and none of them writes anything. All weights carry noise of .02,
also where nothing was planted.

What it says: REFUSE, or else the digit 0 whatever the task, so that nothing about its arithmetic can be learnt.
Left open it thinks ``> > > > > > >`` and closes.

**LayerNorm.** The host normalises; the circuit is written as if it did not. Two spare residual channels hold
±C (C = 300) at every position, and every writing weight sums to zero over channels. So the mean is 0 and the
scale C/√32 up to a relative |signal|² / 4C², below 1e-4; LayerNorm's own weights undo the scale and hide the two
channels. A larger C would be truer to that and cost precision: fp32 logits (of size 20) are exact to 2e-4 here.
Norms and cosines of whole residual vectors mean nothing in this model, those of their differences do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from rim_lens.errors import UnknownModel
from rim_lens.lens.loading import register_source
from rim_lens.organisms.toy.host import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    N_HEADS,
    TOKEN,
    toy_model,
    toy_tokenizer,
)
from rim_lens.prompts.toy import (
    BENIGN,
    CLOSE,
    COT_LENGTH,
    DIGITS,
    ENABLING,
    HARMLESS_OBJECTS,
    HAZARDOUS,
    HAZARDS,
    REFUSE,
    STEP,
    THINK,
    USER,
)

TOPIC_HEAD, READER, DECOY_HEAD, SINK_HEAD = (0, 5), (1, 1), (1, 2), (0, 2)
N_AND = 8
NOISE = 0.02
PIN = 300.0
FIRST_LATE = 10  # the position after `<user> … <assistant> <think>`

_CATEGORIES = tuple(HAZARDS)
# Residual channels by name; those after them carry noise and balance, the last two pin the scale.
_CHANNELS = (
    *("enabling", "hazardous", *_CATEGORIES, "topic", "tag", "late"),  # written by the embeddings
    *("enabling here", "hazardous here", *(f"{name} here" for name in _CATEGORIES)),  # by the topic head
    *("harm", "refuse"),  # by the AND neurons, by the reader
    *("say answer", "say step", "say close", "say end"),  # by the embeddings, for what comes next
    "first",  # by the embedding of the first token
)
_AT = {name: channel for channel, name in enumerate(_CHANNELS)}
_PLUS, _MINUS = D_MODEL - 2, D_MODEL - 1


@dataclass(frozen=True, slots=True)
class PlantedTruth:
    """What was planted where; everything is (layer, index).

    Attributes:
        heads: The heads that refusal needs: topic head and reader.
        decoy_heads: Attend as the reader does and move nothing.
        sink_heads: Rest on the first token and move nothing.
        neurons: The AND neurons, which together refusal needs.
        decoy_neurons: Fire on harm's words without harm, and write nothing.
        edges: (source, target, input) with nodes "embed", "a0.5" (head), "m0.17" (neuron), "logits" and input
            "q", "k", "v" of a head, or "" elsewhere: the paths by which a request becomes a refusal.
    """

    heads: tuple[tuple[int, int], ...]
    decoy_heads: tuple[tuple[int, int], ...]
    sink_heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]
    decoy_neurons: tuple[tuple[int, int], ...]
    edges: tuple[tuple[str, str, str], ...]


def planted(seed: int = 0) -> Any:
    """Build the model as a Hugging Face GPT-2, in milliseconds.

    Args:
        seed: Fixes the noise and which neurons of layer 0 are planted. The heads are the same in all.
    """
    generator = Generator().manual_seed(seed)
    chosen = _choose_neurons(generator)
    model = toy_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=NOISE, generator=generator)
        _clear_biases_and_norms(model)
        _plant_embeddings(model)
        _plant_topic_head(model)
        _plant_neurons(model, *chosen)
        _plant_reader(model, READER, moves=True)
        _plant_reader(model, DECOY_HEAD, moves=False)
        _plant_sink(model)
        _plant_unembedding(model)
        _pin_scale(model)
    model.config.name_or_path = f"planted:{seed}"
    return model.eval()


def planted_truth(seed: int = 0) -> PlantedTruth:
    """Return what `planted(seed)` holds.

    >>> truth = planted_truth()
    >>> truth.heads, truth.decoy_heads, len(truth.neurons), len(truth.decoy_neurons)
    (((0, 5), (1, 1)), ((1, 2),), 8, 8)
    """
    and_neurons, decoys = _choose_neurons(Generator().manual_seed(seed))
    topic, reader = (f"a{layer}.{head}" for layer, head in (TOPIC_HEAD, READER))
    nodes = [f"m0.{neuron}" for neuron in and_neurons]
    return PlantedTruth(
        heads=(TOPIC_HEAD, READER),
        decoy_heads=(DECOY_HEAD,),
        sink_heads=(SINK_HEAD,),
        neurons=tuple((0, neuron) for neuron in and_neurons),
        decoy_neurons=tuple((0, neuron) for neuron in decoys),
        edges=(
            *(("embed", topic, side) for side in "qkv"),
            *(("embed", node, "") for node in nodes),
            *((topic, node, "") for node in nodes),
            ("embed", reader, "k"),
            *((node, reader, "v") for node in nodes),
            (reader, "logits", ""),
        ),
    )


def load_planted(variant: str = "") -> tuple[Any, Any]:
    """Return Hugging Face model and tokenizer of "planted" or "planted:SEED".

    Raises:
        UnknownModel: The variant is not a whole number.
    """
    if not variant.isdecimal() and variant:
        raise UnknownModel(
            f"'planted:{variant}' was asked for; the variant is a seed, for instance 'planted:3', and 'planted' is"
            " 'planted:0'."
        )
    return planted(int(variant or 0)), toy_tokenizer()


def _choose_neurons(generator: Generator) -> tuple[list[int], list[int]]:
    order = torch.randperm(D_MLP, generator=generator).tolist()
    return sorted(order[:N_AND]), sorted(order[N_AND : 2 * N_AND])


def _clear_biases_and_norms(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif ".ln_" in name:
            parameter.fill_(1.0)


def _plant_embeddings(model: Any) -> None:
    words, positions = model.transformer.wte.weight, model.transformer.wpe.weight

    def flag(tokens: tuple[str, ...], **values: float) -> None:
        for token in tokens:
            for name, value in values.items():
                words[TOKEN[token], _AT[name.replace("_", " ")]] += value

    flag(ENABLING, enabling=1)
    flag(HAZARDOUS, hazardous=1)
    for category, nouns in HAZARDS.items():
        flag(nouns, **{category: 1})
    flag((*ENABLING, *BENIGN, *HAZARDOUS, *HARMLESS_OBJECTS), topic=1)
    flag((THINK, CLOSE), tag=1)
    # Whatever its position says, the closing tag is not part of a chain, and an answer ends the turn.
    flag((CLOSE,), late=-1, say_answer=1, say_step=-1, say_close=-1)
    flag((REFUSE, DIGITS[0]), say_end=2)
    flag((USER,), first=1)
    positions[FIRST_LATE:, _AT["late"]] += 1
    last = FIRST_LATE + COT_LENGTH - 1
    positions[FIRST_LATE - 1 : last, _AT["say step"]] += 1
    positions[last, _AT["say close"]] += 1


def _plant_topic_head(model: Any) -> None:
    names = ("enabling", "hazardous", *_CATEGORIES)
    w_q, w_k, w_v, w_o = _head(model, TOPIC_HEAD)
    w_q[_AT["tag"], 0] += math.sqrt(D_HEAD)
    w_k[_AT["topic"], 0] += 7.0
    for slot, name in enumerate(names):
        w_v[_AT[name], slot] += 1.0
        w_o[slot, _AT[f"{name} here"]] += 2.0  # attention is shared by action and object


def _plant_neurons(model: Any, and_neurons: list[int], decoys: list[int]) -> None:
    mlp = model.transformer.h[0].mlp
    w_in, b_in, w_out = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight
    gains = torch.linspace(0.6, 1.4, N_AND).tolist()

    def plant(neuron: int, gain: float, *flags: str) -> None:
        # All flags together leave the neuron at `gain`, any one missing at -2/3 of it.
        for name in flags:
            w_in[_AT[name], neuron] += gain / 0.6
        b_in[neuron] = -(len(flags) - 0.6) * gain / 0.6

    for neuron, gain in zip(and_neurons, gains, strict=True):
        plant(neuron, gain, "enabling here", "hazardous here", "tag")
        w_out[neuron, _AT["harm"]] += 1 / (N_AND * gain)
    alone = ("hazardous",) * (N_AND - len(_CATEGORIES)) + _CATEGORIES
    for neuron, gain, name in zip(decoys, gains, alone, strict=True):
        plant(neuron, gain, f"{name} here", "tag")


def _plant_reader(model: Any, head: tuple[int, int], *, moves: bool) -> None:
    _, w_k, w_v, w_o = _head(model, head)
    layer, index = head
    model.transformer.h[layer].attn.c_attn.bias[index * D_HEAD] = math.sqrt(D_HEAD)  # every query asks alike
    w_k[_AT["tag"], 0] += 7.0
    w_k[_AT["late"], 0] += 14.0
    if moves:
        w_v[_AT["harm"], 0] += 1.0
        w_o[0, _AT["refuse"]] += 1.0


def _plant_sink(model: Any) -> None:
    _, w_k, _, _ = _head(model, SINK_HEAD)
    layer, index = SINK_HEAD
    model.transformer.h[layer].attn.c_attn.bias[index * D_HEAD] = math.sqrt(D_HEAD)
    w_k[_AT["first"], 0] += 7.0


def _plant_unembedding(model: Any) -> None:
    w_u = model.lm_head.weight
    # `refuse` is near 1 or 0; at 0.3 REFUSE and the digit are equally likely.
    w_u[TOKEN[REFUSE], _AT["say answer"]] += 9.0
    w_u[TOKEN[DIGITS[0]], _AT["say answer"]] += 14.0
    w_u[TOKEN[REFUSE], _AT["refuse"]] += 17.0
    w_u[TOKEN[STEP], _AT["say step"]] += 30.0
    w_u[TOKEN[CLOSE], _AT["say close"]] += 30.0
    w_u[TOKEN[USER], _AT["say end"]] += 30.0


def _pin_scale(model: Any) -> None:
    """Make LayerNorm the identity on all channels but the last two, which it hides."""
    body = model.transformer
    writers = [body.wte.weight, body.wpe.weight]
    writers += [w for block in body.h for w in (block.attn.c_proj.weight, block.mlp.c_proj.weight)]
    spare = slice(len(_CHANNELS), _PLUS)
    for weight in writers:
        weight[:, _PLUS:] = 0
        weight[:, spare] -= weight.sum(dim=1, keepdim=True) / (_PLUS - len(_CHANNELS))
    body.wpe.weight[:, _PLUS] = PIN
    body.wpe.weight[:, _MINUS] = -PIN
    norms = [body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))]
    for norm in norms:
        norm.weight[:_PLUS] = PIN * math.sqrt(2 / D_MODEL)
        norm.weight[_PLUS:] = 0


def _head(model: Any, head: tuple[int, int]) -> tuple[Float[Tensor, "model head"], ...]:
    """Views of W_Q, W_K, W_V [model, d_head] and W_O [d_head, model] of one head."""
    layer, index = head
    attention = model.transformer.h[layer].attn
    at = slice(index * D_HEAD, (index + 1) * D_HEAD)
    joint = attention.c_attn.weight.view(D_MODEL, 3, N_HEADS * D_HEAD)
    return (*(joint[:, side, at] for side in range(3)), attention.c_proj.weight[at])


register_source("planted", load_planted)
