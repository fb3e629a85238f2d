"""Tiny models of the same weights in every TransformerLens family at hand, and the plain model as oracle.

The numbers of different TransformerLens versions never meet in one process. What holds them together is
the Hugging Face model: each version is compared to it, and its weights come from a fixed seed.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rim_lens.chat.spans import ATOMS, SpanBatch, Spans
from rim_lens.lens import model_facts, wrap_hf
from rim_lens.lens.loading import Family, bridge_class, hooked_class
from rim_lens.prompts.records import Prompt
from tests.oracles import How, saw

VOCABULARY = 71
CONTEXT = 48
TOLERANCE = 1e-5

ARCHITECTURES = ("gpt2_relu", "gpt2_gelu", "llama", "qwen3")
_CLASSES: tuple[tuple[Family, Any], ...] = (("bridge", bridge_class()), ("hooked", hooked_class()))
FAMILIES = tuple(name for name, found in _CLASSES if found is not None)

# TransformerLens reads a tokenizer again from where it came from, each time one is wrapped.
_TOKENIZER_FOLDER = tempfile.TemporaryDirectory(prefix="rim_lens_tokenizer_")

# [prompt, pos, width] before the out-projection or the down-projection → the same, edited
Change = Callable[[int, Tensor], Tensor]


def hf_model(architecture: str, seed: int = 0) -> Any:
    """A random model, every weight (norms and biases too) drawn from a local generator."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    rotary = common | {"hidden_size": 32, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    if architecture.startswith("gpt2"):
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                **common,
                n_positions=CONTEXT,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_inner=44,
                activation_function="relu" if architecture == "gpt2_relu" else "gelu_new",
            )
        )
    elif architecture == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                **rotary, num_hidden_layers=3, num_attention_heads=4, head_dim=8, intermediate_size=40
            )
        )
    elif architecture == "qwen3":  # six heads of 12 on a width of 32: d_head * n_heads is not d_model
        model = Qwen3ForCausalLM(
            Qwen3Config(
                **rotary, num_hidden_layers=2, num_attention_heads=6, head_dim=12, intermediate_size=52
            )
        )
    else:
        raise ValueError(architecture)
    fill(model, seed)
    return model.eval().requires_grad_(False)


def tiny_moe(architecture: str, **changes: Any) -> tuple[Any, Any]:
    """A mixture of experts on the bridge, and the plain model of the same weights."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "attn_implementation": "eager",
        **changes,
    }
    if architecture == "mixtral":
        hf: Any = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4))
    else:
        hf = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**common, num_experts=4, moe_intermediate_size=24, head_dim=8)
        )
    fill(hf)
    hf.eval()
    return wrap_hf(copy.deepcopy(hf), tokenizer(), family="bridge"), hf


def fill(model: Any, seed: int = 0) -> None:
    """Overwrite all weights so that every part matters: attention is sharp, norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim == 1:
                is_scale = name.endswith(("weight", ".w"))
                parameter.copy_(1 + 0.2 * noise if is_scale else 0.1 * noise)
            else:
                parameter.copy_(noise * (1.2 / min(parameter.shape) ** 0.5))


@functools.cache
def tokenizer() -> Any:
    """71 words, one token each, reloadable from disk as TransformerLens wants it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w0"}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token=special["unk_token"]))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.save_pretrained(_TOKENIZER_FOLDER.name)
    return AutoTokenizer.from_pretrained(_TOKENIZER_FOLDER.name)


def wrapped(architecture: str, family: str, seed: int = 0) -> Any:
    """A fresh model with hooks; change it as you like."""
    if not family.startswith("compat"):
        return wrap_hf(hf_model(architecture, seed), tokenizer(), family=family)  # type: ignore[arg-type]
    model = wrap_hf(hf_model(architecture, seed), tokenizer(), family="bridge")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=family == "compat_plain")
    return model


@dataclass
class Pass:
    """What one forward pass of the plain model showed; z and post are what the projections received."""

    logits: Tensor
    patterns: list[Tensor] = field(default_factory=list)  # [prompt, head, query, key]
    z: list[Tensor] = field(default_factory=list)  # [prompt, pos, head, d_head]
    post: list[Tensor] = field(default_factory=list)  # [prompt, pos, neuron]
    attn_out: list[Tensor] = field(default_factory=list)  # [prompt, pos, d_model]
    mlp_out: list[Tensor] = field(default_factory=list)
    resid_post: list[Tensor] = field(default_factory=list)


class Oracle:
    """The Hugging Face model itself, read and edited by plain PyTorch hooks on its projections."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.is_gpt2 = hasattr(hf, "transformer")
        self.blocks = list(hf.transformer.h if self.is_gpt2 else hf.model.layers)
        self.n_heads = hf.config.num_attention_heads

    def out_projection(self, layer: int) -> Any:
        block = self.blocks[layer]
        return block.attn.c_proj if self.is_gpt2 else block.self_attn.o_proj

    def down_projection(self, layer: int) -> Any:
        mlp = self.blocks[layer].mlp
        return mlp.c_proj if self.is_gpt2 else mlp.down_proj

    def zero_rows(self, projection: Any, start: int, stop: int) -> None:
        """Zero the weights that read inputs start … stop (Conv1D holds them as rows, Linear as columns)."""
        with torch.no_grad():
            if self.is_gpt2:
                projection.weight[start:stop] = 0
            else:
                projection.weight[:, start:stop] = 0

    def run(
        self,
        tokens: Tensor,
        mask: Tensor,
        change_z: Change | None = None,
        change_post: Change | None = None,
    ) -> Pass:
        record = Pass(logits=torch.empty(0))

        def before(into: list[Tensor], layer: int, change: Change | None, heads: bool) -> Callable[..., Any]:
            def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                value = args[0]
                if heads:
                    value = value.reshape(*value.shape[:2], self.n_heads, -1)
                if change is not None:
                    value = change(layer, value.clone())
                into.append(value)
                return (value.flatten(2),)

            return hook

        def after(into: list[Tensor]) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Any) -> None:
                into.append(output[0] if isinstance(output, tuple) else output)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for layer, block in enumerate(self.blocks):
                out, down = self.out_projection(layer), self.down_projection(layer)
                for handle in (
                    out.register_forward_pre_hook(before(record.z, layer, change_z, True)),
                    down.register_forward_pre_hook(before(record.post, layer, change_post, False)),
                    out.register_forward_hook(after(record.attn_out)),
                    block.mlp.register_forward_hook(after(record.mlp_out)),
                    block.register_forward_hook(after(record.resid_post)),
                ):
                    stack.callback(handle.remove)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            output = self.hf(tokens, attention_mask=mask, position_ids=positions, output_attentions=True)
        record.logits = output.logits
        record.patterns = list(output.attentions)
        return record


def random_batch(
    seed: int = 0,
    n_prompts: int = 4,
    shortest: int = 9,
    longest: int = 14,
    names: Sequence[str] = ("system", "request", "assistant", "think_open", "cot", "answer"),
    n_generated: int = 0,
    vocabulary: int = VOCABULARY,
) -> SpanBatch:
    """Random tokens, left-padded, and a random partition in which each named atom has a token in every row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n_prompts,), generator=generator)
    lengths[0], lengths[-1] = longest, shortest
    tokens = torch.randint(2, vocabulary, (n_prompts, longest), generator=generator)
    mask = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
    tokens = tokens * mask
    atoms = {name: torch.zeros(n_prompts, longest, dtype=torch.bool) for name in ATOMS}
    for row, length in enumerate(lengths.tolist()):
        start = longest - length
        atoms["sink"][row, start] = True
        places = start + 1 + torch.randperm(length - 1, generator=generator)
        extra = torch.randint(len(names), (length - 1 - len(names),), generator=generator)
        labels = [*range(len(names)), *extra.tolist()]
        for place, label in zip(places.tolist(), labels, strict=True):
            atoms[names[label]][row, place] = True
    return SpanBatch(
        tokens=tokens,
        attention_mask=mask,
        spans=Spans(atoms),
        prompts=tuple(Prompt(id=str(row), text=f"p{row}") for row in range(n_prompts)),
        texts=tuple(f"p{row}" for row in range(n_prompts)),
        think="cot",
        format="random",
        pad_token_id=0,
        n_generated=(n_generated,) * n_prompts if n_generated else (),
    )


@dataclass(frozen=True)
class Case:
    """One architecture in one family, its oracle with the same weights, and a batch. Do not change them."""

    architecture: str
    family: str
    model: Any
    oracle: Oracle
    batch: SpanBatch

    @functools.cached_property
    def truth(self) -> Pass:
        """The plain model's pass over the batch."""
        return self.oracle.run(self.batch.tokens, self.batch.attention_mask)

    @functools.cached_property
    def facts(self) -> Any:
        return model_facts(self.model)

    def edited_oracle(self) -> Oracle:
        """A copy whose weights may be changed."""
        return Oracle(copy.deepcopy(self.oracle.hf))

    def fresh(self) -> Any:
        """A model of the same weights that may be changed."""
        return wrapped(self.architecture, self.family)


@functools.cache
def _case(architecture: str, family: str) -> Case:
    model = wrapped(architecture, family)
    # Seeded apart from the weights, so that token 7 and weight 7 share nothing.
    return Case(architecture, family, model, Oracle(hf_model(architecture)), random_batch(seed=11))


COMPATIBLE = ("compat_plain",) if "bridge" in FAMILIES else ()
CASES = [
    pytest.param((architecture, family), id=f"{architecture}-{family}")
    for architecture in ARCHITECTURES
    for family in (*FAMILIES, *COMPATIBLE)
]


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every architecture in every family, the bridge also in compatibility mode without processing."""
    return _case(*request.param)


@pytest.fixture(scope="session", params=[pytest.param(f, id=f"qwen3-{f}") for f in (*FAMILIES, *COMPATIBLE)])
def case_gqa(request: pytest.FixtureRequest) -> Case:
    """The hardest architecture alone, once per family: for what does not depend on the architecture."""
    return _case("qwen3", request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def case_processed(request: pytest.FixtureRequest) -> Case:
    """The bridge in compatibility mode as TransformerLens sets it by default: folded and centred weights."""
    if "bridge" not in FAMILIES:
        pytest.skip("TransformerLens 2 has no TransformerBridge")
    return _case(request.param, "compat_processed")


def rows_of(batch: SpanBatch, positions: str, extra: int = 0) -> Tensor:
    """Mask [prompt, pos + extra] of the rows an editor's `positions` means, written down independently."""
    n_prompts, width = batch.tokens.shape
    rows = torch.zeros(n_prompts, width + extra, dtype=torch.bool)
    if positions == "all":
        rows[:] = True
    elif positions == "prompt_last":
        rows[:, width - 1] = True
    elif positions == "generated":
        rows[:, width:] = True
    else:
        for row in range(n_prompts):
            for place in range(width):
                rows[row, place] = bool(batch.spans[positions][row, place])
    return rows


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE, how: How = "pass") -> None:
    """Assert equality to the contract's tolerance; `how` the numbers came about is for the table of oracles."""
    saw(
        float((found.float() - expected.float()).abs().max()) if found.shape == expected.shape else math.inf,
        how,
    )
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
