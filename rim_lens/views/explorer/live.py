"""What explorers with a live kernel share: edits with undo and a history as code, refusal measured again, and the widget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from typing_extensions import override

from rim_lens.chat.conditions import leaves_open
from rim_lens.errors import CaptureError, ConditionError, MissingExtra, RimLensError
from rim_lens.generation import generate
from rim_lens.hooks.base import Component
from rim_lens.measures import first_tokens, refusal_score
from rim_lens.outcomes import first_words
from rim_lens.views.explorer.page import ExplorerView, module
from rim_lens.views.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.chat.spans import SpanBatch
    from rim_lens.lens import Model

MOST_WRITTEN = 64
Answer = tuple[dict[str, Any], list[bytes]]  # plain values, and bytes of float32 that they name by place


@dataclass(frozen=True)
class Edit:
    """One step of the history.

    Attributes:
        operation: "ablate" (the output becomes zero) or "scale".
        places: (layer, head) or (layer, neuron) pairs.
        factor: Of scaling; None where removed.
    """

    operation: Literal["ablate", "scale"]
    places: tuple[tuple[int, int], ...]
    factor: float | None = None
    letter: ClassVar[str]
    ablating: ClassVar[type[Component]]
    scaling: ClassVar[type[Component]]

    def component(self) -> Component:
        """The editor that does it."""
        return self._editor(*self._arguments())

    def code(self) -> str:
        """The editor as Python."""
        return f"rl.{self._editor.__name__}({', '.join(map(repr, self._arguments()))})"

    def told(self) -> str:
        """The edit in words."""
        names = ", ".join(f"L{layer}{self.letter}{place}" for layer, place in self.places)
        return f"ablate {names}" if self.operation == "ablate" else f"scale {names} by {self.factor:g}"

    @property
    def _editor(self) -> type[Component]:
        if self.operation not in ("ablate", "scale"):
            raise CaptureError(f"an edit {self.operation!r} was asked for; there are 'ablate' and 'scale'.")
        return self.ablating if self.operation == "ablate" else self.scaling

    def _arguments(self) -> list[Any]:
        factor = float("nan") if self.factor is None else self.factor
        return [list(self.places)] if self.operation == "ablate" else [list(self.places), factor]


class Live:
    """An explorer with a model behind it: steps that are taken, and taken back, and the widget through which a page asks for them.

    Args:
        view: What is shown.

    Attributes:
        view: What is shown.
        edits: Steps in force, oldest first; each says itself in words (`told`).
    """

    def __init__(self, view: ExplorerView) -> None:
        self.view = view
        self.edits: list[Any] = []

    def undo(self) -> Self:
        """Take the last step back; harmless where there is none."""
        return self._with(self.edits[:-1])

    def reset(self) -> Self:
        """Take every step back."""
        return self._with([])

    def answer(self, message: Mapping[str, Any]) -> Answer:
        """Answer a message of the page: plain values, and bytes of float32 that they name by place. Override this."""
        raise CaptureError(f"the page asked for {message.get('kind')!r}, which this kernel does not know.")

    def _with(self, edits: Sequence[Any]) -> Self:
        self.edits = list(edits)
        return self

    # --- in a notebook ---

    @cached_property
    def widget(self) -> Any:
        """The anywidget behind the notebook's display.

        Raises:
            MissingExtra: anywidget is not installed.
        """
        try:
            import anywidget
            import traitlets
        except ImportError as missing:
            raise MissingExtra(
                'the explorer in a notebook needs anywidget: pip install "rim-lens[notebook]". Without it rl.views.write_explorer(view,'
                " path) writes a page that any browser opens."
            ) from missing
        traits = {
            "_esm": module(self.view.of),
            "view": traitlets.Dict().tag(sync=True),
            "arrays": traitlets.List().tag(sync=True),
        }
        arrays = [array.astype("<f4").tobytes() for array in self.view.arrays]
        widget = type(f"{type(self).__name__}Widget", (anywidget.AnyWidget,), traits)(
            view=self.view.data, arrays=arrays
        )
        widget.on_msg(self._heard)
        return widget

    def _heard(self, widget: Any, message: Mapping[str, Any], _buffers: Any = None) -> None:
        try:
            reply, buffers = self.answer(message)
        except (RimLensError, ValueError) as wrong:
            reply, buffers = {"error": str(wrong)}, []
        except Exception as wrong:
            widget.send({"id": message.get("id"), "error": f"{type(wrong).__name__}: {wrong}"})
            raise
        widget.send({"id": message.get("id"), **reply}, buffers)

    def _repr_mimebundle_(self, **keywords: Any) -> Any:
        return self.widget._repr_mimebundle_(**keywords)

    def __repr__(self) -> str:
        edits = "; ".join(edit.told() for edit in self.edits) or "no edits"
        return f"{type(self).__name__}({self.view.data['title']}: {edits})"


class LiveExplorer(Live):
    """An explorer with a model behind it: what is ticked is edited, upon which refusal is measured again.

    Args:
        view: What is shown.
        models: The edited model of each condition that is scored.
        batches: Its prompts, the same ones in each condition.
        max_new_tokens: Of the continuation; see `check_written`.

    Attributes:
        view: What is shown.
        edits: In force, oldest first.
    """

    edit: ClassVar[type[Edit]]
    # How code names the model and the prompts of a condition.
    named: ClassVar[str] = "# batch: explorer.batches[name], name one of {names}"

    def __init__(
        self,
        view: ExplorerView,
        models: Mapping[str, Model],
        batches: Mapping[str, SpanBatch],
        max_new_tokens: int,
    ) -> None:
        super().__init__(view)
        self.models = dict(models)
        self.batches = dict(batches)
        self._max_new_tokens = max_new_tokens
        self._known: dict[tuple[int, str, tuple[Edit, ...]], float] = {}

    def components(self) -> list[Component]:
        """The editors in force, for use elsewhere."""
        return [edit.component() for edit in self.edits]

    @property
    def scores(self) -> pd.DataFrame:
        """Refusal score of every prompt in each condition that answers next, without and with the edits, in nats."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for name, batch in self.batches.items():
            if why_no_score(batch):
                continue
            model = self.models[name]
            before = refusal_score(model, batch).values
            after = refusal_score(model, batch, *self.components()).values if self.edits else before
            lines += [
                {
                    "prompt": prompt.id,
                    "condition": name,
                    "score": float(score),
                    "baseline": float(baseline),
                    "effect": float(score - baseline),
                }
                for prompt, score, baseline in zip(batch.prompts, after, before, strict=True)
            ]
        return pd.DataFrame(lines, columns=["prompt", "condition", "score", "baseline", "effect"])

    def code(self) -> str:
        """The edits in force as Python that gives the same scores."""
        told = "".join(f"# {edit.told()}\n" for edit in self.edits)
        editors = "".join(f", {edit.code()}" for edit in self.edits)
        names = ", ".join(map(repr, self.batches))
        return f"{told}{self.named.format(names=names)}\nrl.refusal_score(model, batch{editors})"

    # --- what the page asks ---

    @override
    def answer(self, message: Mapping[str, Any]) -> Answer:
        if message.get("kind") == "apply":
            edits = [
                self.edit(
                    step["operation"],
                    self._checked([(int(layer), int(place)) for layer, place in step[self.view.of]]),
                    None if step.get("factor") is None else float(step["factor"]),
                )
                for step in message["steps"]
            ]
            return self._measured(edits, int(message["prompt"])), []
        return self._fetched(message)

    def _fetched(self, message: Mapping[str, Any]) -> Answer:
        """What the page asks for beside edits. Override this."""
        return super().answer(message)

    def _measured(self, edits: list[Edit], prompt: int) -> dict[str, Any]:
        told, courses = [], []
        for name, batch in self.batches.items():
            one = batch.select([prompt])
            note = why_no_score(one)
            courses.append([] if note else self._course(name, one, prompt, tuple(edits)))
            told.append(self._one(name, one, note, courses[-1], [edit.component() for edit in edits]))
        self.edits = edits  # not before: an edit that cannot be done leaves the earlier ones in force
        history = [
            {"edit": edit.told(), "scores": [course[step] if course else None for course in courses]}
            for step, edit in enumerate(edits, start=1)
        ]
        return {"conditions": told, "history": history, "code": self.code()}

    def _course(self, name: str, one: SpanBatch, prompt: int, edits: tuple[Edit, ...]) -> list[float]:
        """The score without any edit, after the first, after the first two and so on; earlier ones are remembered."""
        for stop in range(len(edits) + 1):
            key = (prompt, name, edits[:stop])
            if key not in self._known:
                editors = [edit.component() for edit in edits[:stop]]
                self._known[key] = float(refusal_score(self.models[name], one, *editors)[0])
        return [self._known[prompt, name, edits[:stop]] for stop in range(len(edits) + 1)]

    def _one(
        self, name: str, one: SpanBatch, note: str, course: Sequence[float], components: list[Component]
    ) -> dict[str, Any]:
        model = self.models[name]
        tokens: list[dict[str, Any]] = []
        if not note:
            words = first_tokens(model, one, *components, k=5)
            tokens = [
                {"token": visible(token), "probability": float(share)}
                for token, share in zip(words["token"], words["probability"], strict=True)
            ]
        return {
            "name": name,
            "score": course[-1] if course else None,
            "baseline": course[0] if course else None,
            "tokens": tokens,
            "note": note,
            "continuation": self._continuation(model, one, components),
        }

    def _continuation(self, model: Model, one: SpanBatch, components: list[Component]) -> str:
        """The outcome, and the first words: what a model writes to a harmful request is not shown in full."""
        if not self._max_new_tokens or any(one.n_generated):
            return "–"
        out = generate(model, one, *components, max_new_tokens=self._max_new_tokens)
        words = first_words(out.answer[0] or out.cot[0])
        return f"{out.outcome[0]}: {visible(words)}" if words else out.outcome[0]

    def _checked(self, places: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """These heads or neurons, if the model has them. Override this."""
        raise NotImplementedError

    @override
    def _with(self, edits: Sequence[Any]) -> Self:
        for edit in edits:
            edit.component()
        return super()._with(edits)


def check_written(max_new_tokens: int) -> None:
    """Refuse a continuation that is too long to be shown.

    Raises:
        CaptureError: It is.
    """
    if not 0 <= max_new_tokens <= MOST_WRITTEN:
        raise CaptureError(
            f"max_new_tokens={max_new_tokens} was asked for; 0 to {MOST_WRITTEN} are shown here."
        )


def why_no_score(batch: SpanBatch) -> str:
    """Why the answer does not come next, or "" where it does."""
    from rim_lens.measures.refusal.first_word import check_answer_is_next

    try:
        check_answer_is_next(batch, "refusal_score")
    except ConditionError:
        return (
            "no score: the model goes on thinking"
            if leaves_open(batch.name)
            else "no score: the answer does not come next"
        )
    return ""
