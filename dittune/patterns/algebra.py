"""Patterns: which query-key pairs of two grids attend; with `&`, `|` and `~`.

A pattern answers two questions. `allows` decides single pairs and is the definition. `bounds`
decides whole boxes of tokens at once: is a pair possible, are all pairs certain? It may be cautious
(possible but in fact absent); a plan then looks at the pairs of the undecided blocks, and only
there, so that nothing of size tokens x tokens is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Boxes(NamedTuple):
    """The bounding boxes of blocks of tokens.

    Attributes:
        low: smallest `(frame, row, column)` of each block, int64 `[n, 3]`.
        high: largest, inclusive, int64 `[n, 3]`.
    """

    low: torch.Tensor
    high: torch.Tensor


class Tables(NamedTuple):
    """An element rule that a kernel can evaluate from small integers per token.

    Attributes:
        rule: `window`: a key is seen iff `first <= key <= last` on each axis;
            `disc`: iff the squared distance to the key is below the query's limit.
        query: int32 `[Sq, 6]`: for `window` first (3) and last (3); for `disc` coordinates (3),
            limit, 0, 0.
        key: int32 `[Skv, 3]`, coordinates.
    """

    rule: str
    query: torch.Tensor
    key: torch.Tensor


class Pattern:
    """Base of all patterns. Derived classes are frozen dataclasses, hence usable as cache keys.

    Attributes:
        exact_on_boxes: `bounds` is exact, not only cautious, where both blocks fill their boxes.
    """

    exact_on_boxes = False

    def allows(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether each pair attends.

        Args:
            query: `(frame, row, column)` on the query grid, int64 `[..., 3]`.
            key: on the key grid, int64 `[..., 3]`; leading axes broadcast with those of `query`.

        Returns:
            bool `[...]`.
        """
        raise NotImplementedError

    def bounds(self, query: Boxes, key: Boxes) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether some pair of two boxes may attend, and whether all do: bool `[nq, nk]` each."""
        raise NotImplementedError

    def tables(self, query: torch.Tensor, key: torch.Tensor) -> Tables | None:
        """The rule for these tokens as tables, from coordinates `[Sq, 3]` and `[Skv, 3]`.

        None where no such rule exists; the plan then stores a bit per pair of its partial blocks.
        """
        return None

    def __and__(self, other: Pattern) -> Pattern:
        return _Both(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return ~(~self & ~other)

    def __invert__(self) -> Pattern:
        return self.inner if isinstance(self, _Not) else _Not(self)


@dataclass(frozen=True)
class _Both(Pattern):
    """Pairs that both patterns allow."""

    left: Pattern
    right: Pattern

    def allows(self, query, key):
        return self.left.allows(query, key) & self.right.allows(query, key)

    def bounds(self, query, key):
        possible, certain = self.left.bounds(query, key)
        also_possible, also_certain = self.right.bounds(query, key)
        return possible & also_possible, certain & also_certain


@dataclass(frozen=True)
class _Not(Pattern):
    """Pairs that a pattern does not allow."""

    inner: Pattern

    @property
    def exact_on_boxes(self) -> bool:
        return self.inner.exact_on_boxes

    def allows(self, query, key):
        return ~self.inner.allows(query, key)

    def bounds(self, query, key):
        possible, certain = self.inner.bounds(query, key)
        return ~certain, ~possible


class AxisPattern(Pattern):
    """A pattern that asks each axis separately: a pair attends iff all three axes agree.

    Derived classes give one small matrix an axis; everything else follows from these, exactly.
    """

    exact_on_boxes = True

    def axes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For frame, row, column: which key coordinates each query coordinate sees, bool `[q, k]`.

        Computed once for each pattern; see that derived classes decorate it with `lru_cache`.
        """
        raise NotImplementedError

    def allows(self, query, key):
        seen = [matrix[query[..., i], key[..., i]] for i, matrix in enumerate(self.axes())]
        return seen[0] & seen[1] & seen[2]

    def bounds(self, query, key):
        possible = certain = torch.ones((), dtype=torch.bool)
        for i, matrix in enumerate(self.axes()):
            some, every = rectangles(
                matrix, query.low[:, i], query.high[:, i], key.low[:, i], key.high[:, i]
            )
            possible, certain = possible & some, certain & every
        return possible, certain

    def tables(self, query, key):
        """`window`, where each query sees a run of coordinates without gaps on each axis."""
        first, last = [], []
        for i, matrix in enumerate(self.axes()):
            seen = matrix.int()
            start, count = seen.argmax(1), seen.sum(1)
            stop = seen.shape[1] - 1 - seen.flip(1).argmax(1)
            if bool(((stop - start + 1 != count) & (count > 0)).any()):
                return None
            at = query[:, i]
            first.append(start[at])
            last.append(torch.where(count > 0, stop, -1)[at])
        return Tables("window", torch.stack(first + last, dim=1).int(), key.int())


def rectangles(matrix, q_low, q_high, k_low, k_high):
    """Is any, are all entries of `matrix` True in each rectangle? bool `[nq, nk]` twice.

    Blocks share few different intervals, so rectangles are summed once for each different pair.
    """
    q_spans, q_at = torch.stack([q_low, q_high], 1).unique(dim=0, return_inverse=True)
    k_spans, k_at = torch.stack([k_low, k_high], 1).unique(dim=0, return_inverse=True)
    sums = torch.zeros(matrix.shape[0] + 1, matrix.shape[1] + 1, dtype=torch.int64)
    sums[1:, 1:] = matrix.long().cumsum(0).cumsum(1)
    rows = sums[q_spans[:, 1] + 1] - sums[q_spans[:, 0]]
    count = rows[:, k_spans[:, 1] + 1] - rows[:, k_spans[:, 0]]
    area = (q_spans[:, 1] - q_spans[:, 0] + 1)[:, None] * (k_spans[:, 1] - k_spans[:, 0] + 1)
    return (count > 0)[q_at][:, k_at], (count == area)[q_at][:, k_at]


class BlockRule:
    """A rule that keeps or drops whole blocks: a method's own estimate, or a published block mask.

    Derived classes are hashable; those that wrap a tensor compare by identity.
    """

    def keep(self, query_size: int, key_size: int) -> torch.Tensor:
        """Which blocks of `query_size x key_size` tokens are kept, bool `[nq, nk]`."""
        raise NotImplementedError


class GivenBlocks(BlockRule):
    """Blocks chosen elsewhere, for example by scores.

    Args:
        kept: bool `[nq, nk]`.
    """

    def __init__(self, kept: torch.Tensor):
        self.kept = kept

    def keep(self, query_size, key_size):
        return self.kept
