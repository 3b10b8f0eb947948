"""Radial attention: the farther apart two frames, the narrower the band of tokens that attend.

Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
(arXiv 2506.19852) and the repository mit-han-lab/radial-attention; the rule is the repository's.
Differs: frames need not be whole blocks, where the repository raises or drops rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import BlockRule, Pattern
from dittune.patterns.grid import Grid, check_grid

THINNEST = 128  # tokens; where bands would be thinner, whole frame pairs are left out instead


@dataclass(frozen=True)
class Radial(Pattern):
    """Bands around the same place in the other frame; they halve each time the distance doubles.

    Tokens are row-major. Frames at a distance of 0 and 1 see each other fully.

    Attributes:
        grid: `(frames, height, width)` in tokens.
        decay: factor on the width of the bands, above 0, at most 1.
        least: least half-width of a band in tokens; the block size, as published.
        sink: all tokens see the first frame (Wan; not HunyuanVideo).

    Raises:
        ConfigError: `decay` outside `(0, 1]`.
    """

    grid: Grid
    decay: float = 1.0
    least: int = 128
    sink: bool = False

    def __post_init__(self):
        check_grid("grid", self.grid)
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay is above 0 and at most 1, got {self.decay}")

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    def reach(self) -> torch.Tensor:
        """Half-width of the band for each distance of frames, int64 `[frames]`; -1 for none."""
        return _reach(self)

    def _inside(self, place: torch.Tensor) -> torch.Tensor:
        return place[..., 1] * self.grid[2] + place[..., 2]

    def allows(self, query, key):
        reach = self.reach()[(query[..., 0] - key[..., 0]).abs()]
        seen = (self._inside(query) - self._inside(key)).abs() <= reach
        return seen | (key[..., 0] == 0) if self.sink else seen

    def bounds(self, query, key):
        reach = self.reach()
        distance = (query.low[:, None, 0] - key.low[None, :, 0]).abs()
        one_frame, key_frame = ((low == high)[:, 0] for low, high in (query, key))
        one_pair = one_frame[:, None] & key_frame
        first, last = (self._inside(end)[:, None] for end in query)
        key_first, key_last = (self._inside(end)[None] for end in key)
        gap = torch.maximum(key_first - last, first - key_last).clamp(min=0)
        span = torch.maximum(last - key_first, key_last - first)
        band = reach[distance]
        possible, certain = ~one_pair | (gap <= band), one_pair & (span <= band)
        if self.sink:
            possible = possible | (key.low[:, 0] == 0)
            certain = certain | (key.high[:, 0] == 0)
        return possible, certain


@lru_cache(maxsize=64)
def _reach(pattern: Radial) -> torch.Tensor:
    power = 1 << pattern.per_frame.bit_length()
    reach = []
    for distance in range(pattern.grid[0]):
        width = power / 2 ** distance.bit_length()
        keeps = width >= THINNEST or distance % int(THINNEST / width) == 0
        if distance <= 1:
            reach.append(pattern.per_frame)
        else:
            reach.append(int(max(width * pattern.decay, pattern.least)) if keeps else -1)
    return torch.tensor(reach)


@dataclass(frozen=True)
class RadialBlocks(BlockRule):
    """The published block mask of a `Radial` pattern: blocks whose columns are well filled.

    Of each pair of frames, a block is kept if of its columns in which any row attends, more than
    60 % have more than a third of the block's rows attending.

    Attributes:
        pattern: the bands.
    """

    pattern: Radial

    def keep(self, query_size, key_size):
        if query_size != key_size:
            raise ConfigError(f"radial blocks are square, got {query_size} x {key_size}")
        return _kept(self.pattern, query_size)

    def count(self, block: int) -> int:
        """How many blocks of a side are kept, without a matrix of all of them."""
        total, row_before, before = 0, -1, torch.zeros(0, dtype=torch.bool)
        for row, strip in _strips(self.pattern, block):
            if row == row_before:  # the last row of a frame may hold the next one's first tokens
                strip[0] |= before
            else:
                total += int(before.sum())
            total += int(strip[:-1].sum())
            row_before, before = row + len(strip) - 1, strip[-1]
        return total + int(before.sum())


@lru_cache(maxsize=16)
def _kept(pattern: Radial, block: int) -> torch.Tensor:
    blocks = -(-pattern.grid[0] * pattern.per_frame // block)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row, strip in _strips(pattern, block):
        kept[row : row + len(strip)] |= strip
    return kept


def _strips(pattern: Radial, block: int) -> Iterator[tuple[int, torch.Tensor]]:
    """For each frame its first row of blocks, and what its queries keep, bool `[rows, blocks]`."""
    frames, size, reach = pattern.grid[0], pattern.per_frame, pattern.reach().tolist()
    blocks = -(-frames * size // block)
    for i in range(frames):
        row = i * size // block
        strip = torch.zeros(-(-(i + 1) * size // block) - row, blocks, dtype=torch.bool)
        for j in range(frames):
            band = size if pattern.sink and j == 0 else reach[abs(i - j)]
            if band < 0:
                continue
            # The last block of the video may be short: its columns are filled by fewer rows.
            rest = frames * size % block if i == frames - 1 else 0
            part = _pair_blocks(size, band, i * size % block, j * size % block, block, rest)
            column = j * size // block
            strip[:, column : column + part.shape[1]] |= part
        yield row, strip


@lru_cache(maxsize=4096)
def _pair_blocks(
    size: int, band: int, row_offset: int, column_offset: int, block: int, rest: int
) -> torch.Tensor:
    """Blocks that a band `|k - l| <= band` fills in a canvas with two frames of `size` tokens.

    The frames start at the offsets; the last row of blocks has `rest` rows, `block` if 0.
    """
    rows, columns = -(-(row_offset + size) // block), -(-(column_offset + size) // block)
    top = torch.arange(rows)[:, None] * block - row_offset  # first frame row of each block row
    column = torch.arange(columns * block)[None] - column_offset
    first = torch.maximum(top.clamp(min=0), column - band)
    last = torch.minimum((top + block).clamp(max=size), column + band + 1)
    filled = (last - first).clamp(min=0) * ((column >= 0) & (column < size))
    filled = filled.unflatten(1, (columns, block))  # (rows, columns, block): rows that attend
    height = torch.full((rows, 1, 1), block)
    height[-1] = rest or block
    return (filled * 3 > height).sum(2) > 0.6 * (filled > 0).sum(2)
