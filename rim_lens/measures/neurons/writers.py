"""Neurons that write the words of a refusal, told from those that others read: direct effect beside total effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateNeurons
from rim_lens.hooks.ablating import by_layer
from rim_lens.lens import Model, known_by, verify
from rim_lens.measures.edits import Remember, set_effects
from rim_lens.measures.ending import Ending, read_ending, require_close
from rim_lens.measures.neurons.beside import neurons_to_edit, set_name
from rim_lens.measures.neurons.sets import Neuron, NeuronSet
from rim_lens.measures.readings import refusal_reading
from rim_lens.measures.refusal.first_word import Skip, check_answer_is_next
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removal_table import mean_columns
from rim_lens.measures.two_sides import named
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = ("direct", "direct_low", "direct_high", "total", "total_low", "total_high", "share", "writer")
COLUMNS = ("layer", "neuron", *_NUMBERS)
LEAST = 1e-3  # nats; a total effect below is not divided by


def direct_to_logits(
    model: Model,
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron],
    batch: SpanBatch | Sequence[Prompt | str],
    *,
    mostly: float = 0.5,
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    folder: str | Path | None = None,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Say of each neuron how much of its effect on the refusal score it writes there itself.

    *total* is the effect of setting the neuron to zero, at all rows. *direct* is what remains of it when nothing later has a
    hand in: the neuron's own vector (activation × its row of W_out; after the post-norm where the model has one) is taken
    out of the final residual stream at the row that `refusal_score` reads, final norm and unembedding computed exactly. A
    neuron with *share* = direct / total of at least `mostly` is a **logit writer**: its removal takes the words away, and says
    little about where refusal is decided. A safety neuron in the sense of the paper works through later heads and neurons.

    One pass for all direct effects, and one for each neuron, for the whole set, and for the set without its writers.

    What it does not show: effects do not add up, neither over neurons nor of direct and indirect ones (one may undo the
    other: shares below 0 and above 1 come about so). And a writer may still be the last link of refusal's own circuit.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format, by which requests are rendered.
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        batch: Requests, rendered here with the think block empty; or rendered prompts whose think block is closed. Of a
            `NeuronSet`, those that chose it are refused.
        mostly: Smallest share of a writer.
        openers: See `refusal_score`.
        skip: See `refusal_score`.
        folder: Keep total effects there as soon as they are measured, and go on from there when called again.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        One row per neuron: layer, neuron; direct and total, removed − kept in nats, means over requests with bootstrap
        intervals over families; share, of the means, NaN where the total effect is below `LEAST` or not told from 0 by its
        interval; writer. ``attrs``: "set" and "rest" (the set without its writers; None where nothing is left) with the same numbers,
        of all their neurons at once; "writers", and what was asked.

    Raises:
        UnknownNeuron: There is no neuron, or the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts; or the final stream is not the sum of what the layers write, or an
            MLP's output not its activations × W_out, as this model normalises or scales it elsewhere.
        NotEnoughData: The requests are of one family.
        StatisticsError: A request chose the neurons, or `mostly` is out of range.
        ConditionError: As `refusal_score`.
        NotFinite: NaN or infinity in the logits.
        StudyFolderError: The folder holds something else.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = rl.load_prompts("harmful", language="toy", split="evaluate")[::9]
    >>> table = rl.direct_to_logits(model, chat, planted_truth().neurons, asked)
    >>> table.attrs["set"]["total"] < -10, abs(table.attrs["set"]["share"]) < 0.1, table.attrs["writers"]
    (True, True, [])
    """
    import pandas as pd

    if not 0 < mostly <= 1:
        raise StatisticsError(f"mostly={mostly} was asked for; it is a share above 0 and up to 1.")
    facts = verify(model, reads=["post", "mlp_out"], edits=["post"])
    given = list(batch.prompts) if isinstance(batch, SpanBatch) else list(batch)
    chosen = neurons_to_edit(
        neurons if isinstance(neurons, NeuronSet) else list(neurons),
        facts,
        given,
    )
    if not given:
        raise NotEnoughData("no request was given; give harmful requests.")
    prompts = batch if isinstance(batch, SpanBatch) else chat.render(named(given, "harmful"), think="off")
    check_answer_is_next(prompts, "direct_to_logits")
    families = families_of(prompts.prompts)
    if len(set(families)) < 2:
        raise NotEnoughData(
            f"the {len(families)} requests are of one family; intervals need two at least. Give requests of more families."
        )
    openers = opener_texts(openers)
    columns = by_layer(chosen)
    settings: dict[str, Any] = {
        "neurons": [list(neuron) for neuron in chosen],
        "mostly": mostly,
        "openers": openers,
        "skip": skip,
        "condition": prompts.name,
        "digest": prompts.digest,
        "model": facts.to_dict(),
        **known_by(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "direct_to_logits/asked.json")
        remember = kept.lines("direct_to_logits/readings.jsonl").get
    ending = read_ending(
        model,
        facts,
        prompts,
        openers,
        skip=skip,
        whitespace=None,
        max_rows=max_rows,
        also=[(site, layer) for layer in columns for site in ("post", "mlp_out")],
        what="direct_to_logits",
    )
    direct = {
        (layer, neuron): values
        for layer, places in columns.items()
        for neuron, values in zip(
            places, ending.effects(_written(ending, layer, [[place] for place in places])).T, strict=True
        )
    }
    scoring = {} if openers is None else {"openers": openers}
    reading = refusal_reading(model, prompts, skip=skip, max_rows=max_rows, **scoring)

    def total(sets: dict[str, list[Neuron]]) -> dict[str, Float[np.ndarray, " prompt"]]:
        editors = {name: AblateNeurons(members) for name, members in sets.items()}
        found = set_effects(reading, editors, remember, progress, "neurons")[1]
        return dict(zip(sets, found.T, strict=True))

    each = total({set_name([neuron]): [neuron] for neuron in chosen})
    rows = [
        {
            "layer": layer,
            "neuron": neuron,
            **_numbers(direct[layer, neuron], each[set_name([(layer, neuron)])], families, mostly),
        }
        for layer, neuron in chosen
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    writers = [neuron for neuron, is_one in zip(chosen, table["writer"], strict=True) if is_one]
    table.attrs = settings | {"writers": [list(neuron) for neuron in writers]}
    for name, members in (("set", chosen), ("rest", [one for one in chosen if one not in writers])):
        if not members:
            table.attrs[name] = None
            continue
        together = sum(_written(ending, layer, [places]) for layer, places in by_layer(members).items())
        assert isinstance(together, Tensor)  # noqa: S101 - told to the type checker: there are members
        own = ending.effects(together)[:, 0]
        table.attrs[name] = _numbers(
            own, total({set_name(members): members})[set_name(members)], families, mostly
        )
    return table


def _written(
    ending: Ending, layer: int, sets: Sequence[Sequence[int]]
) -> Float[Tensor, "prompt set d_model"]:
    """What sets of a layer's neurons write into the stream; proven to be parts of all that the layer's MLP writes."""
    mlp = ending.model.blocks[layer].mlp
    weight = mlp.W_out.detach()
    post = ending.last.kept["post", layer].to(weight)
    with torch.no_grad():
        whole = post @ weight
        bias = getattr(mlp, "b_out", None)
        whole = whole if bias is None else whole + bias
        each = torch.stack([post[:, list(places)] @ weight[list(places)] for places in sets], dim=1)
        norm = getattr(ending.model.blocks[layer], "ln2_post", None)
        if norm is not None:  # what the norm gives with them, minus what it gives without
            after = norm(whole[:, None])
            each, whole = after - norm(whole[:, None] - each), after[:, 0]
    require_close(
        whole.float().cpu(),
        ending.last.kept["mlp_out", layer],
        ending.facts,
        f"what the MLP of layer {layer} writes is not its activations × W_out (something stands between them and the stream)",
    )
    return each.float().cpu()


def _numbers(
    direct: Float[np.ndarray, " prompt"],
    total: Float[np.ndarray, " prompt"],
    families: Sequence[str],
    mostly: float,
) -> dict[str, Any]:
    found: dict[str, Any] = mean_columns("direct", direct, families, 0) | mean_columns(
        "total", total, families, 0
    )
    told = abs(found["total"]) >= LEAST and found["total_low"] * found["total_high"] > 0
    found["share"] = found["direct"] / found["total"] if told else float("nan")
    return found | {"writer": bool(found["share"] >= mostly)}
