"""Text under editors, batched and with the key-value cache, against the loop without one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.lens import Head, Model, hook_name, wrap_hf
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from rim_lens.prompts.records import Prompt
from tests.benchmarks.capture import hf_model
from tests.benchmarks.timing import interleaved

STEPS = 24
HEADS: tuple[Head, ...] = ((0, 1), (1, 4), (1, 7))


def zeroed(z: Tensor, hook: Any, heads: list[int]) -> Tensor:
    z = z.clone()
    z[:, :, heads] = 0
    return z


def loop(model: Model, batch: SpanBatch) -> Tensor:
    """What everyone writes: hooks, the whole sequence again at each step, all prompts in one batch."""
    tokens, mask = batch.tokens, batch.attention_mask
    hooks = [(hook_name("z", layer), partial(zeroed, heads=[head])) for layer, head in HEADS]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for _ in range(STEPS):
            logits = model(tokens, attention_mask=mask, return_type="logits")
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens[:, -STEPS:]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def writing(_: int) -> Iterator[dict[str, Any]]:
    """The same tokens, by `rl.generate` and by the loop."""
    hf = hf_model(vocabulary=len(TOKEN), n_layers=2)
    # Words that differ more than what layers add, or it would write one word for ever.
    hf.model.embed_tokens.weight = torch.nn.Parameter(_random(len(TOKEN), 576, seed=2), requires_grad=False)
    unembedding = _random(len(TOKEN), 576, seed=1)
    unembedding[TOKEN["<user>"]] = 0  # the word that ends a turn is never written
    hf.lm_head.weight = torch.nn.Parameter(unembedding, requires_grad=False)
    model = wrap_hf(hf, toy_tokenizer(), family="bridge")
    chat = ChatFormat.from_model(model)
    words = ["make", "bread", "please", "find", "tree", "study", "song", "report", "lamp", "kindly"]
    requests = [
        Prompt(id=f"p{row}", text=" ".join(words[(row + 3 * place) % 10] for place in range(44 + row % 20)))
        for row in range(16)
    ]
    batch = chat.render(requests, think="off")
    editor = rl.AblateHeads(HEADS)
    written: dict[str, Tensor] = {}

    def ours() -> None:
        out = rl.generate(model, batch, editor, max_new_tokens=STEPS, chat=chat)
        written["ours"] = out.batch.tokens[:, -STEPS:]

    def theirs() -> None:
        written["loop"] = loop(model, batch)

    found = interleaved({"loop": theirs, "ours": ours}, 2)
    assert torch.equal(written["ours"], written["loop"])
    assert len(set(written["ours"].flatten().tolist())) >= 8
    ratio = found["loop"] / found["ours"]
    yield {
        "name": f"generate under AblateHeads, {STEPS} tokens each, the same tokens",
        "prompts": f"{len(batch)} of {int(batch.lengths.min())}–{int(batch.lengths.max())} tokens",
        "goal": "≥ 5 ×",
        "ratio": ratio,
        "met": ratio >= 5,
        "value": found["ours"],
        "rival_value": found["loop"],
        "unit": "s",
        "against": "the loop without a cache, one batch",
        "measured": "random model of SmolLM2's width, 2 layers, 71 words",
    }
