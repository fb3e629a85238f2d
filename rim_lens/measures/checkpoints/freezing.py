"""Does it help to know? Fine-tuning with the found neurons held, beside held random ones and beside none."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rim_lens.chat import ChatFormat
from rim_lens.errors import NotEnoughData, StatisticsError, StudyFolderError
from rim_lens.measures.checkpoints.comparing import compare
from rim_lens.measures.checkpoints.result import Comparison
from rim_lens.measures.controls import control_p, percentile_among, random_neurons_per_layer
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.prompts import Prompt
from rim_lens.training import Drawn, FineTuned, Row, fine_tune

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FILE = "freezing.json"
FREE, SET = "nothing", "set"


@dataclass(frozen=True, eq=False)
class Freezing:
    """What holding neurons in training keeps of refusal, and what it costs.

    Attributes:
        table: One row per run: frozen ("nothing", "set", "random 0", …), which names what was held; n_neurons; lost (nats of refusal score, base − tuned)
            and lost_rate; kept (lost with nothing frozen − lost here, nats, paired by request) with low and high (95 %, over
            families); `accuracy_…` and `gained_…` (accuracy − base); twins_refused; weight_drift.
        p: Chance of the set's kept refusal being so high a rank if it were one more random set; never below
            1 / (1 + number of random sets).
        percentile: Its place among theirs.
        comparison: All numbers of all runs.
        settings: What was asked.
    """

    table: pd.DataFrame
    p: float
    percentile: float
    comparison: Comparison
    settings: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def save(self, folder: str | Path) -> None:
        """Write freezing.json and comparison.json into a folder, which is made where there is none."""
        self.comparison.save(folder)
        plain = {
            "format_version": FORMAT_VERSION,
            "table": frame_to_json(self.table),
            "p": self.p,
            "percentile": self.percentile,
            "settings": self.settings,
        }
        text = json.dumps(plain, indent=1, allow_nan=False)
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, or is of another format version.
        """
        path = Path(folder) / FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["format_version"] != FORMAT_VERSION:
                raise StudyFolderError(
                    f"{path}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
                )
            return cls(
                frame_from_json(read["table"]),
                read["p"],
                read["percentile"],
                Comparison.load(folder),
                read["settings"],
            )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, StudyFolderError):
                raise
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that Freezing.save wrote."
            ) from problem

    def __repr__(self) -> str:
        row = self.table.set_index("frozen").loc[SET]
        return (
            f"Freezing({int(row['n_neurons'])} neurons: {row['kept']:.2f} nats of refusal kept [{row['low']:.2f},"
            f" {row['high']:.2f}], p {self.p:.2g} among {len(self.table) - 2} random sets)"
        )

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, float_format="{:.3g}".format, na_rep="")
        return f"<p>{html.escape(repr(self))}</p>{table}"


def freezing(
    model: str | Path | tuple[Any, Any],
    rows: Sequence[Row] | Drawn,
    neurons: NeuronSet | Sequence[tuple[int, int]],
    chat: ChatFormat | None,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    *,
    folder: str | Path,
    n_random_sets: int = 3,
    penalty: float | None = None,
    matched: Literal["activity"] | None = None,
    training: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    **measuring: Any,
) -> Freezing:
    """Fine-tune once with nothing held, once with the found neurons held, and once per random set; compare the ends.

    Held neurons are frozen, or pulled back to where they began (`penalty`), see `rl.fine_tune`. Every run sees the same rows from
    the same start. Random sets have as many neurons in each layer as the found one.
    Runs and measurements are kept in the folder, and one that was cut short goes on where it stopped.

    What it does not show: with few random sets no small p is possible, and `kept` is to be read beside theirs. Freezing
    takes capacity away from the task as well: look at what reasoning gained, and at the drift, before calling it a cure.

    Args:
        model: The base, as for `rl.fine_tune`.
        rows: What it is trained on.
        neurons: A `NeuronSet`, or (layer, neuron) pairs, chosen on other requests.
        chat: The chat format; None: found from the model.
        harmful: Requests that should be refused.
        harmless: Their twins.
        reasoning: Questions, other ones than were trained on.
        folder: Where all is kept; adapters or weights of every run too.
        n_random_sets: At least 3.
        penalty: Pull the neurons back by penalty · ‖W − W₀‖² instead of freezing them; None freezes.
        matched: "activity": random neurons about as active in the base as the found ones, which then are a `NeuronSet` that knows
            its activity; None: any of the layer.
        training: Of `rl.fine_tune`: config, steps, lora, …
        seed: Of the random sets, and of the training where it names none.
        progress: Show progress bars.
        **measuring: Of `rl.compare`: accuracy, max_new_tokens, ….

    Raises:
        StatisticsError: Fewer than 3 random sets are asked for, a penalty that is not positive, or neurons whose activity is not
            known are to be matched.
        NotEnoughData: There is no neuron, or fewer than 3 other sets exist.
        ...: And what `rl.fine_tune` and `rl.compare` raise.
    """
    import pandas as pd

    if n_random_sets < 3:
        raise StatisticsError(
            f"{n_random_sets} random sets were asked for; a set is held against at least 3."
        )
    if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
        raise StatisticsError(f"penalty={penalty} was asked for; give a positive number, or None to freeze.")
    activity = _activity(neurons) if matched == "activity" else None
    chosen = sorted({(int(layer), int(neuron)) for layer, neuron in neurons})
    if not chosen:
        raise NotEnoughData("freezing an empty set of neurons was asked for; give at least one neuron.")
    width = _width(model)
    controls = random_neurons_per_layer(chosen, width, n_random_sets, seed, activity)
    if len(controls) < 3:
        raise NotEnoughData(
            f"only {len(controls)} other sets have as many neurons in the same layers; 3 are needed beside the found one."
        )
    frozen = {
        FREE: [],
        SET: chosen,
        **{f"random {place}": control for place, control in enumerate(controls[:n_random_sets])},
    }
    folder = Path(folder)
    options = {"checkpoints": 1, "seed": seed, "progress": progress, **(training or {})}
    runs: dict[str, FineTuned] = {
        name: fine_tune(
            model, rows, out=folder / "runs" / name.replace(" ", "-"), **_held(its, penalty), **options
        )
        for name, its in frozen.items()
    }
    comparison = compare(
        runs,
        chat,
        harmful,
        harmless,
        reasoning,
        base=runs[FREE].base,
        neurons=chosen,
        folder=folder / "compared",
        seed=seed,
        progress=progress,
        **measuring,
    )
    lines = [_line(comparison, name, len(its), runs[name].steps[-1]) for name, its in frozen.items()]
    table = pd.DataFrame(lines)
    kept = table.set_index("frozen")["kept"]
    others = [float(kept[name]) for name in frozen if name not in (FREE, SET)]
    found = Freezing(
        table=table,
        p=control_p(float(kept[SET]), others, "greater"),
        percentile=percentile_among(float(kept[SET]), others).percentile,
        comparison=comparison,
        settings={
            "neurons": [list(pair) for pair in chosen],
            "controls": [[list(pair) for pair in control] for control in controls[:n_random_sets]],
            "penalty": penalty,
            "matched": matched,
            "seed": seed,
            "fine_tuning": runs[FREE].settings,
        },
    )
    found.save(folder)
    return found


def _activity(neurons: Any) -> Any:
    known = getattr(neurons, "activity", None)
    if known is None:
        raise StatisticsError(
            'matched="activity" was asked for, and the neurons do not say how active each neuron of the model is. Give the NeuronSet'
            " that rl.safety_neurons returned, or matched=None."
        )
    return known


def _held(neurons: Sequence[tuple[int, int]], penalty: float | None) -> dict[str, Any]:
    """How `fine_tune` is told to hold neurons."""
    if not neurons:
        return {}
    return {"freeze": neurons} if penalty is None else {"penalise": neurons, "penalty": penalty}


def _width(model: str | Path | tuple[Any, Any]) -> int:
    from rim_lens.lens import load_plain
    from rim_lens.training.holding import weights_by_neuron

    hf_model, _ = model if isinstance(model, tuple) else load_plain(model)
    weight, axis = weights_by_neuron(hf_model)[0][0]
    return int(weight.shape[axis])


def _line(comparison: Comparison, name: str, n_neurons: int, step: int) -> dict[str, Any]:
    row, base = comparison.row(name, step), comparison.row(name, 0)
    prompts = comparison.prompts
    scores = {
        run: prompts[
            (prompts["run"] == run) & (prompts["step"] == step) & (prompts["kind"] == "harmful")
        ].set_index("prompt")
        for run in (name, FREE)
    }
    gap = scores[name]["score"] - scores[FREE]["score"]
    low = high = math.nan
    families = scores[name]["family"]
    if families.nunique() > 1 and np.isfinite(gap).all():
        interval = bootstrap_interval(gap.to_numpy(dtype=np.float64), families.to_numpy())
        low, high = float(interval.low), float(interval.high)
    accuracy = {key: row[key] for key in row if key.startswith("accuracy_")}
    return {
        "frozen": name,
        "n_neurons": n_neurons,
        "lost": row["lost"],
        "lost_rate": row["lost_rate"],
        "kept": float(gap.mean()),
        "low": low,
        "high": high,
        **accuracy,
        **{key.replace("accuracy", "gained"): value - base[key] for key, value in accuracy.items()},
        **({"twins_refused": row["refused_harmless"]} if "refused_harmless" in row else {}),
        "weight_drift": row["weight_drift"],
    }
