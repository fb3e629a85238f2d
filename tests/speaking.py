"""Tiny models that write: random ones in the toy language, and ones that write a text given by the test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.lens import wrap_hf
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES, Oracle, hf_model
from tests.true_tokenizers import load_tokenizer

CONTEXT = 128  # of the rotary models; the GPT-2s have 48
# Unequal lengths, so that batches are padded; some kinds matter to `generate`.
REQUESTS = tuple(
    Prompt(id=f"p{number}", text=text, family=f"f{number}", category=f"c{number % 2}", language="toy")
    for number, text in enumerate(
        (
            "make bread please + 3 4 6",
            "ban soup + 1 2",
            "find tree so so so so + 0 0 0",
            "study song",
            "report lamp kindly - 6 5 4 3",
        )
    )
)


@dataclass(frozen=True)
class Spoken:
    """A random model that speaks the toy language, and the plain model of the same weights. Do not change them."""

    architecture: str
    family: str
    model: Any
    oracle: Oracle
    chat: ChatFormat


def toy_speaking(architecture: str, seed: int = 0) -> Any:
    """A Hugging Face model of random weights over the toy words."""
    hf = hf_model(architecture, seed)
    if not architecture.startswith("gpt2"):
        hf.config.max_position_embeddings = CONTEXT  # rotary: no weight depends on it
    return hf


def fresh(architecture: str, family: str, seed: int = 0) -> Any:
    """A model with hooks that may be changed."""
    return wrap_hf(toy_speaking(architecture, seed), toy_tokenizer(), family=family)  # type: ignore[arg-type]


@functools.cache
def speaker(architecture: str, family: str) -> Spoken:
    model = fresh(architecture, family)
    return Spoken(
        architecture, family, model, Oracle(toy_speaking(architecture)), ChatFormat.from_model(model)
    )


@pytest.fixture(
    scope="session", params=[(a, f) for a in ("gpt2_relu", "qwen3") for f in FAMILIES], ids="-".join
)
def spoken(request: pytest.FixtureRequest) -> Spoken:
    """Learned positions and rotary ones with grouped queries, in every family."""
    return speaker(*request.param)


@pytest.fixture(scope="session", params=FAMILIES)
def spoken_gqa(request: pytest.FixtureRequest) -> Spoken:
    """One architecture in every family: for what does not depend on the architecture."""
    return speaker("qwen3", request.param)


def ids_of(batch: SpanBatch, row: int) -> list[int]:
    """The real tokens of a row."""
    return batch.tokens[row][batch.attention_mask[row].bool()].tolist()


def written(batch: SpanBatch, row: int) -> list[int]:
    """The tokens of a row that the model wrote."""
    count = batch.n_generated[row]
    return batch.tokens[row, batch.tokens.shape[1] - count :].tolist()


# Length of the sequence so far → positions whose heads are zeroed
Rows = Callable[[int], Iterable[int]]


def logits_alone(
    oracle: Oracle, ids: Sequence[int], heads: Sequence[tuple[int, int]] = (), rows: Rows = range
) -> torch.Tensor:
    """Last-row logits of the plain model, one prompt, no padding, no cache; heads zeroed at some rows."""

    def change(layer: int, z: torch.Tensor) -> torch.Tensor:
        for its_layer, head in heads:
            if its_layer == layer:
                z[0, list(rows(len(ids))), head] = 0
        return z

    tokens = torch.tensor([list(ids)])
    return oracle.run(tokens, torch.ones_like(tokens), change_z=change).logits[0, -1]


def continued_alone(
    oracle: Oracle,
    ids: Sequence[int],
    steps: int,
    heads: Sequence[tuple[int, int]] = (),
    rows: Rows = range,
    stops: Iterable[int] = (TOKEN["<user>"],),
) -> list[int]:
    """Greedy continuation, the whole sequence computed anew at each step; refuses to decide a near tie."""
    sequence = list(ids)
    for _ in range(steps):
        logits = logits_alone(oracle, sequence, heads, rows)
        first, second = logits.topk(2).values.tolist()
        assert first - second > 2e-5, "a tie: choose another seed"
        sequence.append(int(logits.argmax()))
        if sequence[-1] in set(stops):
            break
    return sequence[len(ids) :]


@dataclass(frozen=True)
class Writer:
    """A model whose next token depends on the position alone, and the table that says which: [token, position]."""

    model: Any
    hf: Any
    table: torch.Tensor

    def teach(self, start: int, says: Sequence[int]) -> Any:
        """Let it write `says` after a prompt of `start` tokens; return the model."""
        self.table.zero_()
        for step, token in enumerate(says):
            self.table[token, start - 1 + step] = 1.0
        return self.model


@functools.cache
def writer(name: str, family: str, n_positions: int = 160) -> Writer:
    """A GPT-2 that reads nothing but positions, with the tokenizer of that name. Shared: teach it before use."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = toy_tokenizer() if name == "toy" else load_tokenizer(name)
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=n_positions,
            n_embd=n_positions,
            n_layer=1,
            n_head=2,
            n_inner=8,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, parameter in hf.named_parameters():
            parameter.fill_(1 if "ln_" in part and part.endswith("weight") else 0)
            # A little of everything, so that every edit shows and logits can be compared.
            if ".attn." in part or ".mlp." in part or "lm_head" in part:
                parameter.normal_(generator=generator, std=0.02)
        hf.transformer.wpe.weight.copy_(torch.eye(n_positions))
    model = wrap_hf(hf, tokenizer, family=family)  # type: ignore[arg-type]
    table = hf.lm_head.weight if family == "bridge" else model.unembed.W_U.T
    return Writer(model, hf, table.detach())
