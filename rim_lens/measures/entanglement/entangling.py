"""Does training move up, on reasoning, the neurons that it moves down on safety; more than other neurons, and than plain drift?

RAS (arXiv 2509.00544, section 4; `rim_lens.measures.shift`) of a set of neurons between a base and a tuned model stands here
beside its rivals, beside all neurons, and beside random sets with as many neurons in each layer.

*Two yardsticks.* Random sets say how large a number is: with as many neurons in each layer, each near one of the set's in
activity on safety and on reasoning prompts (``matched="activity"``), as what is more active moves further under any change
of the weights and RAS has the unit of activations. That rank is no test, though. A set chosen along one contrast moves
together, whatever moves it, and random neurons do not: under weight noise alone such a set ranks in their top 5 % two to
four times as often as it should. So *p* is a rank among sets that were chosen along a contrast as well: harmful requests against
their twins, with the two exchanged at random, family by family (`exchanged_sets`). It held its level where labels mean
nothing and where the tuned model is the base with weight noise (docs/evidence/entanglement_nulls.json).

What none of it shows: that these neurons weaken refusal. A small p says that training moved this set further, both ways,
than sets chosen alike for no reason; freezing it during training, or patching it back, says whether that matters. Nor does it
say that the two have to do with reasoning rather than with training at all: hold it beside a control model that drifted as far.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import ConditionError, NotEnoughData
from rim_lens.hooks.activations import Pool
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Model
from rim_lens.measures.entanglement.between import Neuron, check_options, entangled
from rim_lens.measures.entanglement.reading import (
    ModelReading,
    Site,
    check_requests,
    read_model,
    write_responses,
)
from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.entanglement.rises import rises_of
from rim_lens.measures.held_out import chosen_by, refuse_used
from rim_lens.measures.neurons.pairs import Pair, Pairs, as_pairs
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.shift import Average
from rim_lens.prompts import Prompt

Opening = Model | str | Path | Callable[[], Model] | ModelReading


def entanglement(
    base: Opening,
    tuned: Opening,
    chat: ChatFormat | None,
    harmful: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    neurons: Iterable[Neuron],
    *,
    harmless: Sequence[Prompt | str] | None = None,
    pairs: Pairs | None = None,
    response: Literal["own", "base", "none"] = "own",
    think: str = "off",
    reasoning_think: str = "careful",
    pool: Pool = "max",
    positions: Positions | None = None,
    site: Site = "post",
    average: Average = "prompts_first",
    floor: float | Literal["auto"] | None = "auto",
    controls: Sequence[Iterable[Neuron]] | None = None,
    n_random_sets: int = 100,
    matched: Literal["activity"] | None = "activity",
    n_boot: int = 1000,
    level: float = 0.95,
    max_new_tokens: int = 64,
    n_kl: int | None = 64,
    openers: Iterable[str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Entanglement:
    """Measure how far training moved the same neurons down on safety and up on reasoning, beside what else it moved.

    Both models are read one after the other, with the memory of one, and every reading is kept in `folder`: a run that was
    cut short goes on where it stopped.

    ===================  ===========  ====================================================================================
    metric               of           what it is
    ===================  ===========  ====================================================================================
    ras                  all, set     2 δ⁻δ⁺ / (δ⁻ + δ⁺), in the unit of the activations
    safety_drop          all, set     δ⁻, on harmful requests
    reasoning_rise       all, set     δ⁺, on reasoning prompts
    arithmetic …         all, set     of δ⁻ and δ⁺: arithmetic, geometric, minimum, product
    floored_ras          all, set     RAS with floored denominators, silenced neurons kept
    `l1_…`, `l2_…`       all, set     mean absolute and root mean square change, on safety and on reasoning prompts
    cka_ratio            all, set     (1 − CKA of harmful) / (1 − CKA of harmless) of these neurons' activations
    cka_ratio            model        the same of the residual stream, over all layers
    cka_harmful …        model        debiased linear CKA of base and tuned, mean over layers
    `whitened_cosine_…`  model        of safety and reasoning direction in the base, in the tuned model, and of the safety
                                      direction with what training moved on reasoning (shift)
    kl                   model        KL(base ‖ tuned) per task token
    weight_drift         model        relative L2 distance of all weights
    `refusal_change_…`   model        tuned − base, mean refusal score of harmful and of harmless requests
    ===================  ===========  ====================================================================================

    Intervals resample families of prompts (half of them for CKA, a statistic of pairs); those of quantities that cannot be
    negative lie too high where little moved, as every resample moves a little. What p and percentile show, and what none of
    it shows, is said at the top of this module. Without pairs and without harmless twins there is no p.

    Args:
        base: A model, a name or folder for `load_model`, a function without arguments that loads one, or a `ModelReading`.
        tuned: The same, after training.
        chat: Their chat format; None: found from the base.
        harmful: Requests that should be refused, other ones than chose the neurons.
        reasoning: Reasoning questions.
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        harmless: Requests that should be answered, twins at best; None leaves out what compares with them.
        pairs: Those that chose the neurons: p is then a rank among sets chosen on their exchanged labels, in the base model. None:
            on those of the requests measured, whose p came out at or below .05 up to twice as often as it should where there
            was nothing (docs/evidence/entanglement_nulls.json, "exchanged, requests read").
        response: "own": each model writes its response, and request and response are read (the paper); "base": both read
            what the base wrote, so that only the model differs; "none": the prompts alone.
        think: Think condition of harmful and harmless requests.
        reasoning_think: That of the reasoning prompts.
        pool: See `read_model`.
        positions: See `read_model`.
        site: "post", or "mlp_out" (neurons are then channels of the MLP's output).
        average: See `reciprocal_activation_shift`.
        floor: See `entangled`.
        controls: See `entangled`.
        n_random_sets: See `entangled`.
        matched: See `entangled`.
        n_boot: See `entangled`.
        level: See `entangled`.
        max_new_tokens: Of a response; 64 at most on harmful requests.
        n_kl: Reasoning prompts that KL is read on; None for all.
        openers: See `refusal_score`.
        folder: Where readings and result are kept; None keeps nothing.
        seed: Of random sets and resamples.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Raises:
        NotEnoughData: No neuron, or no prompt of a kind.
        UnknownNeuron: A neuron that the models lack.
        ReferenceMismatch: The models differ in shape or vocabulary.
        StudyFolderError: The folder holds another question.
        ConditionError: A response or condition that cannot be had.
        NotFinite: A model gives NaN or infinity; what was read before stays.
        StatisticsError: An option is unknown or out of range, or a request chose the neurons.

    >>> import rim_lens as rl
    >>> asked = {
    ...     kind: rl.load_prompts(kind, language="toy", split="evaluate")[:8]
    ...     for kind in ("harmful", "harmless", "reasoning")
    ... }
    >>> found = rl.entanglement(
    ...     "toy", "toy:deviate", None, asked["harmful"], asked["reasoning"], [(1, 3), (1, 7)],
    ...     harmless=asked["harmless"], response="none", n_boot=50,
    ... )
    >>> found.value("weight_drift", "model") > 0, found.row("ras")["n_controls"]
    (True, 100)
    """
    check_options(n_random_sets, matched, average, floor, n_boot, level)
    if response not in ("own", "base", "none"):
        raise ConditionError(f"response={response!r} was asked for; there are 'own', 'base' and 'none'.")
    check_requests(harmful, harmless or [], reasoning)
    chosen, made = _checked(neurons, pairs, base, [*harmful, *(harmless or [])])
    asked = (harmful, harmless or [], reasoning)
    writing: dict[str, Any] = {
        "think": think,
        "reasoning_think": reasoning_think,
        "max_new_tokens": max_new_tokens,
        "max_rows": max_rows,
        "progress": progress,
    }
    reading: dict[str, Any] = {
        **writing,
        "pool": pool,
        "positions": positions,
        "site": site,
        "n_kl": n_kl,
        "openers": opener_texts(openers),
    }
    with TemporaryDirectory(prefix="rim_lens_entanglement_") as passing:
        place = Path(passing if folder is None else folder)
        given: Mapping[str, SpanBatch] | None = None
        difference = None
        if isinstance(base, ModelReading):
            before = base
            given = base.written
            if chat is None and not isinstance(tuned, ModelReading):
                raise ConditionError("the base is a reading, which has no chat format; give chat=.")
        else:
            with opened(base) as model:
                chat = chat or ChatFormat.from_model(model)
                own: Literal["own", "none"] = "none" if response == "none" else "own"
                before = read_model(model, chat, *asked, folder=place / "base", response=own, **reading)
                given = before.written
                if made is not None:
                    difference = rises_of(
                        model,
                        chat,
                        made,
                        own,
                        think=think,
                        pool=pool,
                        positions=positions,
                        site=site,
                        max_new_tokens=max_new_tokens,
                        max_rows=max_rows,
                        folder=None if folder is None else place / "pairs",
                        progress=progress,
                    )
                if response == "base" and (given is None or set(given) != set(before.activations)):
                    given = write_responses(model, chat, *asked, **writing)
                del model  # or it would still be there when the tuned one is loaded
        if isinstance(tuned, ModelReading):
            after = tuned
        else:
            if response == "base" and given is None:
                raise ConditionError(
                    "response='base' was asked for, and the base's reading was loaded from a folder, where what it wrote is not"
                    " kept; give the base model."
                )
            assert chat is not None  # noqa: S101 - told to the type checker: found above
            with opened(tuned) as model:
                after = read_model(
                    model,
                    chat,
                    *asked,
                    folder=place / "tuned",
                    against=before,
                    response=given if response == "base" and given is not None else own_or_none(response),
                    **reading,
                )
                del model
        found = entangled(
            before,
            after,
            chosen,
            controls=controls,
            n_random_sets=n_random_sets,
            matched=matched,
            difference=difference,
            difference_families=None if made is None else families_of([pair.more for pair in made]),
            average=average,
            floor=floor,
            n_boot=n_boot,
            level=level,
            seed=seed,
        )
        if folder is not None:
            found.save(folder)
    return found


def _checked(
    neurons: Iterable[Neuron], pairs: Pairs | None, base: Opening, requests: Sequence[Prompt | str]
) -> tuple[Iterable[Neuron], list[Pair] | None]:
    """The neurons, and the pairs that chose them; neither may have seen these requests."""
    chosen = neurons if hasattr(neurons, "neurons") else list(neurons)
    if not list(chosen):
        raise NotEnoughData(
            "entanglement of an empty set of neurons was asked for; give at least one neuron."
        )
    made_by = getattr(neurons, "made_by", {})
    if "select_texts" in made_by:
        refuse_used(made_by, requests, "neurons")
    if pairs is None:
        return chosen, None
    made = as_pairs(pairs)
    if isinstance(base, ModelReading):
        raise ConditionError(
            "pairs= were given, which the base reads, and the base is a reading; give the model."
        )
    refuse_used(chosen_by([form for pair in made for form in (pair.less, pair.more)]), requests, "neurons")
    return chosen, made


def own_or_none(response: str) -> Literal["own", "none"]:
    """What the tuned model reads beside the prompt, where it does not read the base's words."""
    return "none" if response == "none" else "own"


@contextmanager
def opened(
    model: Model | str | Path | Callable[[], Model],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Model]:
    """A model, loaded by name or by a function where it is not there yet, and let go afterwards."""
    from rim_lens.organisms import load_model

    if isinstance(model, str | Path):
        here: Model = load_model(model, device=device, dtype=dtype)
    elif callable(model) and not hasattr(model, "hook_dict"):
        here = model()
    else:
        here = model
    try:
        yield here
    finally:
        del here
        gc.collect()
