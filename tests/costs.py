"""What the parts of a study cost on a model of a given shape: multiply-adds, counted by hand, and bytes.

Multiply-adds are those of products of matrices and of attention; norms, activations and softmax are left out. The counts of
`tests.sizing` are held against those that torch counts while the real code runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GROUP = 16  # passes without edits that a group of edits costs, see rim_lens.measures.scanning
FEWEST = 4  # edits in a group
CHECKED = 3  # readings of one prompt that every group is held against, and before the first group one of the longest and the shortest


@dataclass(frozen=True)
class Shape:
    """A decoder of Qwen3's kind: grouped queries, gated MLP, or experts in its place."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool = False
    n_experts: int = 0
    n_active: int = 0

    @property
    def query_output(self) -> int:
        """Weights of the query projection, and as many of the output's."""
        return self.d_model * self.n_heads * self.d_head

    @property
    def attention(self) -> int:
        """Weights of one layer's attention, norms left out."""
        return 2 * self.query_output + 2 * self.d_model * self.n_key_value_heads * self.d_head

    @property
    def mlp(self) -> int:
        """Weights that one row is multiplied with in the MLP of a layer."""
        router = self.d_model * self.n_experts
        return 3 * self.d_model * self.d_mlp * (self.n_active or 1) + router

    @property
    def parameters(self) -> int:
        """All of them."""
        mlp = 3 * self.d_model * self.d_mlp * (self.n_experts or 1) + self.d_model * self.n_experts
        norms = 2 * self.d_model + 2 * self.d_head
        words = self.d_model * self.d_vocab * (1 if self.tied else 2)
        return self.n_layers * (self.attention + mlp + norms) + words + self.d_model

    @property
    def per_row(self) -> int:
        """Multiply-adds of one row in one layer, what it looks at left out."""
        return self.attention + self.mlp

    @property
    def per_pair(self) -> int:
        """Multiply-adds of one query row and one key, all heads of a layer: score and value."""
        return 2 * self.n_heads * self.d_head

    @property
    def word(self) -> int:
        """Multiply-adds of unembedding one row."""
        return self.d_model * self.d_vocab


@dataclass(frozen=True)
class Asked:
    """Prompts of one length that begin alike.

    Attributes:
        n: Prompts.
        length: Tokens of each.
        shared: Tokens that all begin with.
    """

    n: int
    length: int
    shared: int = 0


def reading(shape: Shape, asked: Asked) -> float:
    """One pass over all prompts, last rows unembedded: a capture, a refusal score, one edit of a plain scan."""
    rows = asked.n * asked.length
    layer = rows * shape.per_row + rows * asked.length * shape.per_pair
    return float(shape.n_layers * layer + asked.n * shape.word)


def plain_scan(shape: Shape, asked: Asked, n_edits: int) -> float:
    """A baseline, and a pass for each edit."""
    return (1 + n_edits) * reading(shape, asked)


def generation(shape: Shape, asked: Asked, new: int) -> float:
    """Prompts read once, then a token at a time over the key-value cache; the last token is not read."""
    steps = new - 1
    seen = sum(asked.length + step for step in range(1, steps + 1))
    layers = asked.n * (steps * shape.per_row + seen * shape.per_pair)
    return reading(shape, asked) + shape.n_layers * layers + steps * asked.n * shape.word


def packed_scan(shape: Shape, asked: Asked, layers: Iterable[int], last_row: bool = False) -> float:
    """Edits of one head each, in these layers, read many at a time: see rim_lens.measures.marching.

    Args:
        shape: The model.
        asked: The prompts.
        layers: Of each edit.
        last_row: Whether the prompt's last row alone is edited, so that no other is computed again.
    """
    n, tail = asked.n, asked.length - asked.shared
    whole = asked.shared + n * tail
    seen = asked.shared**2 + n * tail * asked.length
    trunk = shape.n_layers * (whole * shape.per_row + seen * shape.per_pair) + n * shape.word
    rows, looked = (n, n * asked.length) if last_row else (whole, seen)
    top = shape.n_layers - 1
    attended = rows * shape.attention + looked * shape.per_pair
    finished = n * shape.mlp if rows > n else rows * shape.mlp
    baseline = reading(shape, Asked(1, asked.length))  # where all are as long
    total, cost, in_group = trunk + baseline, float(GROUP), GROUP
    begun: set[int] = set()
    for layer in layers:
        if cost >= GROUP and in_group >= FEWEST:
            total += CHECKED * reading(shape, Asked(1, asked.length))
            cost, in_group, begun = 0.0, 0, set()
        if layer not in begun:  # once for all edits that begin here
            total += attended
            begun.add(layer)
        if layer == top:
            total += n * (shape.query_output + shape.mlp)
        else:
            total += rows * (shape.query_output + shape.mlp)
            total += (top - 1 - layer) * (attended + rows * shape.mlp)
            total += attended + finished
        total += n * shape.word
        cost += (shape.n_layers - layer) * rows / (shape.n_layers * n * asked.length)
        in_group += 1
    return total


def cache(shape: Shape, tokens: int, size: int) -> float:
    """Bytes of the key-value cache."""
    return float(tokens * shape.n_layers * 2 * shape.n_key_value_heads * shape.d_head * size)
