"""One layer's attention in one pass, for those who look at chosen query rows: from its pattern, or from queries and keys alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

_ROWS = 64  # query rows whose attention is held at a time


class Attention(ABC):
    """What a layer attends to.

    Attributes:
        n_prompts: Rows of the batch.
        n_queries: Query rows of this pass.
        n_keys: Keys they may see; more than queries under a key-value cache.
        device: Where the layer is.
    """

    n_prompts: int
    n_queries: int
    n_keys: int
    device: torch.device

    @property
    def offset(self) -> int:
        """Absolute position of the first query row."""
        return self.n_keys - self.n_queries

    @abstractmethod
    def mean(
        self, queries: Bool[Tensor, "prompt query"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "prompt head key"]:
        """Post-softmax attention, averaged over chosen query rows of each prompt, in float32.

        Args:
            queries: At least one in each prompt.
            heads: Only these heads, in this order; None for all.
        """


class Pattern(Attention):
    """Attention whose whole pattern is there."""

    def __init__(self, pattern: Float[Tensor, "prompt head query key"]) -> None:
        self._pattern = pattern
        self.n_prompts, _, self.n_queries, self.n_keys = pattern.shape
        self.device = pattern.device

    @override
    def mean(
        self, queries: Bool[Tensor, "prompt query"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "prompt head key"]:
        queries = queries.to(self.device)
        pattern = self._pattern if heads is None else self._pattern[:, list(heads)]
        if bool((queries.sum(dim=1) == 1).all()):
            index = queries.int().argmax(dim=1)
            return pattern[torch.arange(self.n_prompts, device=self.device), :, index].float()
        weights = queries.float() / queries.sum(dim=1, keepdim=True)
        return torch.einsum("phqk,pq->phk", pattern, weights.to(pattern.dtype)).float()


class QueriesAndKeys(Attention):
    """Attention of which no pattern is made: the rows asked for are computed, a few at a time.

    Args:
        query: Queries as they are multiplied with keys (rotated, normed).
        key: Keys likewise; one head serves a group of query heads.
        mask: What a query sees (bool), or what is added to its scores; None where each sees all keys up to itself.
        scaling: Of the scores.
    """

    def __init__(
        self,
        query: Float[Tensor, "prompt head query d_head"],
        key: Float[Tensor, "prompt kv key d_head"],
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        self._query, self._key, self._mask, self._scaling = query, key, mask, scaling
        self.n_prompts, _, self.n_queries, _ = query.shape
        self.n_keys = key.shape[2]
        self.device = query.device

    @override
    def mean(
        self, queries: Bool[Tensor, "prompt query"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "prompt head key"]:
        queries = queries.to(self.device)
        counts = queries.sum(dim=1, keepdim=True)
        # Each prompt's chosen rows come first; where it has fewer than others, rows of no weight follow.
        places = queries.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        weights = queries.gather(1, places).float() / counts
        every = range(self._query.shape[1]) if heads is None else heads
        found = torch.zeros(self.n_prompts, len(every), self.n_keys, device=self.device)
        for begin in range(0, places.shape[1], _ROWS):
            part = slice(begin, begin + _ROWS)
            found += torch.einsum("phrk,pr->phk", self._rows(places[:, part], heads), weights[:, part])
        return found

    def _rows(
        self, rows: Int[Tensor, "prompt row"], heads: Sequence[int] | None
    ) -> Float[Tensor, "prompt head row key"]:
        n_prompts, n_heads, _, width = self._query.shape
        n_rows = rows.shape[1]
        query = self._query.gather(2, rows[:, None, :, None].expand(-1, n_heads, -1, width))
        # Query heads of one key-value head are rows of one product.
        scores = query.reshape(n_prompts, self._key.shape[1], -1, width) @ self._key.transpose(2, 3)
        scores = scores.view(n_prompts, n_heads, n_rows, self.n_keys) * self._scaling
        mask = self._mask_of(rows)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        return (scores if heads is None else scores[:, list(heads)]).softmax(dim=-1, dtype=torch.float32)

    def _mask_of(self, rows: Int[Tensor, "prompt row"]) -> Tensor:
        if self._mask is None:
            return torch.arange(self.n_keys, device=self.device) <= (self.offset + rows)[:, None, :, None]
        mask = self._mask[..., : self.n_keys].expand(self.n_prompts, -1, -1, -1)
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, self.n_keys)
        return mask.expand(-1, -1, self.n_queries, -1).gather(2, index)


@dataclass(frozen=True, eq=False, repr=False)
class RowHook:
    """A hook on attention patterns that changes nothing and looks at chosen rows: it can be served where no pattern is."""

    look: Callable[[Attention], None]

    def __call__(self, pattern: Float[Tensor, "prompt head query key"]) -> None:
        """Look at a pattern that is there."""
        self.look(Pattern(pattern))
