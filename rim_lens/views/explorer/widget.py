"""The head explorer with a live kernel: heads fetched when looked at, ablated or scaled, refusal measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from rim_lens.capturing import capture
from rim_lens.chat.conditions import leaves_open
from rim_lens.errors import CaptureError, ConditionError, MissingExtra, RimLensError
from rim_lens.generation import generate
from rim_lens.hooks.heads import AblateHeads, ScaleHeads
from rim_lens.lens import model_facts
from rim_lens.measures import first_tokens, refusal_score
from rim_lens.outcomes import first_words
from rim_lens.views.explorer.building import HeadView, head_view, packed
from rim_lens.views.explorer.page import module
from rim_lens.views.explorer.reading import HeadPatterns
from rim_lens.views.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.chat import ChatFormat
    from rim_lens.chat.spans import SpanBatch
    from rim_lens.hooks.base import Component
    from rim_lens.lens import Head, Model
    from rim_lens.prompts import Prompt


@dataclass(frozen=True)
class Edit:
    """One step of the history.

    Attributes:
        operation: "ablate" (z becomes zero) or "scale".
        heads: (layer, head) pairs.
        factor: Of scaling; None where removed.
    """

    operation: Literal["ablate", "scale"]
    heads: tuple[Head, ...]
    factor: float | None = None

    def component(self) -> Component:
        """The editor that does it."""
        if self.operation == "ablate":
            return AblateHeads(self.heads)
        if self.operation == "scale":
            return ScaleHeads(self.heads, self.factor if self.factor is not None else float("nan"))
        raise CaptureError(f"an edit {self.operation!r} was asked for; there are 'ablate' and 'scale'.")

    def code(self) -> str:
        """The editor as Python.

        >>> Edit("scale", ((0, 5),), 0.5).code()
        'rl.ScaleHeads([(0, 5)], 0.5)'
        """
        heads = list(self.heads)
        return (
            f"rl.AblateHeads({heads})"
            if self.operation == "ablate"
            else f"rl.ScaleHeads({heads}, {self.factor!r})"
        )

    def told(self) -> str:
        """The edit in words."""
        names = ", ".join(f"L{layer}H{head}" for layer, head in self.heads)
        return f"ablate {names}" if self.operation == "ablate" else f"scale {names} by {self.factor:g}"


class HeadExplorer:
    """The head explorer in a notebook: shown by being a cell's last line.

    What the page of `write_explorer` shows, and with the kernel behind it: full rows of any head, fetched when it is looked
    at, as the model stands without edits; heads ticked, then ablated or scaled at every position, upon which refusal score, likeliest first
    tokens and outcome of a short continuation are measured again; undo; the history as code (`code`). Without a notebook
    the same is done by `ablate`, `scale`, `undo` and read from `scores`.

    A score that moves on the few prompts shown is a hint: it has no twins, no random heads and no interval beside it. Test
    what you find with `rl.head_effects` or `rl.refusal_heads`, on other requests.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode; it stays as it is.
        chat: Its format.
        prompts: Records or strings.
        conditions: As `head_view` takes them.
        max_new_tokens: Of the continuation, whose outcome and first words are shown; 0 for none. At most 64.
        **more: As `head_view` takes them.

    Attributes:
        view: What is shown.
        edits: In force, oldest first.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> requests = rl.load_prompts("harmful", language="toy", split="select")[:1]
    >>> explorer = rl.views.HeadExplorer(model, rl.ChatFormat.from_model(model), requests, max_new_tokens=0)
    >>> _ = explorer.ablate([(0, 5)])
    >>> explorer.scores.columns.tolist()
    ['prompt', 'condition', 'score', 'baseline', 'effect']
    >>> print(explorer.code().splitlines()[-1])
    rl.refusal_score(model, batch, rl.AblateHeads([(0, 5)]))
    """

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        prompts: Sequence[Prompt | str],
        conditions: Any = ("off", "careful"),
        *,
        max_new_tokens: int = 16,
        **more: Any,
    ) -> None:
        if not 0 <= max_new_tokens <= 64:
            raise CaptureError(f"max_new_tokens={max_new_tokens} was asked for; 0 to 64 are shown here.")
        self.model = model
        self.chat = chat
        self.view: HeadView = head_view(model, chat, prompts, conditions, **more)
        self.edits: list[Edit] = []
        self._max_new_tokens = max_new_tokens
        self._known: dict[tuple[int, str, tuple[Edit, ...]], float] = {}

    # --- edits ---

    def ablate(self, heads: Sequence[Head]) -> HeadExplorer:
        """Remove heads, beside what is edited already.

        Raises:
            UnknownHead: The model lacks one.
        """
        return self._with([*self.edits, Edit("ablate", self._checked(heads))])

    def scale(self, heads: Sequence[Head], factor: float) -> HeadExplorer:
        """Multiply what heads write by a factor, beside what is edited already.

        Raises:
            UnknownHead: The model lacks one.
        """
        return self._with([*self.edits, Edit("scale", self._checked(heads), float(factor))])

    def undo(self) -> HeadExplorer:
        """Take the last edit back; harmless where there is none."""
        return self._with(self.edits[:-1])

    def reset(self) -> HeadExplorer:
        """Take every edit back."""
        return self._with([])

    def components(self) -> list[Component]:
        """The editors in force, for use elsewhere."""
        return [edit.component() for edit in self.edits]

    @property
    def scores(self) -> pd.DataFrame:
        """Refusal score of every prompt in each condition that answers next, without and with the edits, in nats."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for name, batch in self.view.batches.items():
            if _why_no_score(batch):
                continue
            before = refusal_score(self.model, batch).values
            after = refusal_score(self.model, batch, *self.components()).values if self.edits else before
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
        told = "\n".join(f"# {edit.told()}" for edit in self.edits)
        editors = "".join(f", {edit.code()}" for edit in self.edits)
        names = ", ".join(map(repr, self.view.batches))
        start = f"{told}\n" if told else ""
        return f"{start}# batch: explorer.view.batches[name], name one of {names}\nrl.refusal_score(model, batch{editors})"

    # --- what the page asks ---

    def answer(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Answer a message of the page: plain values, and bytes of float32 that they name by place."""
        if message.get("kind") == "rows":
            return self._rows(int(message["prompt"]), (int(message["head"][0]), int(message["head"][1])))
        if message.get("kind") == "apply":
            edits = [
                Edit(
                    step["operation"],
                    self._checked([(int(layer), int(head)) for layer, head in step["heads"]]),
                    None if step.get("factor") is None else float(step["factor"]),
                )
                for step in message["steps"]
            ]
            return self._measured(edits, int(message["prompt"])), []
        raise CaptureError(f"the page asked for {message.get('kind')!r}, which this kernel does not know.")

    def _rows(self, prompt: int, head: Head) -> tuple[dict[str, Any], list[bytes]]:
        told: list[dict[str, int]] = []
        buffers: list[bytes] = []
        for batch in self.view.batches.values():
            one = batch.select([prompt])
            rows = capture(self.model, one, HeadPatterns([head]))["attention_patterns"].values[0, 0]
            told.append({"first": 0, "values": len(buffers)})
            buffers.append(packed(rows, 0).astype("<f4").tobytes())
        return {"conditions": told}, buffers

    def _measured(self, edits: list[Edit], prompt: int) -> dict[str, Any]:
        told, courses = [], []
        for name, batch in self.view.batches.items():
            one = batch.select([prompt])
            note = _why_no_score(one)
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
                self._known[key] = float(refusal_score(self.model, one, *editors)[0])
        return [self._known[prompt, name, edits[:stop]] for stop in range(len(edits) + 1)]

    def _one(
        self, name: str, one: SpanBatch, note: str, course: Sequence[float], components: list[Component]
    ) -> dict[str, Any]:
        tokens: list[dict[str, Any]] = []
        if not note:
            words = first_tokens(self.model, one, *components, k=5)
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
            "continuation": self._continuation(one, components),
        }

    def _continuation(self, one: SpanBatch, components: list[Component]) -> str:
        """The outcome, and the first words: what a model writes to a harmful request is not shown in full."""
        if not self._max_new_tokens or any(one.n_generated):
            return "–"
        out = generate(self.model, one, *components, max_new_tokens=self._max_new_tokens)
        words = first_words(out.answer[0] or out.cot[0])
        return f"{out.outcome[0]}: {visible(words)}" if words else out.outcome[0]

    def _checked(self, heads: Sequence[Head]) -> tuple[Head, ...]:
        return tuple((int(layer), int(head)) for layer, head in model_facts(self.model).check_heads(heads))

    def _with(self, edits: list[Edit]) -> HeadExplorer:
        for edit in edits:
            edit.component()
        self.edits = edits
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
            "_esm": module(),
            "view": traitlets.Dict().tag(sync=True),
            "arrays": traitlets.List().tag(sync=True),
        }
        arrays = [array.astype("<f4").tobytes() for array in self.view.arrays]
        widget = type("HeadExplorerWidget", (anywidget.AnyWidget,), traits)(
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
        return f"HeadExplorer({self.view.data['title']}: {edits})"


def _why_no_score(batch: SpanBatch) -> str:
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
