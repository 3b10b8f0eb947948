"""Predicts what a tile shape costs, without building a plan, and finds the best one.

Source: the analytical model described in "Generalized Neighborhood Attention" (arXiv 2504.16922).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from dittune.patterns.algebra import AxisPattern, Boxes, Pattern, rectangles
from dittune.patterns.grid import Grid, TokenOrder, coordinates

PAIRS_AT_ONCE = 2**22


class TileCost(NamedTuple):
    """What a kernel visits when each query tile visits whole key tiles.

    Attributes:
        worst: most key tiles that a query tile visits.
        mean: over the query tiles.
        total: number of key tiles.
        full_share: of the visited pairs of tiles, those with all pairs and no clipped key tile.
        work: pairs of slots computed, padding included, over all pairs of tokens.
    """

    worst: int
    mean: float
    total: int
    full_share: float
    work: float

    @property
    def bound(self) -> float:
        """Bound of the speed-up over dense attention if all wait for the worst tile."""
        return self.total / self.worst if self.worst else math.inf

    @property
    def mean_bound(self) -> float:
        """Bound of the speed-up over dense attention if work is spread evenly."""
        return self.total / self.mean if self.mean else math.inf


def tile_cost(
    pattern: Pattern, grid: Grid, query_tile: Grid, key_tile: Grid | None = None, block: int = 1
) -> TileCost:
    """Simulates one choice of tiles.

    Args:
        pattern: from a grid to itself.
        grid: `(frames, height, width)` in tokens; tiles at the far borders are clipped.
        query_tile: in tokens.
        key_tile: the query tile if None.
        block: tiles are padded to a multiple of this many slots.
    """
    key_tile = key_tile or query_tile
    count = _count_by_axis if isinstance(pattern, AxisPattern) else _count_pairs
    worst, visited, full = count(pattern, grid, query_tile, key_tile)
    many, total = (len(tile_boxes(grid, tile).low) for tile in (query_tile, key_tile))
    slots = [-(-t[0] * t[1] * t[2] // block) * block for t in (query_tile, key_tile)]
    return TileCost(
        worst=worst,
        mean=visited / many,
        total=total,
        full_share=full / max(visited, 1),
        work=visited * slots[0] * slots[1] / (grid[0] * grid[1] * grid[2]) ** 2,
    )


def _count_pairs(pattern, grid, query_tile, key_tile) -> tuple[int, int, int]:
    """Most key tiles of a query tile, visited pairs of tiles, full pairs."""
    query, key = tile_boxes(grid, query_tile), tile_boxes(grid, key_tile)
    whole = (key.high - key.low + 1 == torch.tensor(key_tile)).all(1)
    visits, full = [], 0
    step = max(1, PAIRS_AT_ONCE // len(key.low))
    for i in range(0, len(query.low), step):
        some, every = pattern.bounds(Boxes(query.low[i : i + step], query.high[i : i + step]), key)
        visits.append(some.sum(1))
        full += int((every & whole).sum())
    visits = torch.cat(visits)
    return int(visits.max()), int(visits.sum()), full


def _count_by_axis(pattern, grid, query_tile, key_tile) -> tuple[int, int, int]:
    """As `_count_pairs`: where axes are asked separately, counts are products over the axes."""
    worst = visited = full = 1
    for i, matrix in enumerate(pattern.axes()):
        ends = []
        for tile in (query_tile, key_tile):
            low = torch.arange(0, grid[i], tile[i])
            ends += [low, (low + tile[i]).clamp(max=grid[i]) - 1]
        some, every = rectangles(matrix, *ends)
        whole = ends[3] - ends[2] + 1 == key_tile[i]
        worst *= int(some.sum(1).max())
        visited *= int(some.sum())
        full *= int((every & whole).sum())
    return worst, visited, full


def tile_boxes(grid: Grid, tile: Grid) -> Boxes:
    """The tiles of a grid, row-major."""
    size = torch.tensor(tile)
    frames, height, width = (-(-n // t) for n, t in zip(grid, tile))
    low = coordinates((frames, height, width)) * size
    return Boxes(low, torch.minimum(low + size, torch.tensor(grid)) - 1)


@lru_cache(maxsize=64)
def best_tile(pattern: Pattern, grid: Grid, block: int = 128) -> Grid:
    """The tile of at most `block` tokens with which a kernel computes least.

    Tried are sides that divide the grid and powers of two, with tiles that fill a block to more
    than three quarters, or as far as any does; padding counts as work. Among equals, the most
    compact tile.
    """
    sides = [
        [n for n in range(1, min(size, block) + 1) if size % n == 0 or n & (n - 1) == 0]
        for size in grid
    ]
    tiles = [tile for tile in product(*sides) if math.prod(tile) <= block]
    least = min(3 * block // 4 + 1, max(map(math.prod, tiles)))
    tiles = [tile for tile in tiles if math.prod(tile) >= least]
    return min(
        tiles, key=lambda tile: (tile_cost(pattern, grid, tile, block=block).work, sum(tile))
    )


def best_order(pattern: Pattern, grid: Grid, block: int = 128) -> TokenOrder:
    """Tiles of the best shape; row-major if the grid is too small for tiles."""
    if grid[0] * grid[1] * grid[2] <= block:
        return TokenOrder(grid)
    return TokenOrder(grid, best_tile(pattern, grid, block), pad_to=block)
