"""From prompts and components to a labelled dataset, in bounded memory."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS, MAX_TOKENS
from rim_lens.capture_store import DiskStore, MemoryStore, labelled, open_capture
from rim_lens.chat.spans import SpanBatch, require_batch
from rim_lens.errors import CaptureError, NotFinite
from rim_lens.hooks.base import Component, attached, bound
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import (
    AttentionBy,
    Model,
    ModelFacts,
    known_by,
    last_logits,
    model_facts,
    why_not_sdpa,
)
from rim_lens.sharing import each, row_groups

if TYPE_CHECKING:
    import xarray as xr

FORMAT_VERSION = 1

__all__ = ["capture", "open_capture"]


def capture(
    model: Model,
    batch: SpanBatch,
    *components: Component,
    out: str | Path | None = None,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    attention: AttentionBy = "auto",
    progress: bool = False,
) -> xr.Dataset:
    """Run prompts through a model and return what the readers saw, labelled.

    Prompts of like length run together; each reader reduces inside its hooks, so that memory does not grow
    with query × key. Editors among the components are active while the readers read.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts from `ChatFormat.render` or `generate(...).batch`.
        *components: Readers, and editors if wanted.
        out: Folder to stream into (``capture.nc``): memory stays flat in the number of prompts, and a capture cut
            short goes on where it stopped when called again with the same arguments. None keeps all in memory.
        max_rows: Most prompts in one forward pass.
        max_tokens: Most tokens (with padding) in one forward pass; a longer prompt runs alone.
        attention: How the model's attention is computed meanwhile. "sdpa": by PyTorch's fused attention, in about half the
            time at 1 024 tokens and without query × key numbers; only the query rows that readers look at are computed
            besides. "eager": step by step, whole patterns, as a TransformerBridge and a HookedTransformer do. "auto": sdpa
            where it is proven on this model to give the same numbers and nothing works on whole patterns (`BlockAttention`,
            `MoveAttention`, `PatchAttention`, hooks of your own on patterns or scores), else eager.
        progress: Show a progress bar.

    Returns:
        Dataset with dimension ``prompt`` (ids) first and coordinates category, family, kind, n_tokens; attributes
        record model, dtype, digest of the weights, condition and versions, as ``on_the_model`` the hooks that stood on it
        already, where there were some, and as ``attention`` which way it was and, where eager, why.

    Raises:
        CaptureError: No reader, two readers give the same variable, duplicate prompt ids, `out` holds another capture, or
            attention="sdpa" was asked for and cannot be.
        EmptySpan: A reader asks for a span that some prompt lacks; raised before any forward pass.
        NotFinite: A reader saw NaN or infinity; rows stored before stay in `out`.
    """
    if attention not in get_args(AttentionBy):
        raise ValueError(f"attention={attention!r} was asked for; there are 'auto', 'sdpa' and 'eager'.")
    require_batch(batch, "capture")
    readers = [component for component in components if isinstance(component, Reader)]
    editors = [component for component in components if not isinstance(component, Reader)]
    facts = model_facts(model)
    variables = _layout(readers, facts, batch)
    attrs = _attributes(model, facts, batch, readers, editors)
    with ExitStack() as stack:
        # Attaching verifies, so a model that cannot be read stops here.
        stack.enter_context(attached(model, [*editors, *readers], batch, writes=False))
        why_eager = _why_eager(model, attention)
        attrs["attention"] = f"eager ({why_eager})" if why_eager else "sdpa"
        coords = labelled(variables, batch)
        store = (
            MemoryStore(variables, coords, attrs)
            if out is None
            else DiskStore(Path(out), variables, coords, attrs)
        )
        stack.callback(store.close)
        waiting = store.missing()
        lengths = batch.lengths.tolist()
        places = row_groups([lengths[row] for row in waiting], max_tokens, max_rows)
        groups = [sorted(waiting[place] for place in group) for group in places]

        def read(rows: list[int]) -> dict[str, np.ndarray]:
            with bound(components, batch, rows) as part:
                last_logits(
                    model, part.tokens, part.attention_mask, attention="eager" if why_eager else "sdpa"
                )
                return _collect(readers, batch, rows)

        with tqdm(total=len(waiting), desc=f"capture {batch.name}", disable=not progress) as bar:
            for rows, values in zip(groups, each(groups, read, "capture"), strict=True):
                store.write(rows, values)
                bar.update(len(rows))
    return store.dataset() if isinstance(store, MemoryStore) else open_capture(store.path.parent)


def _why_eager(model: Model, asked: AttentionBy) -> str:
    """Why whole patterns are computed; "" where they are not. Components are on the model by now."""
    if asked == "eager":
        return "it was asked for"
    why = why_not_sdpa(model)
    if why and asked == "sdpa":
        raise CaptureError(
            f"attention='sdpa' was asked for, and whole patterns are needed: {why}. Use attention='auto', which takes the eager"
            " way then, or leave out what needs them."
        )
    return why


def _layout(readers: Sequence[Reader], facts: ModelFacts, batch: SpanBatch) -> list[Variable]:
    if not readers:
        raise CaptureError(
            "no reader was given; add one, for instance rl.SpanAttention() or rl.NeuronActivations()."
        )
    ids = [prompt.id for prompt in batch.prompts]
    if len(set(ids)) < len(ids):
        twice = next(item for item in ids if ids.count(item) > 1)
        raise CaptureError(
            f"prompt id {twice!r} occurs more than once; results are labelled by id, so make them unique."
        )
    variables = [variable for reader in readers for variable in reader.layout(facts, batch)]
    names = [variable.name for variable in variables]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CaptureError(f"two readers give {twice!r}; capture them in two calls.")
    return variables


def _collect(readers: Sequence[Reader], batch: SpanBatch, rows: list[int]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for reader in readers:
        for name, tensor in reader.collect().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                bad = next(
                    row for row, item in zip(rows, tensor, strict=True) if not bool(item.isfinite().all())
                )
                raise NotFinite(
                    f"{type(reader).__name__} saw NaN or infinity in {name!r} at prompt {batch.prompts[bad].id!r}."
                    " Load the model in float32, or leave that prompt out."
                )
            values[name] = tensor.numpy()
    return values


def _attributes(
    model: Model,
    facts: ModelFacts,
    batch: SpanBatch,
    readers: Sequence[Reader],
    editors: Sequence[Component],
) -> dict[str, Any]:
    from rim_lens import __version__

    known = known_by(model)  # components of this call are not on it yet
    return {
        **{name: told if isinstance(told, str) else json.dumps(told) for name, told in known.items()},
        "format_version": FORMAT_VERSION,
        "rim_lens": __version__,
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "model": json.dumps(facts.to_dict()),
        "condition": batch.name,
        "think": batch.think,
        "chat_format": batch.format,
        "prompts_digest": batch.digest,
        "readers": json.dumps([repr(reader) for reader in readers]),
        "editors": json.dumps([repr(editor) for editor in editors]),
    }
