"""Hierarchical local attention: local windows on a large image, guided by a small one (Scale-DiT).

The sequence is text, the high-resolution image (`image`) and a low-resolution copy (`guide`).

Source: the repository PeterYYZhang/Scale-DiT; Hilbert order from Yunge6666/Hilbert-Local-Attention.
Differs: the published masks use whole blocks; make the plan with `exact=False` for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import AxisPattern, Pattern
from dittune.patterns.grid import Grid, TokenOrder, check_grid
from dittune.patterns.sequence import Segment, Sequence, text_segment


@dataclass(frozen=True)
class Box(AxisPattern):
    """Tokens not farther than `reach` on each axis; clipped at borders.

    Attributes:
        grid: `(frames, height, width)` in tokens.
        reach: largest distance on each axis, inclusive, at least 0.
    """

    grid: Grid
    reach: Grid

    def __post_init__(self):
        check_grid("grid", self.grid)
        check_grid("reach", self.reach, least=0)

    def axes(self):
        return _axes(self)


@lru_cache(maxsize=64)
def _axes(pattern: Box) -> tuple[torch.Tensor, ...]:
    spans = [torch.arange(n) for n in pattern.grid]
    return tuple(
        (span[:, None] - span[None]).abs() <= reach for span, reach in zip(spans, pattern.reach)
    )


@dataclass(frozen=True)
class SameWindow(Pattern):
    """Queries see the keys of the window with their own window's number, and of its neighbours.

    Windows are numbered row-major on both grids, and neighbours are neighbours *in number*: those
    of a window at the right border include one at the left border of the next row, as published.

    Attributes:
        query_grid: `(1, height, width)` in tokens.
        query_window: `(1, height, width)` of a window.
        key_window: of a window on the key grid, which has as many of them.
        spread: how many window numbers to each side are seen.
    """

    query_grid: Grid
    query_window: Grid
    key_window: Grid
    spread: int = 1

    @property
    def columns(self) -> int:
        return -(-self.query_grid[2] // self.query_window[2])

    def _number(self, place: torch.Tensor, window: Grid) -> torch.Tensor:
        return place[..., 1] // window[1] * self.columns + place[..., 2] // window[2]

    def allows(self, query, key):
        mine, theirs = self._number(query, self.query_window), self._number(key, self.key_window)
        return (mine - theirs).abs() <= self.spread

    def bounds(self, query, key):
        first, last = (self._number(end, self.query_window)[:, None] for end in query)
        key_first, key_last = (self._number(end, self.key_window)[None] for end in key)
        possible = (key_first - last <= self.spread) & (first - key_last <= self.spread)
        certain = (last - key_first <= self.spread) & (key_last - first <= self.spread)
        return possible, certain


def scale_dit_sequence(
    grid: Grid,
    text: int,
    factor: int = 4,
    window: int = 16,
    curve: str = "rows",
    align: int = 128,
    is_variable: bool = False,
) -> Sequence:
    """Text, image and guide, the latter two window by window.

    Args:
        grid: of the image, `(1, height, width)` in tokens.
        text: number of text tokens.
        factor: how much smaller the guide is on each side.
        window: side of a window on the image; the guide's is `window / factor`.
        curve: `rows` or `hilbert`, order inside windows.
        align: as in `Sequence`.
        is_variable: the number of valid text keys is given at run time.

    Raises:
        ConfigError: several frames; `window` or a side of the image is no multiple of `factor`.
    """
    check_grid("grid", grid)
    if grid[0] != 1 or window % factor or grid[1] % factor or grid[2] % factor:
        raise ConfigError(
            f"one frame, sides and window that are multiples of {factor}, got grid {grid} and "
            f"window {window}"
        )
    small = (1, grid[1] // factor, grid[2] // factor)
    guide_window = (1, window // factor, window // factor)
    image = TokenOrder(grid, (1, window, window), curve)
    guide = TokenOrder(small, guide_window, curve)
    segments = text_segment(text, is_variable), Segment("image", image), Segment("guide", guide)
    return Sequence(segments, align)


def scale_dit_rules(
    sequence: Sequence, reach: int = 8, guide_reach: int = 2, text_sees_guide: bool = False
) -> dict[tuple[str, str], Pattern | bool]:
    """Who sees whom in a sequence of `scale_dit_sequence`.

    Args:
        sequence: of text, image and guide.
        reach: half the window that an image token sees, in tokens.
        guide_reach: likewise among the guide's tokens.
        text_sees_guide: off as published.
    """
    image, guide = (s.order for s in sequence.segments[1:])
    return {
        ("text", "text"): True,
        ("text", "image"): True,
        ("text", "guide"): text_sees_guide,
        ("image", "text"): True,
        ("image", "image"): Box(image.grid, (0, reach, reach)),
        ("image", "guide"): SameWindow(image.grid, image.tile, guide.tile),
        ("guide", "text"): False,
        ("guide", "image"): False,
        ("guide", "guide"): Box(guide.grid, (0, guide_reach, guide_reach)),
    }
