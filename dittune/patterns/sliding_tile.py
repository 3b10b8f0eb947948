"""Sliding tile attention: each tile of tokens sees the tiles around it, whole.

Source: "Fast Video Generation with Sliding Tile Attention" (arXiv 2502.04507) and the repository
hao-ai-lab/FastVideo.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import AxisPattern
from dittune.patterns.grid import Grid, TokenOrder, check_grid


@dataclass(frozen=True)
class SlidingTile(AxisPattern):
    """A window of whole tiles, shifted inside at borders; each block of its order is full.

    Attributes:
        grid: `(frames, height, width)` in tokens.
        window: in tiles, odd on each axis, not larger than the grid.
        tile: in tokens. `(6, 8, 8)` is 384 tokens, three blocks of 128.

    Raises:
        ConfigError: an even window, or one larger than the grid.
    """

    grid: Grid
    window: Grid
    tile: Grid = (6, 8, 8)

    def __post_init__(self):
        for name in ("grid", "window", "tile"):
            check_grid(name, getattr(self, name))
        if any(k % 2 == 0 or k > n for k, n in zip(self.window, self.tiles)):
            raise ConfigError(
                f"window is odd and fits the {self.tiles} tiles of {self.tile} in {self.grid}, "
                f"got {self.window}"
            )

    @property
    def tiles(self) -> Grid:
        """How many tiles there are on each axis; the last may be clipped."""
        frames, height, width = (-(-n // t) for n, t in zip(self.grid, self.tile))
        return frames, height, width

    def order(self, block: int = 128) -> TokenOrder:
        """The token order in which each block lies in one tile."""
        return TokenOrder(self.grid, self.tile, pad_to=block)

    def axes(self):
        return _axes(self)


@lru_cache(maxsize=64)
def _axes(pattern: SlidingTile) -> tuple[torch.Tensor, ...]:
    out = []
    for size, tile, many, window in zip(pattern.grid, pattern.tile, pattern.tiles, pattern.window):
        reach = window // 2
        at = torch.arange(size) // tile
        centre = at.clamp(reach, many - 1 - reach)
        out.append((at[None] - centre[:, None]).abs() <= reach)
    return tuple(out)
