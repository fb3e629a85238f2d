from __future__ import annotations

import torch
from transformers import AutoTokenizer

from rim_lens.organisms.toy.host import D_HEAD, HEADS, TOKEN, toy_model, toy_tokenizer
from rim_lens.prompts.toy import TOY_VOCABULARY, toy_prompts


def test_body_has_the_stated_shapes():
    model = toy_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (71, 64)
    assert shapes["transformer.wpe.weight"] == (24, 64)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (64, 256)
    assert len(model.transformer.h) * model.config.n_head == len(HEADS) == 16
    assert model.config.n_head * D_HEAD == 64
    assert model.config._attn_implementation == "eager"
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)].count(0.0) == len(
        [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    )


def test_every_word_is_one_token_and_survives_decoding():
    tokenizer = toy_tokenizer()
    text = " ".join(TOY_VOCABULARY)
    tokens = tokenizer(text)["input_ids"]
    assert tokens == list(range(71)) == [TOKEN[word] for word in TOY_VOCABULARY]
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == 71


def test_it_is_the_same_after_a_round_trip_through_a_folder(tmp_path):
    first = toy_tokenizer()
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [
        {"role": "user", "content": toy_prompts("harmful")[0].text},
        {"role": "assistant", "content": "REFUSE"},
        {"role": "user", "content": toy_prompts("harmless")[0].text},
    ]
    for tokenizer in (first, again):
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<user>", "<pad>", None)
        assert tokenizer.padding_side == "left"
    texts = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (first, again)]
    assert texts[0] == texts[1]
    assert first(texts[0])["input_ids"] == again(texts[0])["input_ids"]
