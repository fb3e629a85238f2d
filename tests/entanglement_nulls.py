"""How often `entangled` calls a set entangled where there is nothing: docs/evidence/entanglement_nulls.json.

``python -m tests.entanglement_nulls`` measures and writes it, in about four CPU-minutes. The suite holds the level on a sample
(tests/measures/entanglement/test_nulls.py). Activations are read from the plain models, prompts as they are.

Situations:

- *labels*: toy against its three fine-tuned versions, which did move; the labels of each family's pairs are exchanged at
  random before neurons are chosen, so that the set has nothing to do with harm.
- *noise, toy*: toy against itself with weight noise; neurons chosen on the true labels, of another half of the families each time.
- *noise, random*: a random model of the toy's shape, another each time, against itself with weight noise.

Yardsticks: p by exchanged labels of the pairs that chose, p by exchanged labels of the requests that are read (what
`rl.entanglement` takes where it has nothing better), and ranks among random sets, matched in activity or per layer alone.
Only the first holds its level everywhere: at .05 the second reaches .10 (*labels*), random sets reach .23.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import rim_lens as rl
from rim_lens.chat import SpanBatch, render_conditions
from rim_lens.measures.entanglement.between import entangled
from rim_lens.measures.entanglement.reading import ModelReading
from rim_lens.measures.neurons.choosing import chosen
from rim_lens.organisms.toy.host import toy_model, toy_tokenizer
from rim_lens.organisms.toy.shipped import load_toy
from tests.families import fill

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "entanglement_nulls.json"
SITUATIONS = ("labels", "noise, toy", "noise, random")
METRICS = ("ras", "safety_drop", "reasoning_rise", "minimum", "l1_safety", "l1_reasoning")
YARDSTICKS = (
    "exchanged, pairs that chose",
    "exchanged, requests read",
    "random, activity",
    "random, per layer",
)
TUNED = ("careful", "confirm", "deviate")
NOISE = 0.1  # standard deviations of each weight matrix
N_RUNS = 200

Arrays = dict[tuple[str, str], np.ndarray]


@functools.cache
def batches() -> dict[tuple[str, str], SpanBatch]:
    """Kind and side → rendered prompts; harmful requests and twins in one order."""
    chat = rl.ChatFormat.from_tokenizer(toy_tokenizer())
    found = {}
    for side in ("select", "evaluate"):
        for kind, condition in (("harmful", "off"), ("harmless", "off"), ("reasoning", "careful")):
            prompts = rl.load_prompts(kind, language="toy", split=side)
            found[kind, side] = render_conditions(chat, prompts, [condition])[condition]
    return found


def pooled(hf: Any, batch: SpanBatch) -> np.ndarray:
    """Largest activation of each neuron over all tokens but the first, by plain PyTorch hooks."""
    kept: list[torch.Tensor] = []
    handles = [
        block.mlp.act.register_forward_hook(lambda _module, _args, out: kept.append(out))
        for block in hf.transformer.h
    ]
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        hf(batch.tokens, attention_mask=batch.attention_mask, position_ids=positions)
    for handle in handles:
        handle.remove()
    rows = batch.attention_mask.bool() & ~batch.spans["sink"]
    per_layer = [one.masked_fill(~rows[..., None], -torch.inf).amax(dim=1) for one in kept]
    return torch.stack(per_layer, dim=1).double().numpy()


def arrays_of(hf: Any) -> Arrays:
    """All kinds and sides of one model."""
    return {key: pooled(hf, batch) for key, batch in batches().items()}


@functools.cache
def shipped(variant: str) -> Arrays:
    """A shipped toy's arrays."""
    return arrays_of(load_toy(variant)[0])


def noisy(hf: Any, seed: int) -> Any:
    """A copy with Gaussian noise on every matrix."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(hf)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim > 1:
                weight.add_(NOISE * weight.std() * torch.randn(weight.shape, generator=generator))
    return other


def reading(arrays: Arrays) -> ModelReading:
    """The evaluate side as `entangled` takes it."""
    named = {}
    for kind in ("harmful", "reasoning"):
        prompts = batches()[kind, "evaluate"].prompts
        coords = {
            "prompt": [prompt.id for prompt in prompts],
            "family": ("prompt", [prompt.family for prompt in prompts]),
        }
        named[kind] = xr.DataArray(
            arrays[kind, "evaluate"], dims=("prompt", "layer", "neuron"), coords=coords
        )
    return ModelReading(activations=named)


def two_models(situation: str, run: int) -> tuple[Arrays, Arrays]:
    """Base and tuned."""
    if situation == "labels":
        return shipped("Z"), shipped(TUNED[run % len(TUNED)])
    if situation == "noise, toy":
        return shipped("Z"), arrays_of(noisy(load_toy("Z")[0], run))
    base = toy_model()
    fill(base, run)
    return arrays_of(base.eval()), arrays_of(noisy(base, run))


def one_run(situation: str, run: int, n_sets: int, yardsticks: Sequence[str]) -> dict[tuple[str, str], float]:
    """Yardstick and metric → p; empty where the rule chose no neuron."""
    rng = np.random.default_rng(run)
    base, tuned = two_models(situation, run)
    rises = {side: base["harmful", side] - base["harmless", side] for side in ("select", "evaluate")}
    labels = {side: np.array([one.family for one in batches()["harmful", side].prompts]) for side in rises}
    every = np.unique(labels["select"])
    used = np.isin(labels["select"], rng.permutation(every)[: (len(every) + 1) // 2])
    asked, families = rises["select"][used], labels["select"][used]
    if situation == "labels":
        _, index = np.unique(families, return_inverse=True)
        asked = asked * rng.choice([-1.0, 1.0], size=index.max() + 1)[index][:, None, None]
    m = int(rng.integers(2, 10))
    if (
        run % 2 and situation != "labels"
    ):  # the paper's rule, by vote; on exchanged labels it would choose nothing
        mask = chosen(asked, 4 * m, min_fraction=0.6).mask
        neurons = [(int(layer), int(place)) for layer, place in np.argwhere(mask)]
    else:
        order = np.argsort(-asked.mean(axis=0), axis=1, kind="stable")[:, :m]
        neurons = [(layer, int(place)) for layer, row in enumerate(order) for place in row]
    if not neurons:
        return {}
    found = {}
    both = reading(base), reading(tuned)
    # One call gives a rank among exchanged labels and one among random sets.
    for (first, second), difference, labelled, matched in (
        (YARDSTICKS[0::2], asked, families, "activity"),
        (YARDSTICKS[1::2], rises["evaluate"], labels["evaluate"], None),
    ):
        if {first, second} & set(yardsticks):
            result = entangled(
                *both,
                neurons,
                n_random_sets=n_sets,
                matched=matched,
                difference=difference,
                difference_families=labelled.tolist(),
                n_boot=1,
                floor=None,
                seed=run,
            )
            for metric in METRICS:
                row = result.row(metric)
                found[first, metric], found[second, metric] = row["p"], row["p_random"]
    return found


def p_values(
    situation: str, n_runs: int, n_sets: int = 100, yardsticks: Sequence[str] = YARDSTICKS
) -> Iterator[dict[tuple[str, str], float]]:
    """p of run after run, those left out in which nothing was chosen."""
    return filter(None, (one_run(situation, run, n_sets, yardsticks) for run in range(n_runs)))


def main() -> None:
    """Measure, and write the evidence."""
    from rim_lens.provenance import provenance

    torch.set_num_threads(1)
    found: dict[str, Any] = provenance(
        "python -m tests.entanglement_nulls", ("numpy", "torch", "transformers")
    )
    found |= {"n_runs": N_RUNS, "noise": NOISE, "n_sets": 100, "situations": {}}
    for situation in SITUATIONS:
        runs = list(p_values(situation, N_RUNS))
        found["situations"][situation] = {
            "n_runs": len(runs),
            "shares": {
                yardstick: {
                    metric: {
                        str(level): float(np.mean([run[yardstick, metric] <= level + 1e-12 for run in runs]))
                        for level in (0.05, 0.2)
                    }
                    for metric in METRICS
                }
                for yardstick in YARDSTICKS
            },
        }
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
