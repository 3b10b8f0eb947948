"""A sequence of segments (text, image, coarse image) as the sparse kernels see it, in blocks.

Each segment starts on a block of its own, so that a block belongs to one segment. The real tokens
of a block are always its first ones; the rest is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import Boxes
from dittune.patterns.grid import Permutation, TokenOrder


@dataclass(frozen=True)
class Segment:
    """Tokens that share a role.

    Attributes:
        name: `text`, `image`, ...; rules refer to it.
        order: their grid and order; text is a grid of one frame and one row.
        is_variable: how many of its tokens are real keys is known only when attention runs.
    """

    name: str
    order: TokenOrder
    is_variable: bool = False


def text_segment(length: int, is_variable: bool = False) -> Segment:
    """The segment `text` of `length` tokens."""
    return Segment("text", TokenOrder((1, 1, length)), is_variable)


class Blocks(NamedTuple):
    """One segment cut into blocks of `size` slots.

    Attributes:
        first: number of its first block within the sequence.
        place: coordinates of each slot, int64 `[n, size, 3]`, 0 for padding.
        is_real: bool `[n, size]`.
        count: real tokens of each block, int64 `[n]`.
        boxes: bounding boxes of the real tokens (of slot 0 in a block without any).
        is_solid: bool `[n]`, every cell of the box is a token of the block.
    """

    first: int
    place: torch.Tensor
    is_real: torch.Tensor
    count: torch.Tensor
    boxes: Boxes
    is_solid: torch.Tensor


@dataclass(frozen=True)
class Sequence:
    """Segments in the order in which the model concatenates them.

    Attributes:
        segments: with different names.
        align: slots; each segment but the first starts at a multiple of it. A multiple of the block
            sizes of the plan.

    Raises:
        ConfigError: two segments of one name, no segment, or an `align` below 1.
    """

    segments: tuple[Segment, ...]
    align: int = 128

    def __post_init__(self):
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a sequence has segments with different names, got {names}")
        if self.align < 1:
            raise ConfigError(f"align is at least 1, got {self.align}")

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """First and one-past-last slot of each segment; padding between segments is in none."""
        spans, start = {}, 0
        for segment in self.segments:
            stop = start + len(segment.order.slots())
            spans[segment.name] = (start, stop)
            start = -(-stop // self.align) * self.align
        return spans

    @property
    def slots(self) -> int:
        """Length after `permutation`, padding included."""
        return self.spans[self.segments[-1].name][1]

    @property
    def tokens(self) -> int:
        """Length before `permutation`."""
        return sum(segment.order.tokens for segment in self.segments)

    @cached_property
    def permutation(self) -> Permutation | None:
        """From the model's order (segments one after the other, row-major) to slots.

        None if it would change nothing; then skip it.
        """
        slots, tokens = torch.full((self.slots,), -1), 0
        for segment in self.segments:
            start, stop = self.spans[segment.name]
            inside = segment.order.slots()
            slots[start:stop] = torch.where(inside < 0, -1, inside + tokens)
            tokens += segment.order.tokens
        if torch.equal(slots, torch.arange(tokens)):
            return None
        return Permutation.from_slots(slots)

    def blocks(self, segment: Segment, size: int) -> Blocks:
        """The blocks of one segment.

        Raises:
            ConfigError: a segment does not start on a block, or padding is not last in its block.
        """
        start, _ = self.spans[segment.name]
        if start % size:
            raise ConfigError(
                f"segment {segment.name!r} starts at slot {start}, inside a block of {size}; "
                f"align the sequence to a multiple of {size}, not to {self.align}"
            )
        place = segment.order.coordinates()
        tail = torch.full((-len(place) % size, 3), -1)
        place = torch.cat([place, tail]).view(-1, size, 3)  # (n, size, 3)
        is_real = place[..., 0] >= 0
        count = is_real.sum(1)
        if not torch.equal(is_real, torch.arange(size) < count[:, None]):
            raise ConfigError(
                f"segment {segment.name!r} has padding inside a block of {size}; "
                f"pad its tiles to a multiple of {size}, not to {segment.order.pad_to}"
            )
        place = place.clamp(min=0)
        filled = torch.where(is_real[..., None], place, place[:, :1])
        boxes = Boxes(filled.amin(1), filled.amax(1))
        return Blocks(
            first=start // size,
            place=place,
            is_real=is_real,
            count=count,
            boxes=boxes,
            is_solid=(boxes.high - boxes.low + 1).prod(1) == count,
        )
