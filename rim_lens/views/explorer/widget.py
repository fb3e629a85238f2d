"""The head explorer with a live kernel: heads fetched when looked at, ablated or scaled, refusal measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from typing_extensions import override

from rim_lens.capturing import capture
from rim_lens.hooks.base import Component
from rim_lens.hooks.heads import AblateHeads, ScaleHeads
from rim_lens.lens import model_facts
from rim_lens.views.explorer.building import HeadView, head_view, packed
from rim_lens.views.explorer.live import Answer, Edit, LiveExplorer, check_written
from rim_lens.views.explorer.reading import HeadPatterns

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Head, Model
    from rim_lens.prompts import Prompt


@dataclass(frozen=True)
class HeadEdit(Edit):
    """Heads removed (z becomes zero) or scaled.

    >>> HeadEdit("scale", ((0, 5),), 0.5).code()
    'rl.ScaleHeads([(0, 5)], 0.5)'
    """

    letter: ClassVar[str] = "H"
    ablating: ClassVar[type[Component]] = AblateHeads
    scaling: ClassVar[type[Component]] = ScaleHeads


class HeadExplorer(LiveExplorer):
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

    edit: ClassVar[type[Edit]] = HeadEdit
    view: HeadView

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
        check_written(max_new_tokens)
        self.model = model
        self.chat = chat
        view = head_view(model, chat, prompts, conditions, **more)
        super().__init__(view, dict.fromkeys(view.batches, model), view.batches, max_new_tokens)

    def ablate(self, heads: Sequence[Head]) -> Self:
        """Remove heads, beside what is edited already.

        Raises:
            UnknownHead: The model lacks one.
        """
        return self._with([*self.edits, HeadEdit("ablate", self._checked(heads))])

    def scale(self, heads: Sequence[Head], factor: float) -> Self:
        """Multiply what heads write by a factor, beside what is edited already.

        Raises:
            UnknownHead: The model lacks one.
        """
        return self._with([*self.edits, HeadEdit("scale", self._checked(heads), float(factor))])

    @override
    def _fetched(self, message: Mapping[str, Any]) -> Answer:
        if message.get("kind") == "rows":
            return self._rows(int(message["prompt"]), (int(message["head"][0]), int(message["head"][1])))
        return super()._fetched(message)

    def _rows(self, prompt: int, head: Head) -> Answer:
        told: list[dict[str, int]] = []
        buffers: list[bytes] = []
        for batch in self.batches.values():
            one = batch.select([prompt])
            rows = capture(self.model, one, HeadPatterns([head]))["attention_patterns"].values[0, 0]
            told.append({"first": 0, "values": len(buffers)})
            buffers.append(packed(rows, 0).astype("<f4").tobytes())
        return {"conditions": told}, buffers

    @override
    def _checked(self, places: Sequence[Head]) -> tuple[Head, ...]:
        return tuple((int(layer), int(head)) for layer, head in model_facts(self.model).check_heads(places))
