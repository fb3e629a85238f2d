"""The circuit explorer with a live kernel: nodes and edges switched off, refusal and reasoning read again, the selection saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from typing_extensions import override

from rim_lens.batching import MAX_ROWS
from rim_lens.errors import CaptureError
from rim_lens.measures.circuits.result import FILE, Circuit
from rim_lens.measures.circuits.switching import CircuitSwitches
from rim_lens.views.explorer.circuit_building import CircuitView, circuit_view
from rim_lens.views.explorer.live import Answer, Live
from rim_lens.views.page import finite
from rim_lens.views.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model
    from rim_lens.prompts import Prompt

_HISTORY = ("harmful", "harmless", "reasoning right")  # kinds whose course is told


@dataclass(frozen=True)
class Switch:
    """One step of the history.

    Attributes:
        operation: "off" or "on" (the named nodes and edges); "alone" (all that is not the circuit's off as well) or "whole".
        names: Of nodes and edges.

    >>> Switch("off", ("L0H5", "L1H1 → refusal")).told()
    'off: L0H5; L1H1 → refusal'
    """

    operation: Literal["off", "on", "alone", "whole"]
    names: tuple[str, ...] = ()

    def told(self) -> str:
        """The step in words."""
        told = {"alone": "the circuit alone", "whole": "the whole model"}
        return told.get(self.operation) or f"{self.operation}: {'; '.join(map(visible, self.names))}"


class CircuitExplorer(Live):
    """The circuit explorer in a notebook: shown by being a cell's last line.

    What the page of `write_circuit_explorer` shows, and with the kernel behind it: nodes and edges switched off, alone or
    together, upon which refusal of the circuit's own evaluate requests and of their twins, and answers to reasoning
    questions, are read again by `CircuitSwitches`; the circuit alone, all else off; undo; the history as code (`code`); what
    is left saved as a circuit. Without a notebook the same is done by `off`, `on`, `alone`, `whole`, `undo`, and read from `scores`.

    Whoever switches until something is found has chosen by these requests: test the selection on others.

    Args:
        model: The model that the circuits were measured on, or one for each name.
        chat: Its format.
        circuits: A `Circuit`, or several by name, see `circuit_view`.
        harmful: The requests that they were measured on, select and evaluate side.
        harmless: Their twins.
        reasoning: Questions with checked answers, read as well.
        tuned: The tuned model of the contrast "tuned".
        max_rows: Most prompts in one pass.
        **more: As `circuit_view` takes them.

    Attributes:
        view: What is shown.
        edits: Steps in force, oldest first.
        chosen: Name of the circuit, and contrast, that are looked at; the page says which.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)
    >>> found = rl.circuit(model, chat, [(0, 5), (1, 1)], [(0, 3)], *requests, search=search)
    >>> explorer = rl.views.CircuitExplorer(model, chat, found, *requests)
    >>> print(explorer.off(["L1H1"]).code().splitlines()[-1])
    switches.read(['L1H1'])
    """

    view: CircuitView

    def __init__(
        self,
        model: Model | Mapping[str, Model],
        chat: ChatFormat,
        circuits: Circuit | Mapping[str, Circuit],
        harmful: Sequence[Prompt | str],
        harmless: Sequence[Prompt | str],
        reasoning: Sequence[Prompt | str] = (),
        *,
        tuned: Model | None = None,
        max_rows: int = MAX_ROWS,
        **more: Any,
    ) -> None:
        view = circuit_view(circuits, model, chat, harmful, harmless, tuned=tuned, max_rows=max_rows, **more)
        super().__init__(view)
        names = list(view.circuits)
        self.models = dict(model) if isinstance(model, Mapping) else dict.fromkeys(names, model)
        self.chat, self.tuned = chat, tuned
        self.requests = (harmful, harmless, reasoning)
        self.chosen = (names[0], str(view.data["circuits"][0]["contrasts"][0]["key"]))
        self._max_rows = max_rows
        self._switches: dict[tuple[str, str], CircuitSwitches] = {}

    def off(self, names: Iterable[str]) -> Self:
        """Switch nodes and edges off, beside what is off already.

        Raises:
            StatisticsError: No node or edge bears such a name.
        """
        return self._with([*self.edits, Switch("off", tuple(names))])

    def on(self, names: Iterable[str]) -> Self:
        """Switch nodes and edges on again.

        Raises:
            StatisticsError: No node or edge bears such a name.
        """
        return self._with([*self.edits, Switch("on", tuple(names))])

    def alone(self) -> Self:
        """Switch all off that is not the circuit's."""
        return self._with([*self.edits, Switch("alone")])

    def whole(self) -> Self:
        """Switch all on again that is not the circuit's."""
        return self._with([*self.edits, Switch("whole")])

    @property
    def switches(self) -> CircuitSwitches:
        """The chosen circuit's switches."""
        if self.chosen not in self._switches:
            name, contrast = self.chosen
            if name not in self.models:
                raise CaptureError(
                    f"no model was given for the circuit {name!r}; give one to switch its nodes off."
                )
            self._switches[self.chosen] = CircuitSwitches(
                self.models[name],
                self.chat,
                self.view.circuits[name],
                *self.requests,
                tuned=self.tuned,
                contrast=contrast,
                max_rows=self._max_rows,
            )
        return self._switches[self.chosen]

    @property
    def scores(self) -> pd.DataFrame:
        """What `CircuitSwitches.read` says with what is off now."""
        off, alone = self._state(self.edits)
        return self.switches.read(off, alone=alone)

    def selection(self) -> Circuit:
        """The chosen circuit without what is off, untested: see `CircuitSwitches.selection`."""
        return self.switches.selection(self._state(self.edits)[0])

    def save(self, folder: str | Path) -> Path:
        """Save the selection with `Circuit.save`, where no circuit lies yet.

        Raises:
            CaptureError: One lies there, or no folder was named.
        """
        target = Path(folder)
        if not str(folder).strip() or (target / FILE).exists():
            raise CaptureError(
                f"the selection was to be saved in {str(folder)!r}, where a circuit lies already or which is no name; name"
                " another folder."
            )
        self.selection().save(target)
        return target

    def code(self) -> str:
        """What is off now as Python that gives the same numbers."""
        name, contrast = self.chosen
        off, alone = self._state(self.edits)
        harmful, harmless, reasoning = ("harmful", "harmless", ", reasoning" if len(self.requests[2]) else "")
        told = "".join(f"# {edit.told()}\n" for edit in self.edits)
        tuned = ", tuned=explorer.tuned" if self.tuned is not None else ""
        return (
            f"{told}model, circuit = explorer.models[{name!r}], explorer.view.circuits[{name!r}]\n"
            f"{harmful}, {harmless}{reasoning or ', _'} = explorer.requests\n"
            "switches = rl.CircuitSwitches(model, chat, circuit,"
            f" {harmful}, {harmless}{reasoning}{tuned}, contrast={contrast!r})\n"
            f"switches.read({off!r}{', alone=True' if alone else ''})"
        )

    # --- what the page asks ---

    @override
    def answer(self, message: Mapping[str, Any]) -> Answer:
        if message.get("kind") == "save":
            return {"saved": str(self.save(str(message["folder"])))}, []
        if message.get("kind") != "apply":
            return super().answer(message)
        before = self.chosen
        told = self.view.data["circuits"][int(message["circuit"])]
        self.chosen = (told["key"], str(message["contrast"]))
        try:
            steps = [Switch(step["operation"], tuple(step.get("names", ()))) for step in message["steps"]]
            reply = self._measured(steps)
        except Exception:
            self.chosen = before  # what cannot be done leaves all as it was
            raise
        self.edits = steps
        return {**reply, "code": self.code()}, []

    def _measured(self, steps: list[Switch]) -> dict[str, Any]:
        course = [self._state(steps[:stop]) for stop in range(len(steps) + 1)]
        tables = [self.switches.read(off, alone=alone) for off, alone in course]
        kinds = [kind for kind in _HISTORY if kind in set(tables[0]["kind"])]
        history = [
            {
                "edit": step.told(),
                "scores": [float(table.set_index("kind")["after"][kind]) for kind in kinds],
            }
            for step, table in zip([Switch("whole"), *steps], tables, strict=True)
        ]
        off, alone = course[-1]
        rows = finite(tables[-1].to_dict("records"))
        return {"rows": rows, "history": history, "kinds": kinds, "off": off, "alone": alone}

    def _state(self, steps: Sequence[Switch]) -> tuple[list[str], bool]:
        """What is off after some steps, and whether the circuit is alone."""
        off: set[str] = set()
        alone = False
        for step in steps:
            if step.operation in ("off", "on"):
                names = self.switches.checked(step.names)
                off = off | set(names) if step.operation == "off" else off - set(names)
            elif step.operation in ("alone", "whole"):
                alone = step.operation == "alone"
            else:
                raise CaptureError(
                    f"a step {step.operation!r} was asked for; there are 'off', 'on', 'alone' and 'whole'."
                )
        return self.switches.checked(off), alone

    @override
    def _with(self, edits: Sequence[Any]) -> Self:
        self._state(edits)
        return super()._with(edits)
