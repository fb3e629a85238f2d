"""What removing a set of neurons does: the causal check behind the name *safety neurons*."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.conditions import Conditions
from rim_lens.errors import StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateNeurons
from rim_lens.hooks.ablating import Method
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Model, known_by, verify
from rim_lens.measures.edits import Remember, editor_name
from rim_lens.measures.effect_tables import EffectTables
from rim_lens.measures.heads.table import HeadRule
from rim_lens.measures.neurons.beside import (
    Matched,
    activity_of,
    neurons_to_edit,
    paired_places,
    random_sets,
    set_name,
)
from rim_lens.measures.neurons.sets import Neuron, NeuronSet
from rim_lens.measures.readings import Reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import DIFFERENCE, effect_tables
from rim_lens.measures.removing import asked_of, both_kinds, removal_lines
from rim_lens.prompts import Prompt

VERDICTS = ("refusal", "like random", "general", "none", "not tested")


@dataclass(frozen=True, eq=False, repr=False)
class NeuronEffects(EffectTables):
    """What removing a set of neurons does, beside random sets with as many neurons in each layer.

    Attributes:
        table: One row per measure, kind of prompts and think condition; see `neuron_effects`.
        sets: One row per random set and row of the table: control (number), neurons, measure, kind, condition, change.
        rows: One row per prompt and row of the table: measure, kind, condition, prompt, family, before, after.
        settings: What was asked, the sets, what was used as neutral text, digests of prompts and weights.
    """

    file: ClassVar[str] = "effects.json"

    @property
    def verdict(self) -> str:
        """`verdict_in` the first closed condition, by the rule's own thresholds."""
        return self.verdict_in()

    def verdict_in(self, condition: str | None = None, rule: HeadRule | None = None) -> str:
        """Say in one word what the set is, by a stated rule.

        ===========  ===================================================================================================
        refusal      removal changes the score of harmful requests (p ≤ alpha, at least `min_effect` nats); part of that is
                     missing on their twins (*specificity*: same sign, p ≤ alpha, at least `min_specific` of the effect);
                     and by that part the set stands out among random sets as well (p_controls ≤ alpha)
        like random  the first two, and random sets do as much
        general      harmful requests or twins change, without that difference
        none         neither changes
        not tested   no twins; or too few families or random sets for any p to come to alpha
        ===========  ===================================================================================================

        Args:
            condition: A closed one; None: the first.
            rule: Its alpha, min_effect and min_specific; None: `HeadRule` as it stands.

        Raises:
            StatisticsError: There is no such condition.
        """
        rule = rule or HeadRule()
        if condition is None:
            condition = str(self.table.loc[self.table["measure"] == "score", "condition"].iloc[0])
        effect, twins = (self.row("score", kind, condition) for kind in ("harmful", "harmless"))
        if "specificity" not in set(self.table["measure"]):
            return "not tested"
        gap = self.row("specificity", DIFFERENCE, condition)
        finest = max(2.0 ** (1 - row["n_families"]) for row in (effect, gap))
        if finest > rule.alpha or 1 / (1 + gap["n_controls"]) > rule.alpha:
            return "not tested"
        found = rule.verdict(
            {
                "tested": True,
                "effect": effect["change"],
                "p": effect["p"],
                "effect_twins": twins["change"],
                "p_twins": twins["p"],
                "specificity": gap["change"],
                "p_specific": gap["p"],
            }
        )
        return "like random" if found == "refusal" and not gap["p_controls"] <= rule.alpha else found

    @override
    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}: {self.verdict})"

    @override
    def _repr_html_(self) -> str:
        about = "" if self.verdict != "not tested" else " (see NeuronEffects.verdict_in)"
        return f"{super()._repr_html_()}<p>verdict: <b>{escape(self.verdict)}</b>{about}</p>"


def neuron_effects(
    model: Model,
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    readings: Callable[[Model, SpanBatch], Reading] | None = None,
    n_random_sets: int = 100,
    matched: Matched = None,
    method: Method = "zero",
    reference: SpanBatch | None = None,
    positions: Positions = "all",
    conditions: Conditions = ("off",),
    reasoning: Sequence[Prompt | str] | None = None,
    neutral_text: Sequence[str] | None = None,
    written: bool = False,
    n_written: int = 3,
    max_new_tokens: int = 64,
    openers: Iterable[str] | None = None,
    extract: Callable[[str], Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> NeuronEffects:
    """Remove neurons and measure what changes, beside the same on random neurons of the same layers.

    The causal check of the paper (section 4: neurons set to zero), with what it lacks: twins, pairing by request, intervals,
    and many random sets.

    ==============  ==========================  ===================================================================
    measure         on                          in
    ==============  ==========================  ===================================================================
    score           harmful and harmless        closed conditions: `refusal_score`, nats, or what `readings` reads
    specificity     harmful − harmless          closed conditions: score of each harmful request minus that of its twin
    refuse, comply  harmful and harmless        with `written`: share of replies, judged as by `generate`; *refuse* on
    other, empty                                harmless requests is over-refusal. *other* is neither refusal nor compliance,
                                                *empty* (of these) no word at all: look there for broken output
    correct         reasoning                   every condition but controls: share of right answers written
    answer          reasoning                   closed ones of these: log-probability of the checked answer, nats
    kl              neutral                     with `neutral_text`: KL(plain ‖ edited) of next-token predictions, nats per token
    ==============  ==========================  ===================================================================

    Cost, in sweeps over all requests of a kind, with R random sets: 2 (R + 2) for each closed condition, of which only last
    rows are unembedded; R + 2 over the reasoning questions; 2 (R + 1) over neutral text, whole logits; and as generations,
    which take a pass per token, n_written + 2 over what is written. One more of each kind for `matched`, and one per set over
    the reference for "mean" and "resample". A run into a folder that is stopped goes on where it was.

    What it does not show: that these neurons alone do it, or that no others would take their place after training; nor where
    refusal is *decided*. Neurons of the last layers may do no more than write the words (`direct_to_logits` tells), and a
    model whose refusal they wrote may say nothing sensible instead: read *other* and *empty*. Random sets are matched in
    number and layer; they may be less active (``matched="activity"``).

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        harmful: Requests that should be refused, and did not choose the neurons: of a `NeuronSet` that knows, others are
            refused; of neurons by number nobody can tell.
        harmless: Their twins (by the records' `twin` ids, or plain strings in the same order). Without twins there is no
            specificity, and the verdict is *not tested*.
        readings: Makes the reading that stands as *score* from model and batch, such as `prefix_reading`; None: `refusal_reading`.
        n_random_sets: Random sets at most, as many neurons in each layer; all of them where fewer exist, and look at
            `n_controls`. 0 for none.
        matched: "activity": random neurons about as active, by the set's own `activity`, or by the mean of max-pooled
            activations over these requests in the first condition.
        method: See `AblateNeurons`: "zero", "mean" or "resample".
        reference: Its prompts, for "mean" and "resample".
        positions: Rows at which neurons are edited.
        conditions: Think conditions, see `render_conditions`.
        reasoning: Questions with checked answers; None leaves accuracy out.
        neutral_text: Plain texts that have nothing to do with either; None leaves the KL out.
        written: Whether replies are generated and judged.
        n_written: For how many random sets what is written is measured.
        max_new_tokens: See `generate`.
        openers: Texts that refusals begin with, see `refusal_score`.
        extract: Reads an answer's value, see `reasoning_accuracy`.
        folder: Keep every number there as soon as it is measured, and go on from there when called again.
        seed: Of controls, chains of thought, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        `NeuronEffects`. Columns of its table: measure, kind, condition, unit, n, n_families; before and after (means or
        shares, with 95 % intervals: `share_interval`, else a bootstrap over families); change (after − before, paired by
        prompt, bootstrap over families); p (sign flips over families, where twins are known over those whose twins swap other
        words, max-statistic over the conditions; NaN for kl, which cannot be negative); random (mean change by random sets,
        with the 2.5 and 97.5 % quantiles of sets), percentile of the change's size among theirs, p_controls (its rank, never
        finer than they allow) and n_controls.

    Raises:
        UnknownNeuron: There is no neuron, or the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts.
        ReferenceMismatch: The set is of a model of another shape, or method and reference do not go together.
        StatisticsError: A request chose the neurons, or a number is out of range.
        MissingTwin: Twins are named, and some are not there.
        NotEnoughData: There are no requests of a kind, or of one family only; or no other set of neurons is possible.
        AnswerError: A reasoning question has no checked answer.
        ConditionError: A condition cannot be rendered, or none is closed.
        NotFinite: NaN or infinity in the logits.
        StudyFolderError: The folder holds something else.
        ModelError: The model's hooks do not work as needed.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = [rl.load_prompts(kind, language="toy", split="evaluate")[::3] for kind in ("harmful", "harmless")]
    >>> found = rl.neuron_effects(model, chat, planted_truth().neurons, *asked, n_random_sets=20)
    >>> found.verdict, found.row("score", "harmful", "off")["percentile"]
    ('refusal', 100.0)
    """
    if n_written < 0 or max_new_tokens < 1 or n_random_sets < 0:
        raise StatisticsError(
            f"n_random_sets={n_random_sets}, n_written={n_written} and max_new_tokens={max_new_tokens} were asked for; the last"
            " is at least 1, the others 0."
        )
    facts = verify(model, edits=["post"])
    if not isinstance(neurons, NeuronSet):
        neurons = list(neurons)
    chosen = neurons_to_edit(neurons, facts, [*harmful, *harmless])
    edit = partial(AblateNeurons, method=method, reference=reference)
    edit(chosen, positions=positions)  # refuses a method without its reference
    prompts = both_kinds(harmful, harmless, "removing neurons")
    twins = paired_places(prompts)
    writing = {"max_new_tokens": max_new_tokens}
    openers = opener_texts(openers)
    asked = asked_of(
        model,
        chat,
        prompts,
        reasoning or (),
        conditions,
        score=readings,
        written=written,
        neutral=neutral_text,
        divergence=neutral_text is not None,
        writing=writing,
        openers=openers,
        extract=extract,
        max_rows=max_rows,
        seed=seed,
    )
    controls = random_sets(chosen, facts, n_random_sets, seed)
    if matched is not None:
        first = [reading.batch for measure, _, reading in asked.readings if measure == "score"]
        first = [batch for batch in first if batch.name == first[0].name]
        activity = activity_of(model, neurons, first, matched, max_rows)
        controls = random_sets(chosen, facts, n_random_sets, seed, activity)
    settings = {
        "neurons": [list(neuron) for neuron in chosen],
        "set": set_name(chosen),
        "editor": editor_name(edit),
        "reference": reference and reference.digest,
        "positions": told(positions),
        "matched": matched,
        "readings": sorted({reading.name for measure, _, reading in asked.readings if measure == "score"}),
        **asked.settings(),
        "controls": [[list(neuron) for neuron in control] for control in controls],
        "n_written": min(n_written, len(controls)),
        **writing,
        "openers": openers,
        "seed": seed,
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "neuron_effects/asked.json")
        remember = kept.lines("neuron_effects/readings.jsonl").get
    lines = removal_lines(
        asked,
        lambda members: edit(members, positions=positions),
        chosen,
        controls,
        n_written,
        twins,
        remember=remember,
        progress=progress,
        what="neurons",
    )
    frames = effect_tables(lines, [set_name(control) for control in controls], "neurons", seed)
    found = NeuronEffects(**frames, settings=settings)
    if folder is not None:
        found.save(folder)
    return found
