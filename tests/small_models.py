"""Random models of Qwen3's kind in any shape, with the toy's words, for what is counted and timed."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.organisms.toy.host import toy_tokenizer
from tests.costs import Asked, Shape

VOCABULARY = 71
CONTEXT = 4096


def shape(
    n_layers: int, n_heads: int, d_head: int = 32, d_model: int | None = None, d_mlp: int | None = None
) -> Shape:
    """A shape with half as many key-value heads as heads, and an MLP three times as wide as the stream."""
    width = d_model or n_heads * d_head
    return Shape(
        f"{n_layers} layers, {n_heads} heads, width {width}",
        n_layers,
        width,
        n_heads,
        n_heads // 2,
        d_head,
        d_mlp or 3 * width,
        VOCABULARY,
    )


def hf_of(shape: Shape) -> Any:
    """A Hugging Face model of this shape, weights drawn from a local generator."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.d_vocab,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_key_value_heads,
            head_dim=shape.d_head,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model.eval()


def model_of(shape: Shape) -> Any:
    """The same with hooks."""
    return rl.wrap_hf(hf_of(shape), toy_tokenizer())


def prompts(model: Any, n: int, length: int, shared: int = 0) -> tuple[SpanBatch, Asked]:
    """Prompts of one length with an empty think block, and what they are to the cost model."""
    chat = ChatFormat.from_model(model)
    words = [word for word in toy_tokenizer().get_vocab() if word.isalpha() and word.islower()]
    frame = chat.render(["please"], think="off")
    room = length - (int(frame.lengths[0]) - 1)
    generator = torch.Generator().manual_seed(1)
    texts = []
    for row in range(n):
        drawn = torch.randint(len(words), (room,), generator=generator).tolist()
        common = [words[place % len(words)] for place in range(max(0, shared - 2))]
        # One word of its own comes first after what is shared, so that nothing more is.
        own = [words[row % len(words)], *(words[place] for place in drawn)]
        texts.append(" ".join([*common, *own][:room]))
    batch = chat.render(texts, think="off")
    found = batch.lengths.tolist()
    if set(found) != {length}:
        raise RuntimeError(f"prompts of {sorted(set(found))} tokens were made, and {length} were asked for")
    return batch, Asked(n, length, min(n_shared(batch), length - 1) if n > 1 else 0)


def n_shared(batch: SpanBatch) -> int:
    """How many tokens all prompts begin with."""
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.tokens, batch.attention_mask, strict=True)]
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
