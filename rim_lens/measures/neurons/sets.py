"""A set of neurons of one kind of model: algebra on it, random sets like it, and its way to disk and back."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from jaxtyping import Bool, Float

from rim_lens.errors import ReferenceMismatch, StatisticsError, StudyFolderError, UnknownNeuron
from rim_lens.folder import write_whole
from rim_lens.lens import Model, model_facts, weights_digest
from rim_lens.measures.controls import random_neurons_per_layer
from rim_lens.measures.stats import check_finite

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FILE, ARRAYS, EFFECTS = "neurons.json", "neurons.safetensors", "effects"
Neuron = tuple[int, int]
_BY_NEURON = ("scores", "activity")
_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False, init=False)
class NeuronSet:
    """Some of a model's MLP neurons (`hook_post`), and what is known of them.

    Two sets are equal where they hold the same neurons of the same shape of model, however they were found. ``|``, ``&``,
    ``-`` and ``^`` give sets of the same shape; what was measured on the whole model (`activity`, and `scores` where both
    have the same) goes with them, `effects` does not: a new set is not tested.

    Attributes:
        neurons: (layer, neuron) pairs, sorted, each once. It may be empty.
        n_layers: Layers of the model.
        d_mlp: Neurons in each of them.
        scores: What neurons were chosen by, for all neurons of the model [layer, neuron], or None.
        activity: Mean pooled activation of every neuron [layer, neuron], in the model's units, for matched controls; or None.
        made_by: How the set came about, as plain values for JSON: model, digest of its weights, settings, and the requests
            used ("select_ids", "select_texts", "select_families"), on which it must not be tested.
        effects: The causal check, `NeuronEffects`, or None: *not tested*.

    Raises:
        UnknownNeuron: A pair that a model of this shape does not have.
        ReferenceMismatch: `scores` or `activity` are of another shape.
        NotFinite: They hold NaN or infinity.
        StatisticsError: `made_by` holds what JSON cannot.

    >>> found = NeuronSet([(1, 3), (0, 2)], n_layers=2, d_mlp=4)
    >>> found.neurons, len(found), (0, 2) in found
    (((0, 2), (1, 3)), 2, True)
    >>> (found | [(0, 0)]).per_layer.tolist(), found.jaccard(found & [(0, 2)])
    ([2, 1], 0.5)
    """

    neurons: tuple[Neuron, ...]
    n_layers: int
    d_mlp: int
    scores: Float[np.ndarray, "layer neuron"] | None
    activity: Float[np.ndarray, "layer neuron"] | None
    made_by: dict[str, Any]
    effects: Any | None

    def __init__(
        self,
        neurons: Iterable[Neuron],
        n_layers: int,
        d_mlp: int,
        scores: Float[np.ndarray, "layer neuron"] | None = None,
        activity: Float[np.ndarray, "layer neuron"] | None = None,
        made_by: dict[str, Any] | None = None,
        effects: Any | None = None,
    ) -> None:
        shape = (n_layers, d_mlp)
        if min(shape) < 1:
            raise UnknownNeuron(
                f"a set of neurons of {n_layers} layers of {d_mlp} was asked for; both are at least 1."
            )
        values: dict[str, Any] = {
            "neurons": tuple(sorted({_checked(item, shape) for item in neurons})),
            "n_layers": int(n_layers),
            "d_mlp": int(d_mlp),
            "scores": _array(scores, "scores", shape),
            "activity": _array(activity, "activity", shape),
            "made_by": _plain(made_by or {}),
            "effects": effects,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, model: Model, neurons: Iterable[Neuron], **known: Any) -> Self:
        """Neurons of a model, named by hand or found elsewhere.

        Args:
            model: Any HookedTransformer or TransformerBridge.
            neurons: (layer, neuron) pairs.
            **known: `scores`, `activity`, `made_by`, `effects`.

        Raises:
            UnknownNeuron: The model lacks one.
            UnsupportedModel: The MLP is a mixture of experts.
        """
        facts = model_facts(model)
        named = facts.check_neurons(neurons)
        made_by = {"model": facts.to_dict(), "weights_digest": weights_digest(model)}
        known["made_by"] = {"how": "named", **made_by, **known.get("made_by", {})}
        return cls(named, facts.n_layers, facts.d_mlp, **known)

    # --- as a set ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.neurons)

    def __iter__(self) -> Iterator[Neuron]:
        return iter(self.neurons)

    def __contains__(self, neuron: object) -> bool:
        return neuron in set(self.neurons)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __or__(self, other: NeuronSet | Iterable[Neuron]) -> NeuronSet:
        return self._combined(other, "|", operator.or_)

    def __and__(self, other: NeuronSet | Iterable[Neuron]) -> NeuronSet:
        return self._combined(other, "&", operator.and_)

    def __sub__(self, other: NeuronSet | Iterable[Neuron]) -> NeuronSet:
        return self._combined(other, "-", operator.sub)

    def __xor__(self, other: NeuronSet | Iterable[Neuron]) -> NeuronSet:
        return self._combined(other, "^", operator.xor)

    @property
    def per_layer(self) -> np.ndarray:
        """How many are in each layer, Int [layer]."""
        return self.mask.sum(axis=1)

    @property
    def mask(self) -> Bool[np.ndarray, "layer neuron"]:
        """Which neurons of the model are in the set."""
        mask = np.zeros((self.n_layers, self.d_mlp), dtype=bool)
        if self.neurons:
            mask[tuple(np.array(self.neurons).T)] = True
        return mask

    def jaccard(self, other: NeuronSet | Iterable[Neuron]) -> float:
        """Share of the neurons in either set that are in both; NaN where both are empty, as nothing is compared then."""
        theirs = set(self._alike(other).neurons)
        either = theirs | set(self.neurons)
        return len(theirs & set(self.neurons)) / len(either) if either else float("nan")

    def ranked(self) -> list[Neuron]:
        """The neurons by falling score; ties, and all where there are no scores, by layer and place."""
        scores = self.scores
        return (
            list(self.neurons) if scores is None else sorted(self.neurons, key=lambda at: (-scores[at], at))
        )

    def random_like(
        self,
        n_sets: int = 100,
        per_layer: bool = True,
        matched: Literal["activity"] | None = None,
        seed: int = 0,
    ) -> list[NeuronSet]:
        """Random sets to hold this one against, see `random_neurons_per_layer`.

        Args:
            n_sets: How many; all that exist where there are fewer, so count them.
            per_layer: With as many neurons in each layer as this set. Otherwise drawn anywhere in the model: a yardstick
                that flatters a set which sits in the last layers, as these write into the logits.
            matched: "activity": each neuron replaced by one that is about as active.
            seed: Of the draws.

        Raises:
            NotEnoughData: The set is empty, or takes whole layers.
            StatisticsError: Matching was asked for and no activity is known.
        """
        if matched not in (None, "activity"):
            raise StatisticsError(f"matched={matched!r} was asked for; it is None or 'activity'.")
        if matched and self.activity is None:
            raise StatisticsError(
                "random sets matched in activity were asked for, and this set knows no activity; give NeuronSet(...,"
                " activity=pooled_activations(...).mean('prompt')), or leave them unmatched."
            )
        activity = self.activity if matched else None
        if per_layer:
            drawn = random_neurons_per_layer(self.neurons, self.d_mlp, n_sets, seed, activity)
        else:
            flat = [(0, layer * self.d_mlp + neuron) for layer, neuron in self.neurons]
            row = None if activity is None else activity.reshape(1, -1)
            anywhere = random_neurons_per_layer(flat, self.n_layers * self.d_mlp, n_sets, seed, row)
            drawn = [[divmod(place, self.d_mlp) for _, place in one] for one in anywhere]
        how = {"how": "random", "per_layer": per_layer, "matched": matched, "seed": seed}
        return [
            NeuronSet(
                one, self.n_layers, self.d_mlp, activity=self.activity, made_by=how | {"number": number}
            )
            for number, one in enumerate(drawn)
        ]

    # --- shown and kept ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        layers = f"{np.count_nonzero(self.per_layer)} of {self.n_layers} layers"
        tested = "tested" if self.effects is not None else "not tested"
        return f"NeuronSet({len(self)} of {self.n_layers * self.d_mlp} neurons in {layers}, {tested})"

    def _repr_html_(self) -> str:
        counts = ", ".join(
            f"{layer}: {count}" for layer, count in enumerate(self.per_layer.tolist()) if count
        )
        rows = "".join(
            f"<tr><td>{layer}</td><td>{neuron}</td>"
            + ("" if self.scores is None else f"<td>{self.scores[layer, neuron]:.4g}</td>")
            + "</tr>"
            for layer, neuron in self.ranked()[:_SHOWN]
        )
        head = "<tr><th>layer</th><th>neuron</th>" + ("" if self.scores is None else "<th>score</th></tr>")
        more = f"<p>and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        return f"<p><b>{escape(repr(self))}</b><br>by layer: {counts or 'none'}</p><table>{head}{rows}</table>{more}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron of the set: layer, neuron, score, activity (NaN where not known)."""
        import pandas as pd

        layers, places = (np.array([at[side] for at in self.neurons], dtype=np.int64) for side in (0, 1))
        nothing = np.full(len(self), np.nan)
        return pd.DataFrame(
            {
                "layer": layers,
                "neuron": places,
                "score": nothing if self.scores is None else self.scores[layers, places],
                "activity": nothing if self.activity is None else self.activity[layers, places],
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write neurons.json, neurons.safetensors (scores and activity) and effects/ into a folder, made where missing."""
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = {name: getattr(self, name) for name in _BY_NEURON if getattr(self, name) is not None}
        content = {
            "format_version": FORMAT_VERSION,
            "n_layers": self.n_layers,
            "d_mlp": self.d_mlp,
            "neurons": [list(neuron) for neuron in self.neurons],
            "made_by": self.made_by,
            "arrays": None,
            "tested": self.effects is not None,
        }
        if known:
            packed = save({name: np.ascontiguousarray(array) for name, array in known.items()})
            content["arrays"] = hashlib.sha256(packed).hexdigest()
            write_whole(folder / ARRAYS, packed)
        if self.effects is not None:
            self.effects.save(folder / EFFECTS)
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / FILE, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: A file is missing, corrupt, of another format version, or not of this set.
        """
        folder = Path(folder)
        try:
            read = json.loads((folder / FILE).read_text(encoding="utf-8"))
            version = read["format_version"]
            if version == FORMAT_VERSION:
                neurons = [(int(layer), int(neuron)) for layer, neuron in read["neurons"]]
                if sorted(set(neurons)) != neurons:
                    raise ValueError("its neurons are not sorted, or one stands there twice")
                return cls(
                    neurons,
                    read["n_layers"],
                    read["d_mlp"],
                    **_arrays_in(folder, read["arrays"]),
                    made_by=read["made_by"],
                    effects=_effects_in(folder) if read["tested"] else None,
                )
        except StudyFolderError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            raise StudyFolderError(
                f"{folder} holds no readable set of neurons ({problem}). Give the folder that NeuronSet.save wrote."
            ) from problem
        raise StudyFolderError(
            f"{folder}: format version {version} was found, and this rim_lens reads {FORMAT_VERSION}. Choose again."
        )

    # --- parts ---------------------------------------------------------------------------------------

    def _key(self) -> tuple[Any, ...]:
        return self.neurons, self.n_layers, self.d_mlp

    def _alike(self, other: NeuronSet | Iterable[Neuron]) -> NeuronSet:
        if not isinstance(other, NeuronSet):
            return NeuronSet(other, self.n_layers, self.d_mlp)
        if (self.n_layers, self.d_mlp) != (other.n_layers, other.d_mlp):
            raise ReferenceMismatch(
                f"a set of a model of {self.n_layers} layers of {self.d_mlp} neurons was to be combined with one of"
                f" {other.n_layers} layers of {other.d_mlp}; neurons of models of different shapes are not the same neurons."
            )
        return other

    def _combined(
        self,
        other: NeuronSet | Iterable[Neuron],
        sign: str,
        combine: Callable[[set[Neuron], set[Neuron]], set[Neuron]],
    ) -> NeuronSet:
        theirs = self._alike(other)
        scores = self.scores if theirs.scores is None else theirs.scores if self.scores is None else None
        if (
            self.scores is not None
            and theirs.scores is not None
            and np.array_equal(self.scores, theirs.scores)
        ):
            scores = self.scores
        return NeuronSet(
            combine(set(self.neurons), set(theirs.neurons)),
            self.n_layers,
            self.d_mlp,
            scores=scores,
            activity=theirs.activity if self.activity is None else self.activity,
            made_by=_joined(self, sign, theirs),
        )


def _joined(one: NeuronSet, sign: str, other: NeuronSet) -> dict[str, Any]:
    """How a combined set came about; requests that chose either side chose it."""
    requests: dict[str, Any] = {
        name: sorted({*one.made_by.get(name, []), *other.made_by.get(name, [])})
        for name in ("select_ids", "select_texts", "select_families")
        if name in one.made_by or name in other.made_by
    }
    return {"how": "combined", "operation": sign, "of": [one.made_by, other.made_by], **requests}


def _checked(item: Any, shape: tuple[int, int]) -> Neuron:
    try:
        pair = tuple(item)
        if len(pair) != 2 or any(isinstance(value, bool | np.bool_) for value in pair):
            raise TypeError
        layer, neuron = (operator.index(value) for value in pair)
    except TypeError:
        raise UnknownNeuron(
            f"neuron {item!r} was given; a neuron is a pair (layer, neuron) of whole numbers."
        ) from None
    if not (0 <= layer < shape[0] and 0 <= neuron < shape[1]):
        raise UnknownNeuron(
            f"neuron {item!r} was given; here are layers 0 to {shape[0] - 1} with neurons 0 to {shape[1] - 1}."
        )
    return layer, neuron


def _array(values: Any, name: str, shape: tuple[int, int]) -> Float[np.ndarray, "layer neuron"] | None:
    if values is None:
        return None
    array = np.array(values, dtype=np.float64)  # a copy: the set stays what it was
    if array.shape != shape:
        raise ReferenceMismatch(
            f"{name} of shape {array.shape} were given; a number for each of {shape[0]} layers and {shape[1]} neurons is needed."
        )
    check_finite(array, name, axes=("layer", "neuron"))
    array.setflags(write=False)
    return array


def _plain(made_by: dict[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(made_by, allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise StatisticsError(
            f"made_by cannot be kept as JSON ({problem}); give text, numbers, lists and dicts, and None for NaN."
        ) from problem
    return plain


def _arrays_in(folder: Path, digest: str | None) -> dict[str, Float[np.ndarray, "layer neuron"]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if digest is None:
        return {}
    packed = (folder / ARRAYS).read_bytes()
    if hashlib.sha256(packed).hexdigest() != digest:
        raise StudyFolderError(
            f"{folder / ARRAYS} is not the file that was written with {FILE}: corrupt, or of another set. Choose again."
        )
    try:
        return {name: array for name, array in load(packed).items() if name in _BY_NEURON}
    except SafetensorError as problem:
        raise ValueError(str(problem)) from problem


def _effects_in(folder: Path) -> Any:
    from importlib import import_module

    return import_module("rim_lens.measures.neurons.effects").NeuronEffects.load(folder / EFFECTS)
