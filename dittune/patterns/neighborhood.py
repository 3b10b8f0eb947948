"""Neighborhood attention: a window around each token, with stride, dilation and causal axes.

Source: "Generalized Neighborhood Attention" (arXiv 2504.16922) and "Faster Neighborhood Attention"
(arXiv 2403.04690); borders and strides as in the repository SHI-Labs/NATTEN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import AxisPattern
from dittune.patterns.grid import Grid, check_grid


@dataclass(frozen=True)
class Neighborhood(AxisPattern):
    """Each token sees a window around it; at borders the window is shifted inside, not clipped.

    All values are `(frames, height, width)`. A window as large as the grid is full attention, a
    stride as large as the window splits the grid into separate windows.

    Attributes:
        grid: in tokens.
        window: tokens seen on each axis; even numbers reach one further back than ahead.
        stride: this many tokens in a row share the window of the one in their middle.
        dilation: only every so many tokens are seen, in a window that many times as wide.
        causal: axes on which a token sees none after itself; windows are clipped there.

    Raises:
        ConfigError: not `1 <= stride <= window` and `window * dilation <= grid` on some axis.
    """

    grid: Grid
    window: Grid
    stride: Grid = (1, 1, 1)
    dilation: Grid = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self):
        for name in ("grid", "window", "stride", "dilation"):
            check_grid(name, getattr(self, name))
        for n, k, s, d in zip(self.grid, self.window, self.stride, self.dilation):
            if not (s <= k and k * d <= n):
                raise ConfigError(
                    "each axis needs stride <= window and window * dilation <= grid, got stride "
                    f"{self.stride}, window {self.window}, dilation {self.dilation}, "
                    f"grid {self.grid}; use window 1 on an axis with one token"
                )

    def axes(self):
        return _axes(self)


@lru_cache(maxsize=64)
def _axes(pattern: Neighborhood) -> tuple[torch.Tensor, ...]:
    settings = zip(pattern.grid, pattern.window, pattern.stride, pattern.dilation, pattern.causal)
    return tuple(neighbours(*axis) for axis in settings)


def neighbours(size: int, window: int, stride: int, dilation: int, causal: bool) -> torch.Tensor:
    """Which tokens of one axis each token sees, bool `[size, size]`."""
    query, key = torch.arange(size)[:, None], torch.arange(size)[None]
    group = query % dilation  # tokens of other groups are invisible; inside one, no gaps
    length = -(-(size - group) // dilation)
    i, j = query // dilation, key // dilation
    if causal:
        leader = torch.minimum(i // stride * stride + stride - 1, length - 1)
        seen = (j <= i) & (leader - j < window)
    else:
        before = window // 2
        leader = torch.minimum(i // stride * stride + stride // 2, length - 1)
        first = torch.minimum((leader - before).clamp(min=0), length - window)
        seen = (first <= j) & (j < first + window)
    return seen & (key % dilation == group)
