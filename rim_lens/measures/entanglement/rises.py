"""How far each neuron rises from the less to the more refused form of a pair: what neurons are chosen by, and p is taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.hooks.activations import Pool
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Model
from rim_lens.measures.entanglement.reading import Site
from rim_lens.measures.neurons.pairs import Pair
from rim_lens.measures.neurons.reading import Response, pooled_activations
from rim_lens.prompts import Prompt

FORMS = ("less", "more")


def forms_of(pairs: Sequence[Pair]) -> dict[str, list[Prompt]]:
    """Both forms of pairs, in their order."""
    return {form: [getattr(pair, form) for pair in pairs] for form in FORMS}


def rises_of(
    model: Model,
    chat: ChatFormat,
    pairs: Sequence[Pair],
    response: Response | Mapping[str, Response],
    *,
    think: str = "off",
    pool: Pool = "max",
    positions: Positions | None = None,
    site: Site = "post",
    max_new_tokens: int = 64,
    max_rows: int = MAX_ROWS,
    folder: Path | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "pair layer neuron"]:
    """Pooled activations of the more refused form minus those of the less refused one, in the unit of the activations.

    Args:
        model: The base model.
        chat: Its chat format.
        pairs: Made pairs.
        response: See `pooled_activations`; or one for each form, by "less" and "more".
        think: As there.
        pool: As there.
        positions: As there.
        site: As there.
        max_new_tokens: As there.
        max_rows: Most prompts in one pass.
        folder: Keep the readings there, and go on from there.
        progress: Show progress bars.
    """
    read = {
        form: pooled_activations(
            model,
            chat,
            prompts,
            think=think,
            response=response[form] if isinstance(response, Mapping) else response,
            pool=pool,
            positions=positions,
            site=site,
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            out=None if folder is None else folder / form,
            progress=progress,
        ).values
        for form, prompts in forms_of(pairs).items()
    }
    return np.asarray(read["more"], dtype=np.float64) - read["less"]
