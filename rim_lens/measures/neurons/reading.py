"""Activations of every neuron on a request and on the answer to it, pooled over tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rim_lens.batching import MAX_ROWS
from rim_lens.capturing import capture
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.errors import (
    CaptureError,
    ConditionError,
    NotEnoughData,
    ReferenceMismatch,
    SpanError,
    UnknownSpan,
)
from rim_lens.folder import ResultFolder
from rim_lens.generation import Generation, generate
from rim_lens.hooks import NeuronActivations
from rim_lens.hooks.activations import Pool
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Model, known_by, model_facts, verify
from rim_lens.prompts import Prompt
from rim_lens.prompts.records import as_prompts

if TYPE_CHECKING:
    import xarray as xr

Response = Literal["own", "none"] | Generation | SpanBatch
NeuronSite = Literal["post", "mlp_out"]

PART = 64  # prompts that are written and read before anything is kept


def pooled_activations(
    model: Model,
    chat: ChatFormat,
    prompts: Sequence[Prompt | str],
    *,
    think: str | Sequence[str] = "off",
    response: Response = "own",
    pool: Pool = "max",
    positions: Positions | None = None,
    site: NeuronSite = "post",
    max_new_tokens: int = 64,
    max_rows: int = MAX_ROWS,
    out: str | Path | None = None,
    progress: bool = False,
) -> xr.DataArray:
    """Read every neuron on request and answer, pooled over tokens: f(a) of the paper (section 4).

    The paper lets the model answer, runs request + answer through it, and takes the maximum over tokens. It does not say
    which tensor of the MLP, nor whether template and end-of-turn tokens count; here it is `hook_post` and every token but
    padding and the first one.

    A maximum grows with the number of tokens, and answers differ in length: `n_tokens` and `n_generated` stand beside the
    values. Two models write different answers to one request, so that a difference between them is one of words as well as
    of weights; give the answers of one of them to both (`response=`) to hold the words fixed. A large activation does not
    show that a neuron matters.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its chat format.
        prompts: Records or strings.
        think: A condition of `render_conditions` ("off", "open", "careful" …); or a chain of thought for all of them or one
            each, closed.
        response: "own": the model answers first, greedily, and request and answer are read (the paper). "none": the prompt
            alone. Or what was written before, by this model or another: a `Generation` or its `batch`, of these very
            prompts in this order; `think` plays no part then.
        pool: "max" (the paper), "mean" or "last".
        positions: Tokens to pool over: None (all but padding and the first), "generated" (the answer alone), "prompt_last", or
            a span's name; a mask only where no answer is to be written and nothing kept.
        site: "post" (neurons), or "mlp_out", the MLP's output, whose channels are no neurons.
        max_new_tokens: Most tokens of an answer; 64 for harmful requests whatever is asked for.
        max_rows: Most prompts in one pass.
        out: Folder to keep activations in, part by part: a reading cut short goes on where it stopped. The texts that the
            model writes are not kept.
        progress: Show progress bars.

    Returns:
        DataArray (prompt, layer, neuron), or (prompt, layer, d_model) for "mlp_out", with coordinates category, family, kind,
        n_tokens (all tokens), n_generated and, where an answer was written, outcome.

    Raises:
        NotEnoughData: There is no prompt.
        ConditionError: An unknown condition, no room to write, or "generated" without an answer.
        ReferenceMismatch: A response is to other prompts.
        SpanError: A response is in another chat format, or a mask was given where the model writes.
        CaptureError: Two prompts have one id, or `out` holds something else.
        EmptySpan: A prompt has no token in that span.
        UnsupportedModel: The MLP is a mixture of experts.
        NotFinite: NaN or infinity.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[:3]
    >>> found = rl.pooled_activations(model, chat, harmful)
    >>> found.dims, found.shape, found["outcome"].values.tolist()
    (('prompt', 'layer', 'neuron'), (3, 2, 256), ['refuse', 'refuse', 'refuse'])
    """
    reader = NeuronActivations(pool=pool, positions=positions, site=site)
    facts = model_facts(model)
    if site == "post":
        facts.refuse_moe("per-neuron work")
    batch = _asked(chat, prompts, think, response)
    writes = isinstance(response, str) and response == "own"
    _check_positions(positions, batch, writes, kept=out is not None)
    verify(model, reads=["pattern", site])
    writing = (
        {"chat": chat, "max_new_tokens": max_new_tokens, "max_rows": max_rows, "progress": progress}
        if writes
        else None
    )
    reading: dict[str, Any] = {"max_rows": max_rows, "progress": progress}
    if out is None:
        return _read(model, batch, reader, writing, reading)
    kept = ResultFolder(out)
    kept.claim(
        {
            "reader": repr(reader),
            "response": response if isinstance(response, str) else "given",
            "max_new_tokens": max_new_tokens if writing else None,
            "prompts_digest": batch.digest,
            "chat_format": chat.name,
            "model": facts.to_dict(),
            **known_by(model),
        },
        "activations.json",
    )
    parts = [
        _kept_part(kept, model, batch, range(start, min(start + PART, len(batch))), reader, writing, reading)
        for start in range(0, len(batch), PART)
    ]
    import xarray as xr

    return parts[0] if len(parts) == 1 else xr.concat(parts, dim="prompt", combine_attrs="override")


def _asked(
    chat: ChatFormat, prompts: Sequence[Prompt | str], think: str | Sequence[str], response: Response
) -> SpanBatch:
    """The prompts to read, with the answer where one was given."""
    records = as_prompts(prompts)
    if not records:
        raise NotEnoughData("no prompt was given to read activations on; give at least one.")
    ids = [prompt.id for prompt in records]
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise CaptureError(
            f"prompt id {twice[0]!r} occurs more than once; results are labelled by id, so make them unique."
        )
    if isinstance(response, str):
        if response not in ("own", "none"):
            raise ConditionError(
                f"response={response!r} was asked for; it is 'own', 'none', or what a model wrote (a Generation or SpanBatch)."
            )
        if not isinstance(think, str):
            return chat.render(records, think=list(think))
        return render_conditions(chat, records, [think])[think]
    batch = response.batch if isinstance(response, Generation) else response
    if batch.format != chat.name:
        raise SpanError(f"the given answers are in format {batch.format!r}, this is {chat.name!r}.")
    theirs = [(prompt.id, prompt.text) for prompt in batch.prompts]
    if theirs != [(prompt.id, prompt.text) for prompt in records]:
        raise ReferenceMismatch(
            f"answers to {len(batch)} prompts were given for {len(records)}, and they are not the same ones in the same order."
            " Give the answers to these very prompts."
        )
    return batch


def _check_positions(positions: Positions | None, batch: SpanBatch, writes: bool, kept: bool) -> None:
    """Refuse before anything is written what could not be read afterwards."""
    if positions is None:
        return
    if not isinstance(positions, str):
        if writes or kept:
            raise SpanError(
                "a mask of positions was given, and"
                + (
                    " the model is to write more, which it could not cover"
                    if writes
                    else " a folder to keep parts in, to which it does not tell itself"
                )
                + ". Name a span; or give the answer (response=rl.generate(...)) with a mask of its batch, and no folder."
            )
        return
    if positions not in ("all", "prompt_last", "generated") and positions not in batch.spans:
        raise UnknownSpan(
            f"positions={positions!r} was asked for; there are 'all', 'prompt_last', 'generated' and the spans"
            f" {', '.join(batch.spans)}."
        )
    if positions == "generated" and not writes and not any(batch.n_generated):
        raise ConditionError(
            "activations of generated tokens were asked for, and nothing is generated; use response='own', or give what was"
            " written."
        )


def _kept_part(
    kept: ResultFolder,
    model: Model,
    batch: SpanBatch,
    rows: range,
    reader: NeuronActivations,
    writing: dict[str, Any] | None,
    reading: dict[str, Any],
) -> xr.DataArray:
    """Prompts of one part, read from its file where that is whole."""
    import xarray as xr

    path = kept.path / f"activations_{rows.start:06d}.nc"
    if not path.exists():
        found = _read(model, batch.select(list(rows)), reader, writing, reading)
        unfinished = path.with_name(path.name + ".part")
        found.to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(path)
    try:
        with xr.open_dataarray(path, engine="h5netcdf") as read:
            return read.load()
    except (OSError, ValueError, KeyError) as problem:
        raise CaptureError(
            f"{path} cannot be read ({problem}). Delete that file and call again: only it is read anew."
        ) from problem


def _read(
    model: Model,
    batch: SpanBatch,
    reader: NeuronActivations,
    writing: dict[str, Any] | None,
    reading: dict[str, Any],
) -> xr.DataArray:
    outcomes: tuple[str, ...] | None = None
    if writing is not None:
        written = generate(model, batch, **writing)
        batch, outcomes = written.batch, tuple(written.outcome)
    data = capture(model, batch, reader, **reading)
    found = data[reader.variable]
    found = found.assign_coords(n_generated=("prompt", list(batch.n_generated or [0] * len(batch))))
    if outcomes is not None:
        found = found.assign_coords(outcome=("prompt", list(outcomes)))
    found.attrs |= {
        "condition": batch.name,
        "response": "own" if writing is not None else ("given" if any(batch.n_generated) else "none"),
        "weights_digest": data.attrs["weights_digest"],
    }
    return found
