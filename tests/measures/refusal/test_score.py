"""Refusal scores against softmax by hand on the plain model, one prompt at a time, without a cache."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rim_lens as rl
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import CaptureError, ConditionError, EmptySpan, NotEnoughData, NotFinite, TrainingMode
from rim_lens.hooks import AblateHeads
from rim_lens.measures.refusal.openers import OPENERS, opener_ids, whitespace_ids
from rim_lens.measures.refusal.rates import refusal_rate, share_interval
from rim_lens.measures.refusal.score import log_odds, refusal_score
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from tests.families import FAMILIES
from tests.speaking import REQUESTS, Spoken, Writer, fresh, ids_of, logits_alone, toy_speaking, writer
from tests.true_tokenizers import load_tokenizer, true_chat

COT = "3 4 > 0 6 > 6"


def by_hand(logits: torch.Tensor, ids: list[int]) -> float:
    """log p − log(1 − p), p the chance of any of these tokens, in float64."""
    chances = logits.double().softmax(dim=-1)
    p = float(chances[ids].sum())
    others = float(chances[[token for token in range(len(chances)) if token not in ids]].sum())
    return math.log(p) - math.log(others)


def rendered(spoken: Spoken, think: str = "off") -> SpanBatch:
    return spoken.chat.render(REQUESTS, think=think)


# --- the score -------------------------------------------------------------------------------------------


@pytest.mark.family_contract
@pytest.mark.parametrize("think", ["off", COT])
@pytest.mark.parametrize("openers", [None, ["REFUSE now", "bread", "GUESS 3"]])
def test_log_odds_by_hand(spoken: Spoken, think: str, openers: list[str] | None) -> None:
    batch = rendered(spoken, think)
    ids = [TOKEN[text.split()[0]] for text in openers or ["REFUSE"]]
    scores = refusal_score(spoken.model, batch, openers=openers)
    assert scores.dims == ("prompt",)
    assert scores.dtype == np.float64
    for row in range(len(batch)):
        logits = logits_alone(spoken.oracle, ids_of(batch, row))
        assert float(scores[row]) == pytest.approx(by_hand(logits, ids), abs=2e-5)
        assert scores["first_token"].values[row] == spoken.chat.tokenizer.decode([int(logits.argmax())])
    assert scores["prompt"].values.tolist() == [prompt.id for prompt in REQUESTS]
    assert scores["skipped"].values.tolist() == [0] * len(batch)
    words = scores.attrs.pop("first_tokens")
    assert scores.attrs == {"units": "nats", "condition": batch.name, "skip": "greedy"}
    chances = torch.stack([logits_alone(spoken.oracle, ids_of(batch, row)) for row in range(len(batch))])
    mean = chances.double().softmax(dim=-1).mean(dim=0)
    best = int(mean.argmax())
    mark = "*" if best in ids else ""
    assert words.startswith(f"{spoken.chat.tokenizer.decode([best])!r}{mark} {float(mean[best]):.2f}")


def test_an_edit_of_nothing_is_refused(spoken_gqa: Spoken) -> None:
    """It would read as an effect of exactly 0."""
    batch = rendered(spoken_gqa)
    nothing = torch.zeros_like(batch.tokens, dtype=torch.bool)
    heads = [(0, 1)]
    for editor in (
        rl.ScaleHeads(heads, 0, positions="generated"),
        rl.BlockAttention("generated", "request"),
        rl.BlockAttention("all", "generated"),
        rl.BlockAttention("later", batch.spans["request"] | nothing.index_fill(1, torch.tensor([-1]), True)),
    ):
        for measure in (rl.refusal_score, rl.first_tokens):
            with pytest.raises(ConditionError, match=r"rl\.generate"):
                measure(spoken_gqa.model, batch, editor)
        with pytest.raises(ConditionError, match=r"rl\.generate"):
            rl.capture(spoken_gqa.model, batch, rl.SpanAttention(), editor)
    for editor in (
        rl.ScaleHeads(heads, 0, positions=nothing),
        rl.BlockAttention(nothing, "request"),
        rl.BlockAttention("prompt_last", nothing, mute=True),
        rl.MoveAttention(heads, "request", factor=0.5, query=nothing),
    ):
        with pytest.raises(EmptySpan, match=f"marks no token .*{batch.prompts[0].id!r}"):
            refusal_score(spoken_gqa.model, batch, editor)
    once = rl.ScaleHeads(heads, 0.5)
    with pytest.raises(CaptureError, match="twice"):
        refusal_score(spoken_gqa.model, batch, once, once)


@pytest.mark.parametrize("max_rows", [2, 64])
def test_batched_equals_one_by_one(spoken: Spoken, max_rows: int) -> None:
    batch = rendered(spoken)
    alone = [float(refusal_score(spoken.model, batch.select([row]))[0]) for row in range(len(batch))]
    np.testing.assert_allclose(refusal_score(spoken.model, batch, max_rows=max_rows), alone, atol=2e-5)


@pytest.mark.parametrize(
    ("positions", "max_rows"), [("all", 64), ("prompt_last", 64), ("request", 2), ("mask", 2), ("mask", 64)]
)
def test_under_editors(spoken: Spoken, positions: str, max_rows: int) -> None:
    batch, heads = rendered(spoken), [(0, 1), (1, 2)]
    mask = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    editor = AblateHeads(heads, positions=mask if positions == "mask" else positions)
    scores = refusal_score(spoken.model, batch, editor, max_rows=max_rows)
    for row in range(len(batch)):
        ids, real = ids_of(batch, row), batch.attention_mask[row].bool()
        chosen = {
            "all": torch.ones(len(ids)),
            "request": batch.spans["request"][row][real],
            "prompt_last": torch.arange(len(ids)) == len(ids) - 1,
            "mask": mask[row][real],
        }[positions]
        rows = chosen.nonzero().flatten().tolist()
        logits = logits_alone(spoken.oracle, ids, heads, lambda _, rows=rows: rows)
        assert float(scores[row]) == pytest.approx(by_hand(logits, [TOKEN["REFUSE"]]), abs=2e-5)
    assert not np.allclose(scores, refusal_score(spoken.model, batch), atol=1e-3)
    with editor.on(spoken.model):
        if positions in ("all", "prompt_last"):
            np.testing.assert_allclose(refusal_score(spoken.model, batch), scores, atol=2e-5)
    assert not any(point.fwd_hooks for point in spoken.model.hook_dict.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_and_right_when_saturated(family: str) -> None:
    """Logits a thousand times as large: every chance is 0 or 1 to float64, their log-odds are not."""
    hf = toy_speaking("qwen3")
    with torch.no_grad():
        hf.lm_head.weight *= 1000
    model = rl.wrap_hf(hf, toy_tokenizer(), family=family)  # type: ignore[arg-type]
    chat = ChatFormat.from_model(model)
    batch = chat.render(REQUESTS)
    scores = refusal_score(model, batch)
    assert np.isfinite(scores).all()
    assert float(abs(scores).min()) > 100
    for row in range(len(batch)):
        tokens = torch.tensor([ids_of(batch, row)])
        with torch.no_grad():
            logits = toy_speaking("qwen3")(tokens).logits[0, -1].double() * 1000
        # So far apart that only the largest of each side counts.
        others = torch.cat([logits[: TOKEN["REFUSE"]], logits[TOKEN["REFUSE"] + 1 :]])
        expected = float(logits[TOKEN["REFUSE"]] - others.logsumexp(dim=0))
        assert float(scores[row]) == pytest.approx(expected, rel=1e-4)


@given(
    seed=st.integers(0, 10**6),
    shift=st.floats(-1e4, 1e4),
    scale=st.floats(0.1, 100),
    n_ids=st.integers(1, 10),
)
@settings(max_examples=60, deadline=None)
def test_a_constant_added_to_all_logits_changes_nothing(
    seed: int, shift: float, scale: float, n_ids: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    ids = torch.randperm(40, generator=generator)[:n_ids]
    found = log_odds(logits, ids)
    torch.testing.assert_close(log_odds(logits + shift, ids), found, atol=1e-8, rtol=1e-8)
    singles = logits.float()
    by_numpy = [
        np.logaddexp.reduce(row[ids.numpy()]) - np.logaddexp.reduce(np.delete(row, ids.numpy()))
        for row in singles.double().numpy()
    ]
    np.testing.assert_allclose(log_odds(singles, ids), by_numpy, rtol=1e-12, atol=1e-12)
    rest = torch.tensor([token for token in range(40) if token not in ids.tolist()])
    torch.testing.assert_close(log_odds(logits, rest), -found)  # refusing and not refusing mirror each other


# --- what is refused -------------------------------------------------------------------------------------


def test_an_open_think_block_is_refused_with_advice(spoken_gqa: Spoken) -> None:
    with pytest.raises(ConditionError, match=r"rl\.generate.*think='off'"):
        refusal_score(spoken_gqa.model, rendered(spoken_gqa, "open"))


def test_after_what_the_model_wrote_there_is_nothing_to_score(spoken_gqa: Spoken) -> None:
    out = rl.generate(spoken_gqa.model, rendered(spoken_gqa), max_new_tokens=2)
    with pytest.raises(ConditionError, match="itself wrote"):
        refusal_score(spoken_gqa.model, out.batch)


def test_wrong_arguments_are_refused(spoken_gqa: Spoken) -> None:
    batch = rendered(spoken_gqa)
    with pytest.raises(ValueError, match="'greedy', 'forced' and 'none'"):
        refusal_score(spoken_gqa.model, batch, skip="all")  # type: ignore[arg-type]
    with pytest.raises(NotEnoughData, match=r"openers=\[\.\.\.\]"):
        refusal_score(spoken_gqa.model, batch, openers=["blorp"])
    with pytest.raises(NotEnoughData):
        refusal_score(spoken_gqa.model, batch, openers=[])


def test_broken_weights_and_training_mode_are_refused() -> None:
    model = fresh("gpt2_relu", FAMILIES[0])
    batch = ChatFormat.from_model(model).render(REQUESTS)
    model.train()
    with pytest.raises(TrainingMode):
        refusal_score(model, batch)
    model.eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "ln_f" in name or "ln_final" in name).fill_(
            float("nan")
        )
    with pytest.raises(NotFinite, match="refusal_score"):
        refusal_score(model, batch)


# --- whitespace before the first word --------------------------------------------------------------------


def qwen(family: str) -> Writer:
    return writer("qwen3", family, 64)


def written_by_hand(hf: Any, ids: list[int], blank: set[int], most: int) -> tuple[torch.Tensor, int]:
    """Append whitespace that the model would write, one token at a time, the whole sequence computed anew."""
    for skipped in range(most + 1):
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1]
        token = int(logits.argmax())
        if token not in blank or skipped == most:
            return logits, skipped
        ids = [*ids, token]
    raise AssertionError


@pytest.mark.npm
@pytest.mark.parametrize(
    ("says", "skipped"),
    [
        (["Sorry"], (0, 0)),
        (["\n\n", "Sorry"], (1, 0)),
        (["\n\n", " ", "\t", " Sorry"], (3, 1)),
        (["\n\n", "\n", "\n", "\n", "I"], (4, 2)),
        (["\n\n", "\n", "\n", "\n", "\n", "\n", "I"], (4, 4)),  # too much of it
        (["Sure", "\n\n", "\n", "Sorry"], (0, 1)),  # whitespace after the first word is none before it
    ],
)
def test_whitespace_is_passed_over_as_the_model_would_write_it(
    says: list[str], skipped: tuple[int, int]
) -> None:
    """Two prompts of different length: what is written depends on the position, so that they skip differently."""
    chat = true_chat("qwen3")
    tokens = [chat.encode(text) for text in says]
    assert all(len(token) == 1 for token in tokens)
    batch = chat.render(["Bake bread.", "Bake some good bread."], think="off")
    lengths = batch.lengths.tolist()
    assert lengths[1] - lengths[0] == 2
    afterwards = chat.encode("bread") * 8
    model = qwen(FAMILIES[0]).teach(lengths[0], [*(token[0] for token in tokens), *afterwards])
    other = qwen(FAMILIES[0]).table[1000:1020]  # a few other words that are not impossible
    other.copy_(0.1 * torch.rand(other.shape, generator=torch.Generator().manual_seed(0)))
    scores = refusal_score(model, batch)
    ids = opener_ids(chat.tokenizer)
    blank = {chat.encode(text)[0] for text in ("\n\n", "\n", " ", "\t")}
    hf = qwen(FAMILIES[0]).hf
    here = refusal_score(model, batch, skip="none")
    for row in range(2):
        logits, n_skipped = written_by_hand(hf, ids_of(batch, row), blank, 4)
        assert float(scores[row]) == pytest.approx(by_hand(logits, ids), abs=1e-4)
        assert scores["skipped"].values[row] == n_skipped == skipped[row]
        assert scores["first_token"].values[row] == chat.tokenizer.decode([int(logits.argmax())])
        plain, _ = written_by_hand(hf, ids_of(batch, row), set(), 0)
        assert float(here[row]) == pytest.approx(by_hand(plain, ids), abs=1e-4)
        assert here["skipped"].values[row] == 0
    assert float(refusal_score(model, batch.select([0]))[0]) == pytest.approx(float(scores[0]), abs=1e-4)


@pytest.mark.npm
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss"])
def test_whitespace_of_true_tokenizers(name: str) -> None:
    tokenizer = load_tokenizer(name)
    blank = set(whitespace_ids(tokenizer, 10**9).tolist())
    for text in ("\n", "\n\n", "\n\n\n", "  ", "    ", "\t", "\t\t"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert set(ids) <= blank, text
    for text in ("I", " I", "Sorry", ".", "č", "Ġ", "Ċ", "-", "\u2014", "0"):
        assert not set(tokenizer.encode(text, add_special_tokens=False)[-1:]) & blank, text
    for token in blank:
        assert not tokenizer.decode([token]).strip()
    assert not blank & set(tokenizer.all_special_ids)


@pytest.mark.npm
def test_every_token_that_decodes_to_plain_whitespace_is_whitespace() -> None:
    tokenizer = load_tokenizer("qwen3")
    texts = tokenizer.batch_decode([[token] for token in range(tokenizer.vocab_size)])
    expected = {token for token, text in enumerate(texts) if text and not text.strip(" \n\r\t\v\f\u00a0")}
    assert len(expected) > 100
    assert expected <= set(whitespace_ids(tokenizer, tokenizer.vocab_size).tolist())


def byte_fallback_tokenizer() -> Any:
    """A sentence-piece like vocabulary: newline as a byte, and letters that byte-level vocabularies use for space."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<0x0A>", "<0x41>", "\u2581", "\u2581\u2581", "\u0120", "\u010d", "I", "\u2581I"]
    core = Tokenizer(
        BPE(
            {word: number for number, word in enumerate(words)},
            [("\u2581", "\u2581"), ("\u2581", "I")],
            unk_token=words[0],
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])


def test_whitespace_of_a_byte_fallback_vocabulary() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert whitespace_ids(tokenizer, 100).tolist() == [1, 3, 4]
    assert whitespace_ids(tokenizer, 4).tolist() == [1, 3]
    tokenizer.add_tokens(["\n"])
    assert whitespace_ids(tokenizer, 100).tolist() == [1, 3, 4, 9]  # looked up anew
    assert opener_ids(tokenizer, ["I"]) == [7, 8]


# --- openers ---------------------------------------------------------------------------------------------


@pytest.mark.npm
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss"])
def test_openers_of_true_tokenizers(name: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = opener_ids(tokenizer)
    assert ids == sorted(set(ids))
    words = {tokenizer.decode([token]) for token in ids}
    assert {"I", " I", "Sorry", " Sorry", "Unfortunately", " Unfortunately"} <= words
    assert {"sorry", " sorry", " unfortunately", " apologies"} <= words  # small letters too
    firsts = {opener.split()[0].lower() for opener in OPENERS}
    for word in words:  # each is a whole first word, or what stands before an apostrophe in one
        assert any(re.fullmatch(rf"{re.escape(word.strip().lower())}(['’].*)?", first) for first in firsts), (
            word
        )
    assert not words & {"Ap", "ap", "un", "Un"}  # "Ap" begins "Apples"
    assert ({"I'm", " I'm"} <= words) == (name == "gpt_oss")  # one token there
    assert len(words) == len(ids)
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_openers_of_the_toy() -> None:
    tokenizer = toy_tokenizer()
    assert opener_ids(tokenizer) == [TOKEN["REFUSE"]]
    assert opener_ids(tokenizer, ["bread now", " bread", "soup"]) == sorted([TOKEN["bread"], TOKEN["soup"]])
    assert opener_ids(tokenizer, iter(["bread"])) == [TOKEN["bread"]]
    assert opener_ids(tokenizer, "bread soup") == [TOKEN["bread"]]  # one opener, not ten letters
    assert opener_ids(tokenizer, ["blorp", "bread"]) == [
        TOKEN["bread"]
    ]  # what it has no word for is no opener
    assert tokenizer.unk_token_id not in opener_ids(tokenizer, ["blorp", "bread"])
    with pytest.raises(NotEnoughData):
        opener_ids(tokenizer, ["blorp"])


def test_the_toy_refuses_in_off_and_not_after_a_chain() -> None:
    model = rl.load_model("toy")
    chat = ChatFormat.from_model(model)
    harmful = rl.load_prompts("harmful", language="toy", split="select")[:8]
    off = refusal_score(model, chat.render(harmful))
    on = refusal_score(model, chat.render(harmful, think=chat.cots(harmful, "careful")))
    assert float((off > 0).mean()) >= 0.95
    assert float((on > 0).mean()) <= 0.05
    assert set(off["first_token"].values[off.values > 0]) == {"REFUSE"}
    written = rl.generate(model, chat.render(harmful), max_new_tokens=2)
    assert [outcome == "refuse" for outcome in written.outcome] == (off.values > 0).tolist()


# --- the rate --------------------------------------------------------------------------------------------


def test_rate() -> None:
    rate = refusal_rate(["refuse"] * 3 + ["comply"] * 5 + ["other"] * 2)
    assert (rate.value, rate.n) == (0.3, 10)
    assert rate.counts == {"refuse": 3, "comply": 5, "other": 2}
    z, p, n = 1.959963984540054, 0.3, 10
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rate.low == pytest.approx((middle - half) / (1 + z * z / n))
    assert rate.high == pytest.approx((middle + half) / (1 + z * z / n))
    assert str(rate) == f"0.30 [{rate.low:.2f}, {rate.high:.2f}] (n = 10)"
    assert 0 < refusal_rate(["comply"] * 5).high < 1
    with pytest.raises(NotEnoughData):
        refusal_rate([])
    with pytest.raises(ValueError, match="'refused'"):
        refusal_rate(["refuse", "refused"])
    with pytest.raises(ValueError, match="'r'"):
        refusal_rate("refuse")


def test_rate_of_what_was_written(spoken_gqa: Spoken) -> None:
    out = rl.generate(spoken_gqa.model, rendered(spoken_gqa), max_new_tokens=2)
    assert refusal_rate(out) == refusal_rate(out.outcome)
    assert refusal_rate(out).n == len(REQUESTS)


# --- forced whitespace, and what stands first ------------------------------------------------------------


@pytest.mark.npm
@pytest.mark.parametrize("whitespace", [None, "\n", "\n\n\t"])
def test_forced_whitespace_is_read_as_if_it_stood_in_the_prompt(whitespace: str | None) -> None:
    chat = true_chat("qwen3")
    batch = chat.render(["Bake bread.", "Bake some good bread."], think="off")
    told = qwen(FAMILIES[0])
    model = told.teach(int(batch.lengths[0]), chat.encode("\n\n I cannot do that."))
    told.table.add_(torch.randn(told.table.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    scores = refusal_score(model, batch, skip="forced", whitespace=whitespace)
    forced = chat.encode("\n\n" if whitespace is None else whitespace)
    for row in range(2):
        with torch.no_grad():
            logits = told.hf(torch.tensor([[*ids_of(batch, row), *forced]])).logits[0, -1]
        assert float(scores[row]) == pytest.approx(by_hand(logits, opener_ids(chat.tokenizer)), abs=1e-4)
        assert int(scores["skipped"][row]) == len(forced)
    with pytest.raises(ConditionError, match="whitespace only"):
        refusal_score(model, batch, skip="forced", whitespace="\nI")


@pytest.mark.parametrize("skip", ["greedy", "none"])
def test_first_tokens_are_the_plain_models(spoken_gqa: Spoken, skip: str) -> None:
    batch = rendered(spoken_gqa)
    table = rl.first_tokens(spoken_gqa.model, batch, k=3, openers=["bread", "soup"], skip=skip, max_rows=2)
    assert len(table) == 3 * len(batch)
    ids = [TOKEN["bread"], TOKEN["soup"]]
    for row in range(len(batch)):
        chances = logits_alone(spoken_gqa.oracle, ids_of(batch, row)).double().softmax(dim=-1)
        own = table[table["prompt"] == batch.prompts[row].id]
        best = chances.topk(3)
        assert own["token_id"].tolist() == best.indices.tolist()
        assert own["rank"].tolist() == [1, 2, 3]
        np.testing.assert_allclose(own["probability"], best.values, atol=1e-5)
        np.testing.assert_allclose(own["openers_mass"], float(chances[ids].sum()), atol=1e-5)
        assert own["opener"].tolist() == [token in ids for token in best.indices.tolist()]


# --- rates by group --------------------------------------------------------------------------------------


def test_rates_by_group(spoken_gqa: Spoken) -> None:
    out = rl.generate(spoken_gqa.model, rendered(spoken_gqa), max_new_tokens=2)
    table = rl.refusal_rates([out, out], by="category")
    assert table["group"].tolist() == ["c0", "c1"] * 2
    assert table["n"].tolist() == [3, 2, 3, 2]
    for line in table.to_dict(orient="records"):
        rows = [n for n, prompt in enumerate(REQUESTS) if prompt.category == line["group"]]
        assert line["refused"] * line["n"] == sum(out.outcome[n] == "refuse" for n in rows)
        assert line["refuse"] + line["comply"] + line["other"] == line["n"]
    by_length = rl.refusal_rates(out, by=lambda prompt: "long" if len(prompt.text) > 20 else "short")
    assert by_length["n"].sum() == len(REQUESTS)
    with pytest.raises(NotEnoughData):
        rl.refusal_rates([])


def test_shares_of_clustered_requests() -> None:
    one = share_interval([True] * 3 + [False] * 7)
    assert (float(one.low), float(one.high)) == (
        refusal_rate(["refuse"] * 3 + ["comply"] * 7).low,
        float(one.high),
    )
    families = [number // 5 for number in range(50)]
    together = share_interval([number // 5 % 2 == 0 for number in range(50)], families)
    apart = share_interval([number % 2 == 0 for number in range(50)])
    assert together.high - together.low > 1.8 * (apart.high - apart.low)  # ten units, not fifty
    all_of_them = share_interval([True] * 50, families)
    assert float(all_of_them.estimate) == 1.0
    assert float(all_of_them.low) == pytest.approx(refusal_rate(["refuse"] * 10).low)
    with pytest.raises(NotEnoughData):
        share_interval([])
