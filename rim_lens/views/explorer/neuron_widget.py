"""The neuron explorer with a live kernel: any neuron over tokens, neurons ablated or scaled, refusal measured again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from typing_extensions import override

from rim_lens.chat.conditions import render_conditions
from rim_lens.hooks.base import Component
from rim_lens.hooks.neurons import AblateNeurons, ScaleNeurons
from rim_lens.lens import model_facts
from rim_lens.measures.two_sides import named
from rim_lens.views.explorer.live import Answer, Edit, LiveExplorer, check_written
from rim_lens.views.explorer.neuron_building import NeuronView, neuron_view
from rim_lens.views.explorer.neuron_page import Reading, wanted_prompts
from rim_lens.views.explorer.neuron_reading import Neuron, over_tokens
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model
    from rim_lens.measures.neurons.sets import NeuronSet
    from rim_lens.prompts import Prompt


@dataclass(frozen=True)
class NeuronEdit(Edit):
    """Neurons removed (set to zero) or scaled.

    >>> NeuronEdit("ablate", ((0, 5),)).code()
    'rl.AblateNeurons([(0, 5)])'
    """

    letter: ClassVar[str] = "N"
    ablating: ClassVar[type[Component]] = AblateNeurons
    scaling: ClassVar[type[Component]] = ScaleNeurons


class NeuronExplorer(LiveExplorer):
    """The neuron explorer in a notebook: shown by being a cell's last line.

    What the page of `write_neuron_explorer` shows, and with the kernel behind it: any neuron over the tokens of its top
    prompts, read when it is looked at, as the models stand without edits; neurons ticked, then ablated or scaled at every
    position, upon which refusal score, likeliest first tokens and outcome of a short continuation are measured again, in the
    base and in the tuned model; undo; the history as code (`code`). Without a notebook the same is done by `ablate`, `scale`,
    `undo` and read from `scores`.

    A score that moves on one request is a hint: it has no twin, no random neurons and no interval beside it. Test what you
    find with `rl.neuron_effects`, on other requests.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode; the base where there is a tuned one. It stays as it is.
        chat: Its format.
        neurons: As `neuron_view` takes them.
        harmful: Requests that should be refused; these are scored.
        harmless: As `neuron_view` takes them.
        reasoning: As `neuron_view` takes them.
        tuned: The model after training; it is edited and scored beside the base, as condition "…, tuned".
        conditions: In which requests are scored, see `render_conditions`.
        n_continued: Tokens of the continuation, whose outcome and first words are shown; 0 for none. At most 64.
        n_top: As `neuron_view` takes it, for neurons that are read when looked at as well.
        keep_text: As `neuron_view` takes it.
        **more: As `neuron_view` takes them.

    Attributes:
        view: What is shown.
        edits: In force, oldest first.
        models: The edited model of each condition.
        batches: Its prompts.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> requests = [rl.load_prompts(kind, language="toy", split="evaluate")[:2] for kind in ("harmful", "harmless")]
    >>> explorer = rl.views.NeuronExplorer(
    ...     model, rl.ChatFormat.from_model(model), [(1, 3)], *requests, response="none", n_continued=0
    ... )
    >>> print(explorer.ablate([(1, 3)]).code().splitlines()[-1])
    rl.refusal_score(model, batch, rl.AblateNeurons([(1, 3)]))
    """

    edit: ClassVar[type[Edit]] = NeuronEdit
    named: ClassVar[str] = (
        "# model: explorer.models[name], batch: explorer.batches[name], name one of {names}"
    )
    view: NeuronView

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        neurons: NeuronSet | Iterable[Neuron],
        harmful: Sequence[Prompt | str],
        harmless: Sequence[Prompt | str] = (),
        reasoning: Sequence[Prompt | str] = (),
        *,
        tuned: Model | None = None,
        conditions: Any = ("off", "careful"),
        n_continued: int = 16,
        n_top: int = 2,
        keep_text: bool = False,
        **more: Any,
    ) -> None:
        check_written(n_continued)
        requests = named(harmful, "harmful")
        rendered = render_conditions(chat, requests, conditions)
        view = neuron_view(
            model,
            chat,
            neurons,
            harmful,
            harmless,
            reasoning,
            tuned=tuned,
            n_top=n_top,
            keep_text=keep_text,
            **more,
        )
        models = dict.fromkeys(rendered, model)
        batches = dict(rendered)
        if tuned is not None:
            models |= {f"{name}, tuned": tuned for name in rendered}
            batches |= {f"{name}, tuned": batch for name, batch in rendered.items()}
        scored = [visible(prompt.id) for prompt in requests]
        super().__init__(replace(view, data={**view.data, "scored": scored}), models, batches, n_continued)
        self._n_top = n_top
        self._reading = Reading(chat, [model] if tuned is None else [model, tuned], keep_text)

    def ablate(self, neurons: Iterable[Neuron]) -> Self:
        """Remove neurons, beside what is edited already.

        Raises:
            UnknownNeuron: There is none, or the model lacks one.
        """
        return self._with([*self.edits, NeuronEdit("ablate", self._checked(list(neurons)))])

    def scale(self, neurons: Iterable[Neuron], factor: float) -> Self:
        """Multiply neurons by a factor, beside what is edited already.

        Raises:
            UnknownNeuron: There is none, or the model lacks one.
        """
        return self._with([*self.edits, NeuronEdit("scale", self._checked(list(neurons)), float(factor))])

    @override
    def _fetched(self, message: Mapping[str, Any]) -> Answer:
        if message.get("kind") != "tokens":
            return super()._fetched(message)
        (neuron,) = self._checked([(int(message["neuron"][0]), int(message["neuron"][1]))])
        sources = self.view.sources
        place = neuron[0] * self.view.data["model"]["d_mlp"] + neuron[1]
        told: list[dict[str, Any]] = []
        buffers: list[bytes] = []
        for kind, row in wanted_prompts(sources[0], np.array([place]), self._n_top)[0]:
            one = self._reading.prompt(sources, kind, row)
            one["values"] = list(range(len(buffers), len(buffers) + len(sources)))
            for source, model in zip(sources, self._reading.models, strict=True):
                values = over_tokens(model, source.batches[kind], row, [neuron])
                buffers.append(values.astype("<f4").tobytes())
            told.append(one)
        return {"prompts": told}, buffers

    @override
    def _checked(self, places: Sequence[Neuron]) -> tuple[Neuron, ...]:
        facts = model_facts(next(iter(self.models.values())))
        return tuple((int(layer), int(neuron)) for layer, neuron in facts.check_neurons(places))
