"""Fine-tune a model on chains of thought and keep what it was on the way, ready for `load_model`."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rim_lens.chat import ChatFormat
from rim_lens.errors import CorruptWeights, StatisticsError, StudyFolderError
from rim_lens.folder import ResultFolder
from rim_lens.lens import load_plain, weights_digest
from rim_lens.provenance import provenance
from rim_lens.training.holding import Held, frozen, hold
from rim_lens.training.loop import TrainConfig, train
from rim_lens.training.lora import LoRA, add_lora, products, require_peft, save_adapter
from rim_lens.training.rows import Drawn, Row, drawn_rows

if TYPE_CHECKING:
    import pandas as pd

ASKED, DONE, BASE = "asked.json", "fine_tuned.json", "base"
SHORT = TrainConfig(steps=120, lr=2e-4, schedule="cosine", warmup=6)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuning run, as it lies in its folder.

    Attributes:
        folder: Where it lies.
        base: The model it began with, as `rl.load_model` knows it.
        steps: Steps at which checkpoints were written, ascending; the last one is where training ended.
        losses: Loss of every step in nats per token (without a penalty), before that step.
        drift: Per checkpoint, how far the weights are from the base: ‖W − W₀‖ / ‖W₀‖ over all parameters.
        stopped_by: "steps", or "drift" where `stop_at_drift` was reached.
        settings: What was asked for.
    """

    folder: Path
    base: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    drift: tuple[float, ...]
    stopped_by: str
    settings: dict[str, Any]

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, each for `rl.load_model`."""
        return [self.folder / f"step-{step}" for step in self.steps]

    @property
    def models(self) -> list[str]:
        """The base and then the checkpoints, each for `rl.load_model`."""
        return [self.base, *map(str, self.checkpoints)]

    @classmethod
    def load(cls, folder: str | Path) -> FineTuned:
        """Open a finished run.

        Raises:
            StudyFolderError: There is none, or its file is corrupt.
        """
        folder = Path(folder)
        found = ResultFolder(folder).read(DONE)
        try:
            return cls(
                folder=folder,
                base=str(folder.resolve() / BASE) if found["base"] is None else found["base"],
                steps=tuple(found["steps"]),
                losses=tuple(found["losses"]),
                drift=tuple(found["drift"]),
                stopped_by=found["stopped_by"],
                settings=found["settings"],
            )
        except (KeyError, TypeError) as problem:
            raise StudyFolderError(
                f"{folder / DONE} is corrupt ({problem!r}). Delete it and train again."
            ) from problem

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint: step, loss (mean of the steps since the checkpoint before), drift, folder."""
        import pandas as pd

        starts = (0, *self.steps[:-1])
        return pd.DataFrame(
            {
                "step": self.steps,
                "loss": [
                    sum(self.losses[start:stop]) / (stop - start)
                    for start, stop in zip(starts, self.steps, strict=True)
                ],
                "drift": self.drift,
                "folder": [str(path) for path in self.checkpoints],
            }
        )

    def __repr__(self) -> str:
        return (
            f"FineTuned({self.base} on {self.settings['rows']}, steps {', '.join(map(str, self.steps))}, drift"
            f" {self.drift[-1]:.3g}, stopped by {self.stopped_by})"
        )

    def _repr_html_(self) -> str:
        table = self.to_dataframe().drop(columns="folder")
        return f"<p>{html.escape(repr(self))}</p>" + table.to_html(index=False, float_format="{:.4g}".format)


def fine_tune(
    model: str | Path | tuple[Any, Any],
    rows: Sequence[Row] | Drawn,
    *,
    out: str | Path,
    config: TrainConfig = SHORT,
    steps: int | None = None,
    lora: LoRA | None = LoRA(),  # noqa: B008 - frozen
    checkpoints: int | Sequence[int] = 6,
    rows_per_step: int = 16,
    freeze: Iterable[tuple[int, int]] | None = None,
    penalise: Iterable[tuple[int, int]] | None = None,
    penalty: float = 0.0,
    stop_at_drift: float | None = None,
    seed: int = 0,
    row_average: bool = True,
    autocast: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FineTuned:
    """Fine-tune a model on rows with chains of thought, writing a checkpoint now and then.

    A plain AdamW loop (`rim_lens.training.loop.train`). The loss counts what the model writes itself: the chain of thought,
    the closing tag, the answer, the end of the turn. Every checkpoint opens with ``rl.load_model(folder)``: an adapter, whose
    product is folded into the base's weights, or with ``lora=None`` whole weights and tokenizer.

    *Freezing* is exact: rows of gate and up-projection (or in-projection and bias) and columns of the down-projection of the
    named neurons stay bit for bit what they were, under weight decay and under LoRA. Their activations may move all the
    same, as earlier layers are trained. *Penalising* adds penalty · ‖W − W₀‖² of those weights to the loss.

    A run that was finished is opened and not trained again; one that was interrupted begins anew, with the same numbers.

    Args:
        model: A name that `rl.load_model` knows, or (Hugging Face model, tokenizer), of which a copy is trained; it is then
            written to ``out/base``, as checkpoints belong to a model that can be loaded.
        rows: Rows with chains of thought (`rim_lens.training.maths_rows`), shuffled and drawn by `seed`; or rows drawn anew
            at each step (`rim_lens.organisms.toy.recipe.toy_rows`).
        out: The run's folder.
        config: How to step. The default is short and suits a LoRA on a small model; arXiv 2509.00544 takes AdamW with 1e-5,
            cosine, batches of 32, 3 to 7 epochs.
        steps: Another number of steps than the config's.
        lora: The adapter to train; None trains all weights.
        checkpoints: How many, evenly over the steps; or at which steps. The last step always has one.
        rows_per_step: Rows in a batch, where they are drawn from a list.
        freeze: (layer, neuron) pairs that stay as they are.
        penalise: (layer, neuron) pairs that are pulled back.
        penalty: How hard, in nats per squared unit of weight. AdamW rescales it with the rest of the gradient.
        stop_at_drift: Stop after the first step at which ‖W − W₀‖ / ‖W₀‖ is at least this: for a control that went as far
            as another run. The schedule of the learning rate is not shortened.
        seed: Of the rows' order, the adapter's start, and dropout where a model has any.
        row_average: Whether every row counts alike, or every token.
        autocast: dtype of matrix products.
        device: Where to train.
        progress: Show a progress bar.

    Raises:
        UnknownModel: There is no such model.
        UnknownNeuron: The model lacks a neuron.
        UnsupportedModel: Neurons are to be held in MLPs of an unknown make.
        MissingExtra: LoRA, and peft is not installed.
        NotEnoughData: There is no row.
        StatisticsError: A number is out of range.
        StudyFolderError: The folder holds another run.
        NotFinite: The loss became NaN or infinite.

    >>> import tempfile, rim_lens as rl
    >>> from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = rl.fine_tune(
    ...         "toy", toy_rows("confirm"), out=folder, config=FINE_TUNE, steps=4, checkpoints=2, lora=None, progress=False
    ...     )
    ...     tuned = rl.load_model(run.checkpoints[-1])
    >>> run.steps, run.stopped_by, tuned.cfg.n_layers
    ((2, 4), 'steps', 2)
    """
    config = config if steps is None else replace(config, steps=steps)
    kept = _checked(config, checkpoints, penalty, stop_at_drift)
    if lora is not None:
        require_peft()
    held, pulled = _pairs(freeze), _pairs(penalise)
    if bool(pulled) != bool(penalty):
        raise StatisticsError(
            f"penalty={penalty} on {len(pulled)} neurons was asked for; give both penalise= and a positive penalty=, or none."
        )
    named = None if isinstance(model, tuple) else _name(model)
    hf_model, tokenizer = deepcopy(model) if isinstance(model, tuple) else load_plain(str(named))
    hf_model = hf_model.to(device)
    chat = ChatFormat.from_tokenizer(tokenizer)
    drawn = rows if isinstance(rows, Drawn) else drawn_rows(chat, rows, rows_per_step, seed)
    folder = ResultFolder(out)
    settings = {
        "base": named,
        "base_digest": weights_digest(hf_model),
        "rows": drawn.name,
        "config": asdict(config),
        "lora": None if lora is None else json.loads(json.dumps(asdict(lora))),
        "checkpoints": kept,
        "frozen": [list(pair) for pair in held],
        "penalised": [list(pair) for pair in pulled],
        "penalty": penalty,
        "stop_at_drift": stop_at_drift,
        "seed": seed,
        "row_average": row_average,
        "autocast": None if autocast is None else str(autocast),
    }
    if not isinstance(rows, Drawn):
        settings["rows_digest"] = _digest(rows)
    folder.claim(settings, ASKED)
    if folder.has(DONE):
        return FineTuned.load(out)
    if named is None:
        _save_whole(hf_model, tokenizer, folder.path / BASE)
    base = named or f"../{BASE}"  # as seen from a checkpoint, so that the run may be moved
    hf_model.requires_grad_(lora is None)
    before = _drift_from(hf_model, lora)
    adapted = None if lora is None else add_lora(hf_model, lora, seed)
    trained = hf_model if adapted is None else adapted.get_base_model()
    losses, drift = [], {}
    stopped_by = "steps"
    with ExitStack() as stack:
        stack.enter_context(_dropout_of(seed, torch.device(device)))
        entries = stack.enter_context(frozen(hold(trained, held))) if held else []
        moved = hold(trained, pulled) if pulled else None

        def on_step(step: int, loss: float) -> bool:
            nonlocal stopped_by
            for one in entries:
                one.restore()
            losses.append(loss)
            far = before() if stop_at_drift is not None or step + 1 in kept else math.nan
            stop = stop_at_drift is not None and far >= stop_at_drift
            if stop or step + 1 in kept:
                drift[step + 1] = far
                place = folder.path / f"step-{step + 1}"
                if adapted is None:
                    _save_whole(trained, tokenizer, place)
                else:
                    save_adapter(adapted, place, base=base)
            stopped_by = "drift" if stop else "steps"
            return stop

        train(
            trained,
            drawn.start(),
            config,
            row_average=row_average,
            on_step=on_step,
            progress=progress,
            autocast=autocast,
            penalty=None if moved is None else _penalty(moved, penalty),
        )
    folder.write(
        DONE,
        provenance("rl.fine_tune", ("torch", "transformers"))
        | {
            "base": named,
            "steps": list(drift),
            "losses": losses,
            "drift": list(drift.values()),
            "stopped_by": stopped_by,
            "settings": settings,
        },
    )
    return FineTuned.load(out)


def _checked(
    config: TrainConfig, checkpoints: int | Sequence[int], penalty: float, stop_at_drift: float | None
) -> list[int]:
    """The steps at which to write, and a refusal of what cannot be."""
    if config.steps < 1:
        raise StatisticsError(f"{config.steps} steps of training were asked for; give at least 1.")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise StatisticsError(f"penalty={penalty} was asked for; give 0 or a positive number.")
    if stop_at_drift is not None and not (math.isfinite(stop_at_drift) and stop_at_drift > 0):
        raise StatisticsError(f"stop_at_drift={stop_at_drift} was asked for; give a positive share, or None.")
    if isinstance(checkpoints, int):
        count = min(checkpoints, config.steps)
        if count < 1:
            raise StatisticsError(f"{checkpoints} checkpoints were asked for; give at least 1.")
        return sorted({round(config.steps * (place + 1) / count) for place in range(count)})
    strange = next((step for step in checkpoints if not 1 <= step <= config.steps), None)
    if strange is not None:
        raise StatisticsError(
            f"a checkpoint at step {strange} was asked for; training takes steps 1 to {config.steps}."
        )
    return sorted({*map(int, checkpoints), config.steps})


@contextmanager
def _dropout_of(seed: int, device: torch.device) -> Iterator[None]:
    """What is dropped out, where a model drops anything, comes from the seed; the caller's generators stay as they were."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _name(model: str | Path) -> str:
    """A name as `load_model` knows it from wherever it is called: a folder's whole path."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _pairs(neurons: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]]:
    return sorted({(int(layer), int(neuron)) for layer, neuron in neurons or ()})


def _digest(rows: Sequence[Row]) -> str:
    import hashlib

    told = json.dumps([[row.request.text, row.cot, row.answer] for row in rows])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _save_whole(model: Any, tokenizer: Any, place: Path) -> None:
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if not (place / "config.json").is_file():
        raise CorruptWeights(
            f"the {type(model).__name__} was written to {place} without a config.json, so that it cannot be loaded again. Train"
            " an adapter instead (lora=LoRA(...)) on a model that load_model knows by name."
        )


def _penalty(moved: Held, strength: float) -> Callable[[], Tensor]:
    return lambda: strength * moved.movement()


def _drift_from(model: Any, lora: LoRA | None) -> Callable[[], float]:
    """A function that says how far the weights are from where they are now: ‖W − W₀‖ / ‖W₀‖ over all parameters."""
    parameters = list(model.parameters())
    size = sum(float(p.detach().double().pow(2).sum()) for p in parameters) ** 0.5
    if lora is not None:
        # ‖B A‖² is the trace of two small Gram matrices.
        return lambda: (
            sum(
                scale**2 * float(((a.double() @ a.double().T) * (b.double().T @ b.double())).sum())
                for a, b, scale in _detached(model)
            )
            ** 0.5
            / size
        )
    start = [p.detach().clone() for p in parameters]

    def far() -> float:
        moved = sum(
            float((p.detach() - old).double().pow(2).sum()) for p, old in zip(parameters, start, strict=True)
        )
        return float(moved**0.5 / size)

    return far


def _detached(model: Any) -> list[tuple[Tensor, Tensor, float]]:
    return [(a.detach(), b.detach(), scale) for a, b, scale in products(model)]
