"""Token orders on a grid: row-major, tiles, Hilbert curve; and the permutation each one means.

A grid is `(frames, height, width)` in tokens, slow to fast. Models keep tokens row-major. Sparse
attention wants tokens that are close on the grid close in the sequence, so that whole blocks can be
skipped. An order lists for each *slot* of the new sequence the token that sits there, or -1 where
the slot is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dittune.errors import ConfigError

Grid = tuple[int, int, int]


def check_grid(name: str, value: Grid, least: int = 1) -> None:
    """Raise `ConfigError` unless `value` is three integers of at least `least`."""
    if len(value) != 3 or not all(isinstance(n, int) and n >= least for n in value):
        raise ConfigError(
            f"{name} is (frames, height, width), each an integer of at least {least}, got {value!r}"
        )


@dataclass(frozen=True)
class TokenOrder:
    """The order of the tokens of one grid.

    Tiles follow each other row-major; tiles at the far borders are clipped, never shifted.

    Attributes:
        grid: `(frames, height, width)` in tokens.
        tile: `(frames, height, width)` of a tile; None is one tile of the size of the grid.
        curve: order inside a tile, `rows` (row-major) or `hilbert` (frame by frame, a Hilbert
            curve over height and width).
        pad_to: each tile is padded at its end to a multiple of this many slots; 1 adds none.

    Raises:
        ConfigError: a size below 1, or an unknown curve.
    """

    grid: Grid
    tile: Grid | None = None
    curve: str = "rows"
    pad_to: int = 1

    def __post_init__(self):
        check_grid("grid", self.grid)
        check_grid("tile", self.tile or self.grid)
        if self.curve not in ("rows", "hilbert"):
            raise ConfigError(f"curve is 'rows' or 'hilbert', got {self.curve!r}")
        if self.pad_to < 1:
            raise ConfigError(f"pad_to is at least 1, got {self.pad_to}")

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def slots(self) -> torch.Tensor:
        """Row-major token number of each slot, or -1: int64 `[slots]`. Do not write into it."""
        return _slots(self)

    def coordinates(self) -> torch.Tensor:
        """`(frame, row, column)` of each slot, int64 `[slots, 3]`; -1 where it is padding."""
        slots = self.slots()[:, None]
        return torch.where(slots < 0, -1, coordinates(self.grid)[slots[:, 0].clamp(min=0)])


def coordinates(grid: Grid) -> torch.Tensor:
    """`(frame, row, column)` of each token in row-major order, int64 `[tokens, 3]`."""
    axes = [torch.arange(n) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def hilbert_index(row: torch.Tensor, column: torch.Tensor, side: int) -> torch.Tensor:
    """Position along the Hilbert curve that fills a square.

    Args:
        row: integers in `[0, side)`, any shape.
        column: likewise.
        side: of the square, a power of two.

    Returns:
        int64 in `[0, side ** 2)`; consecutive positions are neighbouring cells.
    """
    x, y = column.clone(), row.clone()
    index = torch.zeros_like(x)
    half = side // 2
    while half:
        right, up = (x & half) > 0, (y & half) > 0
        index += half * half * ((3 * right.long()) ^ up.long())
        x, y = x & (half - 1), y & (half - 1)
        turned = right & ~up
        x, y = torch.where(turned, half - 1 - x, x), torch.where(turned, half - 1 - y, y)
        x, y = torch.where(up, x, y), torch.where(up, y, x)
        half //= 2
    return index


@lru_cache(maxsize=32)
def _slots(order: TokenOrder) -> torch.Tensor:
    tile = torch.tensor(order.tile or order.grid)
    place = coordinates(order.grid)
    outer, inner = place // tile, place % tile  # (tokens, 3)
    many = -(-torch.tensor(order.grid) // tile)
    number = (outer[:, 0] * many[1] + outer[:, 1]) * many[2] + outer[:, 2]
    if order.curve == "hilbert":
        side = 1 << (int(tile[1:].max()) - 1).bit_length()
        within = inner[:, 0] * side**2 + hilbert_index(inner[:, 1], inner[:, 2], side)
        volume = int(tile[0]) * side**2
    else:
        within = (inner[:, 0] * tile[1] + inner[:, 1]) * tile[2] + inner[:, 2]
        volume = int(tile.prod())
    tokens = torch.argsort(number * volume + within)
    held = torch.bincount(number)
    room = -(-held // order.pad_to) * order.pad_to
    first_slot, first_token = room.cumsum(0) - room, held.cumsum(0) - held
    at = torch.arange(order.tokens) + (first_slot - first_token)[number[tokens]]
    slots = torch.full((int(room.sum()),), -1)
    slots[at] = tokens
    return slots


@dataclass(frozen=True)
class Permutation:
    """Takes token sequences to their new order and back.

    Attributes:
        source: token of each slot, int64 `[slots]`, 0 where the slot is padding.
        is_padding: bool `[slots]`, or None without padding.
        inverse: slot of each token, int64 `[tokens]`.
    """

    source: torch.Tensor
    is_padding: torch.Tensor | None
    inverse: torch.Tensor

    @classmethod
    def from_slots(cls, slots: torch.Tensor) -> Permutation:
        """From a list with each token once and -1 for padding, int64 `[slots]`."""
        padding = slots < 0
        kept = (~padding).nonzero()[:, 0]
        inverse = torch.empty_like(kept)
        inverse[slots[kept]] = kept
        return cls(slots.clamp(min=0), padding if bool(padding.any()) else None, inverse)

    def to(self, device: torch.device | str) -> Permutation:
        padding = None if self.is_padding is None else self.is_padding.to(device)
        return Permutation(self.source.to(device), padding, self.inverse.to(device))

    def permute(self, tensor: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """`tokens` along `dim` become `slots`; padding is zero."""
        out = tensor.index_select(dim, self.source)
        if self.is_padding is None:
            return out
        shape = [1] * out.ndim
        shape[dim] = -1
        return out.masked_fill(self.is_padding.view(shape), 0)

    def unpermute(self, tensor: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """`slots` along `dim` become `tokens`; what stood in the padding is dropped."""
        return tensor.index_select(dim, self.inverse)
