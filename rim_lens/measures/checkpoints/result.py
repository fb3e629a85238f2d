"""What `compare` found: one row per checkpoint, and what can be asked of the rows."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rim_lens.errors import StatisticsError, StudyFolderError
from rim_lens.measures.checkpoints import relating
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.stats import Alternative

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FILE = "comparison.json"
_FRAMES = ("table", "random", "prompts")
DRIFTS = {"weights": "weight_drift", "kl": "kl"}
# What is correlated and forecast by, where nothing is named: RAS with its rivals.
METRICS = (
    *("ras", "floored_ras", "safety_drop", "reasoning_rise", "arithmetic", "geometric", "minimum", "product"),
    *("ras_all", "ras_random", "l2_safety", "l2_reasoning", "cka_ratio", "cka_ratio_model"),
    *("whitened_cosine_shift", "kl", "weight_drift"),
)
OUTCOMES = (
    *("score_harmful", "score_harmless", "lost", "lost_harmless"),
    *("refused_harmful", "complied_harmful", "refused_harmless", "lost_rate"),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Checkpoints of fine-tuning runs, each held against the base.

    Attributes:
        table: One row per checkpoint, and one at step 0 per run, the base: run, step, model, weights_digest; mean refusal score
            (nats) on harmful and harmless requests (`score_…`), `lost` and `lost_harmless` (base − checkpoint); what is
            written: shares refused_harmful, complied_harmful, refused_harmless, `lost_rate` (base − checkpoint); `accuracy_…` by
            think condition; weight_drift, kl and the other metrics of `rl.entanglement`: of the set (ras, …), of all neurons
            (`…_all`), mean of the random sets (`…_random`), of the model (cka_ratio_model, …); at that checkpoint, ras_percentile
            of the set among random sets, and ras_p, its rank among sets that the same pairs choose with labels exchanged.
        random: The metrics of each random set: run, step, set and a column each. The sets are the same at all checkpoints.
        prompts: One row per checkpoint and prompt: run, step, kind, prompt, family (those whose twins swap the same
            words are one, see `rim_lens.measures.twins.witnesses`), score (nats), outcome (refuse, comply, other; of reasoning
            questions right or wrong, in the first condition of accuracy).
        settings: What was asked, models, neurons, digests.
    """

    table: pd.DataFrame
    random: pd.DataFrame
    prompts: pd.DataFrame
    settings: dict[str, Any]

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return list(dict.fromkeys(self.table["run"]))

    @property
    def metrics(self) -> list[str]:
        """Those of the usual metrics that this comparison has numbers of."""
        tuned = self.table[self.table["step"] > 0]
        return [
            name for name in METRICS if name in tuned and np.isfinite(tuned[name].to_numpy(np.float64)).any()
        ]

    def row(self, run: str, step: int) -> dict[str, Any]:
        """One checkpoint.

        Raises:
            StatisticsError: There is none.
        """
        found = self.table[(self.table["run"] == run) & (self.table["step"] == step)]
        if len(found) != 1:
            there = self.table[self.table["run"] == run]["step"].tolist()
            told = f"it has steps {there}" if there else f"there are {', '.join(self.runs)}"
            raise StatisticsError(f"step {step} of run {run!r} was asked for; {told}.")
        cells = found.iloc[0].items()
        return {str(name): cell.item() if isinstance(cell, np.generic) else cell for name, cell in cells}

    def correlations(
        self,
        metric: str | Sequence[str] | None = None,
        outcome: str = "lost",
        *,
        groups: Mapping[str, str] | None = None,
        kinds: Mapping[str, str] | None = None,
        units: Mapping[str, str] | None = None,
        alternative: Alternative = "two-sided",
        n_permutations: int = 9999,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Correlate metrics with an outcome over checkpoints: pooled, within runs, across runs, and run by run.

        A correlation within a run has no p: its checkpoints follow each other. The others have two, from exchanging the courses
        of whole runs, where that can be done in at least 24 ways. p exchanges runs of one group, whatever their kind: it includes
        differences between kinds, and says little of runs of few kinds. ``p_…_kind`` exchanges within kinds, whole units where these
        are named. Neither tells what a metric does from all that goes with it. See
        `rim_lens.measures.checkpoints.relating.correlations` for columns, and for what each p leaves open.

        Args:
            metric: One or several; None: RAS and its rivals. Several are several tests: no p is corrected for them.
            outcome: "lost" (nats), "lost_rate", "score_harmful", or any other column.
            groups: Run → group within which runs are exchanged; None: `settings["groups"]` where runs of several
                comparisons were joined, else all.
            kinds: Run → kind of training. None: no ``p_…_kind``.
            units: Run → seed of training or base, where each has one run of every kind: they change places whole.
            alternative: Of the test.
            n_permutations: Drawn at most, where not all are counted.
            seed: Of what is drawn.

        Raises:
            StatisticsError: There is no such column.
        """
        import pandas as pd

        names = self.metrics if metric is None else [metric] if isinstance(metric, str) else list(metric)
        return pd.concat(
            [
                relating.correlations(
                    self.table,
                    name,
                    outcome,
                    groups=groups or self.settings.get("groups"),
                    kinds=kinds,
                    units=units,
                    random=self.random if name in self.random and len(self.random) else None,
                    alternative=alternative,
                    n_permutations=n_permutations,
                    seed=seed,
                )
                for name in names
            ],
            ignore_index=True,
        )

    def drift_matched(
        self,
        target: str,
        control: str,
        by: Literal["weights", "kl"] = "weights",
        *,
        columns: Sequence[str] | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Hold each checkpoint of one run against another where that had drifted as far from the base.

        Args:
            target: A run.
            control: Another.
            by: Drift of the weights, or of the predictions (KL on task tokens).
            columns: What to compare; None: refusal, accuracy and RAS.
            seed: Of the intervals.

        Returns:
            See `rim_lens.measures.checkpoints.relating.drift_matched`. A positive ``lost_difference`` says that the target
            lost more refusal than the control did at the same drift.

        Raises:
            StatisticsError: There is no such run, column or drift.
        """
        if by not in DRIFTS:
            raise StatisticsError(f"drift by {by!r} was asked for; there are {', '.join(DRIFTS)}.")
        usual = ["lost", "lost_rate", "score_harmful", "refused_harmful", "refused_harmless"]
        usual += [name for name in self.table if name.startswith("accuracy_")] + ["ras"]
        # The difference of "lost" is told with its interval, so it is always there.
        names = usual if columns is None else list(dict.fromkeys(["lost", *columns]))
        return relating.drift_matched(
            self.table,
            self.prompts,
            target,
            control,
            by=DRIFTS[by],
            columns=[name for name in names if columns is not None or name in self.table],
            seed=seed,
        )

    def forecast(
        self,
        first: int = 1,
        metric: str | Sequence[str] | None = None,
        outcome: str = "lost",
        *,
        before: Mapping[str, float] | None = None,
        groups: Mapping[str, str] | None = None,
        kinds: Mapping[str, str] | None = None,
        units: Mapping[str, str] | None = None,
        n_permutations: int = 9999,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Predict the last checkpoint's outcome of held-out runs from a metric's mean over the first checkpoints.

        Each run (or group of runs) is held out in turn, a line is fitted on the others, and the error is compared with that of
        predicting their mean. p exchanges final outcomes between runs of one group (between all, where each is its own), and
        includes differences between kinds; p_kind exchanges within kinds, as in `correlations`.

        Args:
            first: So many first checkpoints, fewer than the shortest run has: the last one is what is foretold.
            metric: One or several; None: RAS, its rivals, and the outcome itself so far.
            outcome: A column.
            before: Run → a number known before training (`gradient_forecast`), in place of metrics.
            groups: Run → group held out together; None as in `correlations`.
            kinds: As in `correlations`, for p_kind.
            units: As in `correlations`, for p_kind.
            n_permutations: Drawn at most, where not all are counted.
            seed: Of what is drawn.

        Returns:
            metric, first, outcome, skill (1 − squared error / that of the mean: 0 is no better), rmse, rmse_mean, p, p_kind,
            n_runs, n_permutations, reason and reason_kind (why there is no number).

        Raises:
            StatisticsError: There is no such column, or fewer checkpoints than `first` before the last one.
        """
        import pandas as pd

        tuned = self.table[self.table["step"] > 0].sort_values("step", kind="stable")
        fewest = int(tuned.groupby("run").size().min()) if len(tuned) else 0
        if before is None and not 1 <= first < fewest:
            told = (
                f"runs have {fewest}; give 1 to {fewest - 1}"
                if fewest > 1
                else f"a run has {fewest}: none comes before its last. Compare more checkpoints of a run, or give before="
            )
            raise StatisticsError(f"the first {first} checkpoints were to forecast the last, and {told}.")
        names = (
            [*self.metrics, outcome] if metric is None else [metric] if isinstance(metric, str) else metric
        )
        missing = [name for name in (*names, outcome) if name not in tuned]
        if missing:
            raise StatisticsError(
                f"column {missing[0]!r} was asked for; there are {', '.join(tuned.columns)}."
            )
        by_run = {str(run): rows for run, rows in tuned.groupby("run", sort=False)}
        final = {run: float(rows[outcome].iloc[-1]) for run, rows in by_run.items()}
        early = (
            {
                name: {run: float(rows[name].iloc[:first].mean(skipna=False)) for run, rows in by_run.items()}
                for name in names
            }
            if before is None
            else {"before training": dict(before)}
        )
        lines = []
        for name, numbers in early.items():
            found = relating.forecast(
                numbers,
                final,
                groups=groups or self.settings.get("groups"),
                kinds=kinds,
                units=units,
                n_permutations=n_permutations,
                seed=seed,
            )
            found.pop("predicted")
            lines.append(
                {"metric": name, "first": first if before is None else 0, "outcome": outcome, **found}
            )
        return pd.DataFrame(lines)

    def to_dataframe(self, what: str = "table") -> pd.DataFrame:
        """One of the tables: "table", "random" or "prompts".

        Raises:
            StatisticsError: There is no such table.
        """
        if what not in _FRAMES:
            raise StatisticsError(f"table {what!r} was asked for; there are {', '.join(_FRAMES)}.")
        found: pd.DataFrame = getattr(self, what).copy()
        return found

    def only(self, runs: Sequence[str]) -> Comparison:
        """Some of the runs, in the order they have here.

        Raises:
            StatisticsError: One is not there, or none was named.
        """
        missing = [run for run in runs if run not in self.runs]
        if missing or not runs:
            raise StatisticsError(
                f"run {missing[0]!r} was asked for; there are {', '.join(self.runs)}."
                if missing
                else f"no run was named; there are {', '.join(self.runs)}."
            )
        frames = {
            name: frame[frame["run"].isin(list(runs))].reset_index(drop=True)
            for name, frame in ((name, getattr(self, name)) for name in _FRAMES)
        }
        return Comparison(**frames, settings=self.settings)

    @classmethod
    def joined(cls, comparisons: Mapping[str, Comparison]) -> Self:
        """Put comparisons of several bases together; each run is then called ``name/run``, and the name is its group.

        Numbers of two bases have other units of activation and other neurons: what is pooled over them says less. Exchanges
        between runs stay within a group, and forecasts hold out a whole group.

        Args:
            comparisons: Name (of the base, a seed, say) → comparison.

        Raises:
            StatisticsError: There is none.
        """
        import pandas as pd

        if not comparisons:
            raise StatisticsError("no comparison was given; give at least one.")
        frames = {
            frame: pd.concat(
                [
                    getattr(one, frame).assign(run=lambda rows, name=name: name + "/" + rows["run"])
                    for name, one in comparisons.items()
                ],
                ignore_index=True,
            )
            for frame in _FRAMES
        }
        groups = {f"{name}/{run}": name for name, one in comparisons.items() for run in one.runs}
        settings = {"joined": {name: one.settings for name, one in comparisons.items()}, "groups": groups}
        return cls(**frames, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN becomes None."""
        frames = {name: frame_to_json(getattr(self, name)) for name in _FRAMES}
        return {"format_version": FORMAT_VERSION, **frames, "settings": self.settings}

    def save(self, folder: str | Path) -> None:
        """Write comparison.json into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

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
                    " Compare again."
                )
            return cls(**{name: frame_from_json(read[name]) for name in _FRAMES}, settings=read["settings"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, StudyFolderError):
                raise
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that Comparison.save wrote."
            ) from problem

    def __repr__(self) -> str:
        n = int((self.table["step"] > 0).sum())
        return f"Comparison({n} checkpoints of {len(self.runs)} runs: {', '.join(self.runs)})"

    def _repr_html_(self) -> str:
        shown = {
            "run": "run",
            "step": "step",
            "score_harmful": "refusal score (nats)",
            "refused_harmful": "harmful refused",
            "refused_harmless": "twins refused",
            **{name: name.replace("_", " ") for name in self.table if name.startswith("accuracy_")},
            "weight_drift": "weight drift",
            "kl": "KL (nats/token)",
            "ras": "RAS",
            "ras_random": "RAS, random sets",
            "ras_percentile": "percentile",
        }
        columns = [name for name in shown if name in self.table]
        head = "".join(f"<th>{html.escape(shown[name])}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_told(row[name]))}</td>" for name in columns) + "</tr>"
            for _, row in self.table.iterrows()
        )
        return f"<p>{html.escape(repr(self))}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)
