"""The circuit that users try first: a GPT-2 whose two induction heads were set by hand, in every TransformerLens family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rim_lens.chat.spans import ATOMS, SpanBatch, Spans
from rim_lens.lens import wrap_hf
from rim_lens.measures.circuits.instead import patched
from rim_lens.measures.circuits.nodes import END, head_node
from rim_lens.measures.circuits.paths import path_effects
from rim_lens.prompts import Prompt
from tests.families import FAMILIES, VOCABULARY, tokenizer

WORDS, PLACES, WIDTH, HEADS = 12, 16, 64, 4
PREVIOUS, INDUCTION = (0, 1), (1, 2)
TOKEN, PLACE, BEFORE, OUT = 0, WORDS, WORDS + PLACES, WORDS + PLACES + WORDS  # where residual channels begin
SPARE, PIN = OUT + WORDS, 300.0
ANSWER = 9


def induction_model(seed: int) -> Any:
    """Head 0.1 copies the word before; head 1.2 looks where the word before is its own, and says the word there.

    All weights carry noise. LayerNorm is held to a constant by two pinned channels, as in `rim_lens.organisms.planted`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=PLACES,
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            attn_implementation="eager",
        )
    )
    generator = torch.Generator().manual_seed(seed)
    body = model.transformer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.01, generator=generator)
            if name.endswith("bias"):
                parameter.zero_()
        words, places = torch.arange(WORDS), torch.arange(PLACES)
        body.wte.weight[words, TOKEN + words] += 1
        body.wpe.weight[places, PLACE + places] += 1
        sharp = math.sqrt(12 * WIDTH / HEADS)
        for (layer, head), query, key in (
            (PREVIOUS, (PLACE + places[1:], places[1:]), (PLACE + places[:-1], places[1:])),
            (INDUCTION, (TOKEN + words, words), (BEFORE + words, words)),
        ):
            at = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            attention = body.h[layer].attn
            joint = attention.c_attn.weight.view(WIDTH, 3, WIDTH)
            joint[:, 0, at][query] += math.sqrt(sharp * 4)
            joint[:, 1, at][key] += math.sqrt(sharp * 4)
            joint[:, 2, at][TOKEN + words, words] += 1
            attention.c_proj.weight[at][words, (BEFORE if layer == 0 else OUT) + words] += 1
        model.lm_head.weight[words, OUT + words] += 8
        writers = [body.wte.weight, body.wpe.weight]
        writers += [w for block in body.h for w in (block.attn.c_proj.weight, block.mlp.c_proj.weight)]
        for weight in writers:
            weight[:, -2:] = 0
            weight[:, SPARE:-2] -= weight.sum(dim=1, keepdim=True) / (WIDTH - 2 - SPARE)
        body.wpe.weight[:, -2], body.wpe.weight[:, -1] = PIN, -PIN
        for norm in (body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))):
            norm.weight[:-2], norm.weight[-2:] = PIN * math.sqrt(2 / WIDTH), 0
    return model.eval().requires_grad_(False)


def sequences(repeated: bool) -> SpanBatch:
    """Eight sequences … A w9 … A; or with another word in A's first place."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(8):
        first, other, *rest = [2 + int(i) for i in torch.randperm(7, generator=generator)]
        place = 1 + number % 3
        row = rest[:4]
        row[place:place] = [first if repeated else other, ANSWER]
        rows.append([*row, first])
    tokens = torch.tensor(rows)
    atoms = {name: torch.zeros_like(tokens, dtype=torch.bool) for name in ATOMS}
    atoms["sink"][:, 0], atoms["request"][:, 1:-1], atoms["assistant"][:, -1] = True, True, True
    return SpanBatch(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens),
        spans=Spans(atoms),
        prompts=tuple(Prompt(id=str(row), text=f"p{row}") for row in range(8)),
        texts=tuple(f"p{row}" for row in range(8)),
        think="off",
        format="none",
        pad_token_id=0,
    )


@pytest.mark.family_contract
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_induction_circuit_is_recovered(family: str, seed: int) -> None:
    model = wrap_hf(induction_model(seed), tokenizer(), family=family)  # type: ignore[arg-type]
    clean, other = sequences(True), sequences(False)
    nodes = [head_node((layer, head)) for layer in range(2) for head in range(HEADS)]
    found = path_effects(model, clean, nodes, [*nodes, END], patched(other), openers=[f"w{ANSWER}"])
    mean = found["effect"].mean("prompt").to_series()
    assert (found["baseline"] > 2).all()
    assert len(mean) == 4 * 4 * 3 + 8
    large = mean[mean.abs() > 1].sort_values()
    assert set(large.index) == {"L0H1 → L1H2.k", "L1H2 → refusal"}, large
    assert (large < -3).all()
    assert mean.drop(index=large.index).abs().max() < 0.5
