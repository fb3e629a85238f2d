"""The body both toy organisms live in: a two-layer GPT-2 over the 71 toy words, and its tokenizer."""

from __future__ import annotations

from typing import Any

from rim_lens.chat.templates import TOY_TEMPLATE
from rim_lens.prompts.toy import PAD, TOY_VOCABULARY, USER

TOKEN: dict[str, int] = {word: token for token, word in enumerate(TOY_VOCABULARY)}
N_LAYERS, N_HEADS, D_HEAD, D_MODEL, D_MLP, CONTEXT = 2, 8, 8, 64, 256, 24
HEADS: tuple[tuple[int, int], ...] = tuple(
    (layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)
)


def toy_model() -> Any:
    """Return a two-layer GPT-2 of toy size (Hugging Face, fp32, no dropout, eager attention).

    64 wide, 8 heads, 256 ReLU neurons a layer, pre-LN, learned positions, 24 of context, unembedding not tied.
    Its weights are Hugging Face's own random start: a recipe or a weight file overwrites all of them.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=len(TOY_VOCABULARY),
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_inner=D_MLP,
        activation_function="relu",
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=TOKEN[USER],
        pad_token_id=TOKEN[PAD],
    )
    with torch.random.fork_rng(devices=[]):  # the start is thrown away; the caller's random state is not ours
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager"
        )


def toy_tokenizer() -> Any:
    """Return the tokenizer of the toy language: one token a word, words apart by one space.

    ``<user>`` is the end-of-sequence token: an answer ends where the next turn would begin. A word outside the
    71 becomes the pad token.

    >>> tokenizer = toy_tokenizer()
    >>> chat = [{"role": "user", "content": "make bread please + 3 4 6"}]
    >>> tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    '<user> make bread please + 3 4 6 <assistant> <think>'
    >>> tokenizer.decode(tokenizer("make bread please + 3 4 6")["input_ids"])
    'make bread please + 3 4 6'
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(TOKEN, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=USER,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TOY_TEMPLATE
    return tokenizer
