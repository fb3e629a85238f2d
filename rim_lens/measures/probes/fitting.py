"""Difference-of-means probes on arrays: fitted, and held against a threshold.

Source: arXiv 2509.00544, section 3. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.stats import to_numpy

# A difference of means smaller than this share of the stream's norm is rounding: both classes read the same there.
_NOTHING = 1e-6

Streams = Float[np.ndarray, "sample layer place d_model"]


@dataclass(frozen=True, eq=False)
class Probe:
    """One direction with its threshold, and where it was taken.

    Attributes:
        direction: mean(positive) − mean(negative) [d_model], in units of the stream.
        threshold: τ: the midpoint of the two class means of training scores.
        layer: Layer whose stream it reads.
        place: Place it was taken at.
        site: Hook point it reads.
        condition: Think condition of its training prompts.
    """

    direction: Float[np.ndarray, " d_model"]
    threshold: float
    layer: int
    place: str
    site: str = "resid_post"
    condition: str = ""

    @property
    def read_by(self) -> int:
        """The first layer that reads the stream this probe reads; the number of layers where none does."""
        return self.layer if self.site == "resid_pre" else self.layer + 1

    def margin(self, score: ArrayLike) -> Float[np.ndarray, "..."]:
        """Scores on a scale that probes share: +1 at the training mean of the positive class, −1 at the negative one."""
        half = float(self.direction @ self.direction) / 2
        if half == 0:
            raise NotEnoughData(
                f"both classes read the same at layer {self.layer}, {self.place!r}: the probe's direction is zero."
            )
        return (to_numpy(score) - self.threshold) / half


@dataclass(frozen=True, eq=False)
class Probes:
    """A difference-of-means probe for each layer and place.

    Attributes:
        direction: mean(positive) − mean(negative) [layer, place, d_model], not normalised; zero where both classes read
            the same, NaN where a class had no sample at the place.
        threshold: τ [layer, place]: the midpoint of the two class means of training scores.
        places: Names.
        n: Training samples [2, place]: positive, negative.
        site: Hook point.
        condition: Think condition of the training prompts.
    """

    direction: Float[np.ndarray, "layer place d_model"]
    threshold: Float[np.ndarray, "layer place"]
    places: tuple[str, ...]
    n: Int[np.ndarray, "two place"]
    site: str = "resid_post"
    condition: str = ""

    def score(self, streams: ArrayLike) -> Float[np.ndarray, "sample layer place"]:
        """y·d for each sample, layer and place; NaN where a sample lacks the place.

        Args:
            streams: [sample, layer, place, d_model]; of a DataArray, the places of these probes are taken by name.
        """
        values = taken(streams, self.places)
        if values.shape[1:] != self.direction.shape:
            raise StatisticsError(
                f"streams of shape {values.shape} were given to probes of shape {self.direction.shape}"
                " [layer, place, d_model]; read them from the same model at the same places."
            )
        return np.stack(
            [
                np.einsum("skd,kd->sk", values[:, layer].astype(np.float64), self.direction[layer])
                for layer in range(values.shape[1])
            ],
            axis=1,
        )

    def share_of(self, scores: Float[np.ndarray, "sample layer place"]) -> Float[np.ndarray, "layer place"]:
        """Share of samples whose score is above the threshold, over those that have the place; NaN where none has."""
        known = np.isfinite(scores)
        n = known.sum(axis=0)
        above = (np.where(known, scores, -np.inf) > self.threshold).sum(axis=0)
        return np.where(n > 0, above / np.maximum(n, 1), np.nan)

    def score_share(self, streams: ArrayLike) -> Float[np.ndarray, "layer place"]:
        """The paper's probe score of a group: the share of its samples with y·d > τ.

        It says on which side of the threshold a group lies. It does not say that the model uses the direction.
        """
        return self.share_of(self.score(streams))

    def at(self, layer: int, place: str) -> Probe:
        """The probe of one layer and place.

        Raises:
            StatisticsError: There is none.
        """
        if place not in self.places or not 0 <= layer < len(self.direction):
            raise StatisticsError(
                f"no probe was fitted at layer {layer}, {place!r}; there are layers 0 to {len(self.direction) - 1} and the"
                f" places {', '.join(self.places)}."
            )
        column = self.places.index(place)
        return Probe(
            self.direction[layer, column],
            float(self.threshold[layer, column]),
            layer,
            place,
            self.site,
            self.condition,
        )


def fit_probes(
    positive: ArrayLike,
    negative: ArrayLike,
    places: Sequence[str] = (),
    *,
    site: str = "resid_post",
    condition: str = "",
) -> Probes:
    """Fit a difference-of-means probe for each layer and place.

    d = mean(positive) − mean(negative); a sample's score is y·d, and τ the midpoint of the two class means of training
    scores. (The paper takes the mean of all training scores, which unbalanced classes shift.)

    Args:
        positive: [sample, layer, place, d_model]; NaN where a sample lacks the place.
        negative: The same of the other class.
        places: Their names; those of the DataArrays where they are such. Places that one class lacks are left out.
        site: Hook point, kept beside the probes.
        condition: Think condition, kept beside the probes.

    Raises:
        NotEnoughData: A class has no sample.
        StatisticsError: The two differ in shape.

    >>> positive = np.array([[1.0, 0.0], [3.0, 0.0]]).reshape(2, 1, 1, 2)
    >>> probes = fit_probes(positive, -positive, ["assistant"])
    >>> probes.direction[0, 0].tolist(), float(probes.threshold[0, 0]), float(probes.score_share(positive)[0, 0])
    ([4.0, 0.0], 0.0, 1.0)
    """
    names = common_places(positive, negative, places)
    first, second = taken(positive, names), taken(negative, names)
    if first.shape[1:] != second.shape[1:] or len(names) != first.shape[2]:
        raise StatisticsError(
            f"positive samples have shape {first.shape}, negative ones {second.shape}, and {len(names)} places are named;"
            " beyond the samples they must agree: [sample, layer, place, d_model]."
        )
    if not len(first) or not len(second):
        raise NotEnoughData(
            f"{len(first)} positive and {len(second)} negative samples; each class needs one."
        )
    shape = first.shape[1:]
    direction, threshold = np.empty(shape), np.empty(shape[:2])
    for layer, column, (bad, good) in cells(first, second):
        direction[layer, column], threshold[layer, column] = fit(bad, good)
    n = np.stack([np.isfinite(side[:, 0, :, 0]).sum(axis=0) for side in (first, second)])
    return Probes(direction, threshold, tuple(names), n, site, condition)


# --- shared ------------------------------------------------------------------------------------------


def to_streams(values: Any) -> Streams:
    """As an array [sample, layer, place, d_model], in the dtype it has."""
    array = np.asarray(values)
    if array.ndim != 4:
        raise StatisticsError(
            f"an array of shape {array.shape} was given; probes take [sample, layer, place, d_model]."
        )
    return array


def taken(values: Any, places: Sequence[str]) -> Streams:
    """The named places of a DataArray; an array without names as it is.

    Raises:
        StatisticsError: A place is not there.
    """
    if not hasattr(values, "dims"):
        return to_streams(values)
    held = [str(name) for name in values["place"].values]
    absent = [name for name in places if name not in held]
    if absent:
        raise StatisticsError(
            f"place {absent[0]!r} is not in these streams, which hold {', '.join(held)}: it has no token in this condition."
        )
    return to_streams(values.sel(place=list(places)).transpose("prompt", "layer", "place", "d_model").values)


def common_places(positive: Any, negative: Any, places: Sequence[str] = ()) -> list[str]:
    """Names of the places that both classes have; those asked for where the arrays bear no names."""
    if not (hasattr(positive, "dims") and hasattr(negative, "dims")):
        return list(places) or [str(column) for column in range(to_streams(positive).shape[2])]
    held = [str(name) for name in positive["place"].values if name in negative["place"].values]
    return [name for name in places if name in held] if places else held


def cells(first: Streams, second: Streams) -> Iterator[tuple[int, int, tuple[np.ndarray, np.ndarray]]]:
    """Yield layer, place and the samples of both classes there, in float64."""
    for layer in range(first.shape[1]):
        for column in range(first.shape[2]):
            yield (
                layer,
                column,
                (first[:, layer, column].astype(np.float64), second[:, layer, column].astype(np.float64)),
            )


def fit(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, float]:
    """Direction and threshold of two classes [sample, d_model]; NaN where one is empty, a zero direction where both read the same."""
    held = [side[np.isfinite(side[:, 0])] for side in (positive, negative)]
    if not all(len(side) for side in held):
        return np.full(positive.shape[1], np.nan), float("nan")
    means = [side.mean(axis=0) for side in held]
    direction = means[0] - means[1]
    size = np.mean([np.linalg.norm(side, axis=1).mean() for side in held])
    if not np.linalg.norm(direction) > _NOTHING * size:
        direction = np.zeros_like(direction)
    return direction, float(direction @ (means[0] + means[1]) / 2)
