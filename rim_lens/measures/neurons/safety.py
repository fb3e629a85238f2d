"""Safety-critical neurons: chosen by pairs of requests of which one is refused more, and tested on other requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.conditions import check_condition, leaves_open
from rim_lens.errors import GateNotPassed, NotEnoughData, StatisticsError, UnsupportedModel
from rim_lens.folder import ResultFolder
from rim_lens.hooks.activations import Pool
from rim_lens.lens import Model, ModelFacts, known_by, verify
from rim_lens.measures.gate import MIN_REFUSAL
from rim_lens.measures.gradients import GRADIENT_ROWS
from rim_lens.measures.held_out import chosen_by, refuse_used
from rim_lens.measures.neurons.beside import Matched
from rim_lens.measures.neurons.choosing import Scope, chosen, needed, stability, sweep
from rim_lens.measures.neurons.effects import NeuronEffects, neuron_effects
from rim_lens.measures.neurons.pairs import Pair, Pairs, as_pairs, counterfactual_pairs, pair_sides
from rim_lens.measures.neurons.reading import pooled_activations
from rim_lens.measures.neurons.scoring import difference_of_means, effect_size, neuron_gradients
from rim_lens.measures.neurons.sets import EFFECTS, NeuronSet
from rim_lens.measures.pages import plain
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import sign_flip_test
from rim_lens.measures.twins import families_by_swap
from rim_lens.prompts import Prompt
from rim_lens.prompts.records import as_prompts

if TYPE_CHECKING:
    import xarray as xr

By = Literal["contrast", "effect_size", "gradient"]
SHARE = 0.01  # of the neurons of a layer (or of the model), for m where none is given
ALPHA = 0.05  # of the gate's one-sided test
SIDES = ("less", "more")
_NONE = "no neuron is among the top m of enough pairs; see `sweep` for larger m and smaller shares of pairs"


def safety_neurons(
    model: Model,
    chat: ChatFormat,
    pairs: Pairs,
    *,
    m: int | None = None,
    scope: Scope = "layer",
    min_fraction: float = 1.0,
    by: By = "contrast",
    think: str = "off",
    pool: Pool = "max",
    positions: str | None = None,
    site: Literal["post"] = "post",
    response: Literal["own", "none"] = "own",
    gate: bool = True,
    test: bool = True,
    harmful: Sequence[Prompt | str] | None = None,
    harmless: Sequence[Prompt | str] | None = None,
    n_random_sets: int = 100,
    matched: Matched = None,
    test_with: Mapping[str, Any] | None = None,
    neutral: bool = True,
    max_new_tokens: int = 64,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> NeuronSet:
    """Find the neurons that answer to what makes a request refused more, and test on other requests what they do.

    The paper (section 4) takes, of each pair k, the m neurons whose pooled activation rises most from D to D̃, and the
    neurons that all pairs share: A_safe = ∩ₖ Top-m(f(a; D̃ₖ) − f(a; Dₖ)). It states neither m nor whether it counts per layer;
    by default it is 1 % of a layer, and `made_by["sweep"]` shows how the size of the set hangs on it. Per layer, every layer
    gives its m even where it has nothing to give; over the model, layers with large activations give most.

    On the `select` pairs neurons are chosen, on `evaluate` requests they are tested (`neuron_effects`): zeroed, beside random
    sets with as many neurons in each layer. The result bears that test as `effects`; without it, it is *not tested*.

    With pairs of sentences of intent, D̃ is longer than D, and a maximum grows with length. So the same rule is applied to the
    requests with a neutral sentence of as many words: `made_by["neutral"]` says how many neurons that chooses, and how many
    are the same ones. What both choose answers to another sentence, not to intent.

    What it does not show: that these neurons are all, or the first, that refusal needs; that a neuron which was not chosen
    does nothing; or that one which was chosen does something beside the others (the set is tested, not its members).

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its chat format.
        pairs: (less refused, more refused): from `counterfactual_pairs`, or pairs of records or strings of your own. Those of
            split "select" choose, those of "evaluate" test; without splits, halves are cut by family.
        m: Neurons each pair names, in each layer or in the model; None: 1 % of them, rounded up.
        scope: "layer" or "model".
        min_fraction: Share of pairs that must name a neuron: 1.0 is the paper's intersection.
        by: "contrast": the paper's, above. "gradient": in place of activations, what zeroing each neuron would take off the
            refusal score by gradient × activation, more refused minus less refused. "effect_size": Cohen's d between the two
            sides, the top m of it; there is no vote then.
        think: Condition in which requests are read, see `render_conditions`; the test is made in "off" where it is open.
        pool: "max" (the paper), "mean" or "last".
        positions: Tokens to pool over, see `pooled_activations`.
        site: "post". The channels of "mlp_out" are no neurons; read them with `pooled_activations`.
        response: "own": request and the model's own answer are read (the paper). "none": the request alone.
        gate: Stop where the model does not refuse one side more: by score (one-sided sign flips over families at .05, or the
            finest p there can be) and, where answers are written, by what is written (at least half of the more refused side
            refused, and more of it than of the other unless all of both is).
        test: Whether to test on the evaluate side.
        harmful: Requests to test on, and
        harmless: their twins; their evaluate split is taken where all have splits, else all. None: the two forms of the
            evaluate pairs (twins and own pairs); of pairs with intent, D, and `harmless` must be given.
        n_random_sets: See `neuron_effects`.
        matched: See `neuron_effects`.
        test_with: More of its arguments: ``{"reasoning": …, "neutral_text": …, "written": True}``.
        neutral: Apply the rule to neutral sentences as well, for pairs with intent.
        max_new_tokens: Most tokens of an answer; 64 for harmful requests whatever is asked for.
        folder: Keep activations and every number there as soon as they are measured, and go on from there when called again;
            the set is saved there too.
        seed: Of halves, random sets, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        NeuronSet with `scores` (mean difference over pairs; nats for "gradient", d for "effect_size"), `activity` (mean pooled
        activation over both sides) and `made_by` (settings, requests, gate, sweep, stability over halves, neutral control). It
        may be empty, where pairs agree on no neuron.

    Raises:
        NotEnoughData: No pair, none to choose by, or no requests to test on.
        StatisticsError: A setting is impossible, a pair stands in two splits, or a request to test on chose the neurons.
        GateNotPassed: The model does not refuse the one side more.
        UnsupportedModel: The MLP is a mixture of experts, or `site` has no neurons.
        NotFinite: NaN or infinity.
        StudyFolderError: The folder holds something else.
        ModelError: The model's hooks do not work as needed.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> pairs = rl.counterfactual_pairs(*(rl.load_prompts(kind, language="toy")[::2] for kind in ("harmful", "harmless")), "twins")
    >>> found = rl.safety_neurons(model, chat, pairs, m=8, scope="model", n_random_sets=20)
    >>> found.neurons == planted_truth().neurons, found.effects.verdict
    (True, 'refusal')
    """
    settings = {
        "m": m,
        "scope": scope,
        "min_fraction": min_fraction,
        "by": by,
        "think": think,
        "pool": pool,
        "positions": positions,
        "response": response,
        "max_new_tokens": max_new_tokens if response == "own" else None,
        "seed": seed,
    }
    if site != "post":
        raise UnsupportedModel(
            f"neurons at site={site!r} were asked for; the channels of the MLP's output are no neurons and cannot be ablated as"
            " such. Use 'post', or read them with rl.pooled_activations(site='mlp_out')."
        )
    facts = verify(model, reads=["post"], edits=["post"])
    rule = _checked_rule(facts, m, scope, min_fraction, by)
    settings["m"] = rule.m
    check_condition(think)
    if response not in ("own", "none"):
        raise StatisticsError(f"response={response!r} was asked for; of pairs it is 'own' or 'none'.")
    if by == "gradient" and leaves_open(think):
        raise StatisticsError(
            f"gradients of the refusal score were asked for in {think!r}, where no answer is next; use a closed condition."
        )
    if by == "gradient" and positions == "generated":
        raise StatisticsError(
            "gradients at generated tokens were asked for; the refusal score is read before any is written. Leave positions out,"
            " or name a span of the prompt."
        )
    sides = pair_sides(as_pairs(pairs), halves=harmful is None and test, seed=seed)
    used = [form for pair in sides.select for form in (pair.less, pair.more)]
    asked = _test_requests(sides.evaluate, harmful, harmless) if test else None
    if asked is not None:
        for requests in asked:
            refuse_used(chosen_by(used), requests, "neurons")
    batches = {
        side: render_conditions(chat, [getattr(pair, side) for pair in sides.select], [think])[think]
        for side in SIDES
    }
    bench = _Bench(
        model,
        chat,
        sides.select,
        rule,
        batches,
        {
            "think": think,
            "response": response,
            "pool": pool,
            "positions": positions,
            "max_new_tokens": max_new_tokens,
            "max_rows": max_rows,
            "progress": progress,
        },
    )
    design = {
        **settings,
        "pairs": {side: batches[side].digest for side in SIDES},
        "families": families_of([pair.more for pair in sides.select]),
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    with ExitStack() as stack:
        kept = ResultFolder(folder or stack.enter_context(TemporaryDirectory(prefix="rim_lens_neurons_")))
        kept.claim(design, "safety_neurons.json")
        bench.read(kept)
        passed = kept.once("gate.json", bench.gate)
        if gate:
            _check_gate(passed, think)
        per_pair, scores = bench.evidence(kept)
        mask = chosen(per_pair, rule.m, scope, min_fraction).mask
        found = NeuronSet(
            [(int(layer), int(neuron)) for layer, neuron in np.argwhere(mask)],
            facts.n_layers,
            facts.d_mlp,
            scores=scores,
            activity=bench.activity(),
            made_by={
                "how": "safety_neurons",
                "settings": settings,
                "n_pairs": len(sides.select),
                "n_families": len(set(families_of([pair.more for pair in sides.select]))),
                "kinds": sorted({pair.kind for pair in sides.select}),
                "gate": {"asked": gate, **passed},
                "sweep": _sweep(per_pair, rule),
                "stability": bench.stability(per_pair, seed),
                "neutral": bench.neutral(kept, mask) if neutral else {"skipped": "not asked for"},
                **({} if mask.any() else {"not_tested": _NONE}),
                **chosen_by(used),
                "chat_format": chat.name,
                "model": facts.to_dict(),
                "weights_digest": design["weights_digest"],
            },
        )
        if folder is not None:
            found.save(folder)
        if asked is None or not len(found):
            return found
        effects = neuron_effects(
            model,
            chat,
            found,
            *asked,
            n_random_sets=n_random_sets,
            matched=matched,
            folder=None if folder is None else kept.path / EFFECTS,
            seed=seed,
            max_rows=max_rows,
            progress=progress,
            **{"conditions": ("off",) if leaves_open(think) else (think,), **(test_with or {})},
        )
        tested = with_effects(found, effects)
        if folder is not None:
            tested.save(folder)
        return tested


def with_effects(neurons: NeuronSet, effects: NeuronEffects | None) -> NeuronSet:
    """The same set with another test of it."""
    return NeuronSet(
        neurons.neurons,
        neurons.n_layers,
        neurons.d_mlp,
        neurons.scores,
        neurons.activity,
        neurons.made_by,
        effects,
    )


@dataclass(frozen=True)
class _Rule:
    m: int
    scope: Scope
    min_fraction: float
    by: By
    pool: int  # neurons that m is taken of


def _checked_rule(facts: ModelFacts, m: int | None, scope: Scope, min_fraction: float, by: By) -> _Rule:
    if by not in ("contrast", "effect_size", "gradient"):
        raise StatisticsError(f"by={by!r} was asked for; there are 'contrast', 'effect_size' and 'gradient'.")
    if scope not in ("layer", "model"):
        raise StatisticsError(f"scope={scope!r} was asked for; it is 'layer' or 'model'.")
    needed(min_fraction, 1)
    if by == "effect_size" and min_fraction != 1.0:
        raise StatisticsError(
            f"min_fraction={min_fraction} was asked for with by='effect_size', which all pairs have together: there is no vote."
        )
    pool = facts.d_mlp if scope == "layer" else facts.d_mlp * facts.n_layers
    m = math.ceil(SHARE * pool) if m is None else m
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= pool:
        raise StatisticsError(
            f"m={m!r} was asked for; a {scope} has {pool} neurons, so give a whole number from 1 to that."
        )
    return _Rule(m, scope, min_fraction, by, pool)


def _test_requests(
    evaluate: Sequence[Pair],
    harmful: Sequence[Prompt | str] | None,
    harmless: Sequence[Prompt | str] | None,
) -> tuple[list[Prompt | str], list[Prompt | str]]:
    """Requests to test on, and their twins; before anything is measured."""
    if (harmful is None) != (harmless is None) and harmful is not None:
        raise NotEnoughData(
            "harmful requests were given to test on, and no harmless ones; give their twins as well, or test=False."
        )
    if harmful is not None and harmless is not None:
        first, second = _evaluate_of(harmful), _evaluate_of(harmless)
    elif harmless is not None or any(pair.kind in ("intent", "neutral") for pair in evaluate) or not evaluate:
        if not evaluate or harmless is None:
            what = (
                "no pair is of the evaluate split"
                if not evaluate
                else "both forms of pairs with intent are harmful"
            )
            raise NotEnoughData(
                f"{what}, so that there is nothing to test on; give harmful= and harmless= (twins), or test=False, which says"
                " 'not tested'."
            )
        first = [pair.less for pair in evaluate]
        ids = {prompt.twin for prompt in first if isinstance(prompt, Prompt)}
        given = _evaluate_of(harmless)
        second = [one for one in given if isinstance(one, Prompt) and one.id in ids] or given
    else:
        # Twins by their ids, whatever the records say of other twins.
        first = [_twin_of(pair) for pair in evaluate]
        second = [pair.less for pair in evaluate]
    families = [len(set(families_of(as_prompts(side)))) for side in (first, second)]
    if min(families) < 2:
        raise NotEnoughData(
            f"{len(first)} harmful requests of {families[0]} families and {len(second)} harmless ones of {families[1]} are there"
            " to test on; two families of each are needed. Give more pairs or requests, or test=False."
        )
    return first, second


def _families_of(pairs: Sequence[Pair]) -> list[str]:
    """What the gate flips signs by: twins that swap the same words are one witness, as in every test against twins."""
    more = [pair.more for pair in pairs]
    if any(pair.kind != "twins" for pair in pairs):
        return families_of(more)
    return families_by_swap(more, [pair.less for pair in pairs])


def _twin_of(pair: Pair) -> Prompt:
    return replace(pair.more, twin=pair.less.id)


def _evaluate_of(requests: Sequence[Prompt | str]) -> list[Prompt | str]:
    splits = [one.split if isinstance(one, Prompt) else None for one in requests]
    if any(splits):
        return [one for one, split in zip(requests, splits, strict=True) if split == "evaluate"]
    return list(requests)


@dataclass
class _Bench:
    """A model and the pairs that choose, with what was read of them."""

    model: Model
    chat: ChatFormat
    pairs: Sequence[Pair]
    rule: _Rule
    batches: Mapping[str, SpanBatch]
    reading: dict[str, Any]
    pooled: dict[str, xr.DataArray] = field(default_factory=dict)

    def _pooled(self, kept: ResultFolder, name: str, prompts: Sequence[Prompt]) -> xr.DataArray:
        out = kept.path / "activations" / name
        return pooled_activations(self.model, self.chat, prompts, out=out, **self.reading)

    def read(self, kept: ResultFolder) -> None:
        for side in SIDES:
            self.pooled[side] = self._pooled(kept, side, [getattr(pair, side) for pair in self.pairs])

    def _scores(self, batch: SpanBatch) -> Float[np.ndarray, " pair"]:
        return np.asarray(refusal_score(self.model, batch, max_rows=self.reading["max_rows"]).values)

    def gate(self) -> dict[str, Any]:
        """How much more the one side is refused."""
        found: dict[str, Any] = {"generated": None, "score": None}
        if self.reading["response"] == "own":
            found["generated"] = {
                side: float(np.mean(self.pooled[side]["outcome"].values == "refuse")) for side in SIDES
            }
        if self.batches["more"].think != "open":
            scores = {side: self._scores(self.batches[side]) for side in SIDES}
            test = sign_flip_test(
                scores["more"] - scores["less"],
                families=_families_of(self.pairs),
                alternative="greater",
            )
            found["score"] = {
                **{side: float(scores[side].mean()) for side in SIDES},
                "difference": float(test.statistic),
                "p": float(test.p),
                "finest": test.finest,
                "refused": {side: float((scores[side] > 0).mean()) for side in SIDES},
            }
        return found

    def _evidence_of(self, kept: ResultFolder, more: str, prompts: Sequence[Prompt]) -> Any:
        """Difference of each pair [pair, layer, neuron] between a form and the less refused one."""
        if self.rule.by == "gradient":
            think = self.reading["think"]
            batch = render_conditions(self.chat, list(prompts), [think])[think]
            return self._contributions(kept, more, batch) - self._contributions(
                kept, "less", self.batches["less"]
            )
        if more not in self.pooled:
            self.pooled[more] = self._pooled(kept, more, prompts)
        first, second = self.pooled[more].values, self.pooled["less"].values
        return effect_size(first, second)[None] if self.rule.by == "effect_size" else first - second

    def _contributions(
        self, kept: ResultFolder, name: str, batch: SpanBatch
    ) -> Float[np.ndarray, "pair layer neuron"]:
        """What each neuron adds to the refusal score, by gradient × activation."""
        import xarray as xr

        path = kept.path / f"gradients_{name}.nc"
        if not path.exists():
            found = -neuron_gradients(
                self.model,
                batch,
                positions=self.reading["positions"] or "all",
                max_rows=min(GRADIENT_ROWS, self.reading["max_rows"]),
                progress=self.reading["progress"],
            )
            unfinished = path.with_name(path.name + ".part")
            found.to_netcdf(unfinished, engine="h5netcdf")
            unfinished.replace(path)
        with xr.open_dataarray(path, engine="h5netcdf") as read:
            return np.asarray(read.load().values)

    def evidence(self, kept: ResultFolder) -> tuple[Any, Float[np.ndarray, "layer neuron"]]:
        per_pair = self._evidence_of(kept, "more", [pair.more for pair in self.pairs])
        if self.rule.by == "contrast":
            return per_pair, difference_of_means(self.pooled["more"].values, self.pooled["less"].values)
        return per_pair, np.asarray(per_pair.mean(axis=0))

    def activity(self) -> Float[np.ndarray, "layer neuron"]:
        return np.mean([self.pooled[side].values.mean(axis=0, dtype=np.float64) for side in SIDES], axis=0)

    def stability(self, per_pair: Any, seed: int) -> dict[str, Any]:
        """Jaccard of what halves of the pairs choose, in short."""
        families = families_of([pair.more for pair in self.pairs])
        if self.rule.by == "effect_size":
            return {"skipped": "effect sizes are of all pairs together"}
        if len(set(families)) < 2:
            return {"skipped": "a single family"}
        table = stability(
            per_pair, self.rule.m, self.rule.scope, self.rule.min_fraction, families=families, seed=seed
        )
        told = plain(table[["size_first", "size_second", "jaccard", "by_chance"]].mean().to_dict())
        return {"n_splits": len(table), **told}

    def neutral(self, kept: ResultFolder, mask: Any) -> dict[str, Any]:
        """What the same rule chooses where a neutral sentence of the same number of words stands for intent."""
        if any(pair.kind != "intent" for pair in self.pairs):
            return {"skipped": "only pairs with a sentence of intent have a neutral one"}
        longer = [
            pair.more for pair in counterfactual_pairs([pair.less for pair in self.pairs], kind="neutral")
        ]
        per_pair = self._evidence_of(kept, "neutral", longer)
        rule = self.rule
        theirs = chosen(per_pair, rule.m, rule.scope, rule.min_fraction).mask
        shared, either = int((mask & theirs).sum()), int((mask | theirs).sum())
        by_chance = float((mask.sum(axis=1) * theirs.sum(axis=1)).sum() / mask.shape[1])
        return {
            "size": int(theirs.sum()),
            "shared": shared,
            "shared_by_chance": by_chance,
            "jaccard": shared / either if either else None,
            "neurons": np.argwhere(theirs).tolist(),
        }


def _sweep(per_pair: Any, rule: _Rule) -> list[dict[str, Any]]:
    """Set sizes over doublings of m, with the one asked for among them."""
    doublings = {
        2**power for power in range(rule.pool.bit_length()) if 2**power <= min(4 * rule.m, rule.pool)
    }
    shares = [1.0] if rule.by == "effect_size" else sorted({0.5, 0.8, 1.0, rule.min_fraction})
    table = sweep(per_pair, sorted(doublings | {rule.m}), rule.scope, shares)
    return [plain(line) for line in table.to_dict("records")]


def _check_gate(passed: dict[str, Any], think: str) -> None:
    score, written = passed["score"], passed["generated"]
    reasons = []
    if score is not None and not (score["difference"] > 0 and score["p"] <= max(ALPHA, score["finest"])):
        reasons.append(
            f"the refusal score of the more refused side is {score['difference']:+.2f} nats against the other (p ="
            f" {score['p']:.2g})"
        )
    shares = written if written is not None else score["refused"] if score is not None else None
    if shares is not None:
        less, more = shares["less"], shares["more"]
        how = "in writing" if written is not None else "by score"
        if not more >= MIN_REFUSAL:
            reasons.append(
                f"{more:.0%} of the more refused side is refused {how}; at least {MIN_REFUSAL:.0%} is asked for"
            )
        elif written is not None and not (more > less or less == more == 1):
            reasons.append(f"{more:.0%} of it is refused in writing, and {less:.0%} of the other side")
    if reasons:
        raise GateNotPassed(
            f"in {think!r}, {'; '.join(reasons)}. Neurons would be found all the same, but not by refusal. Give pairs of which"
            " this model refuses one side more, or a model that refuses; gate=False goes on."
        )
