"""Boxes written as text, `x0,y0,x1,y1: LABEL; ...`, and covers: how much of a token is in a mask.

Coordinates are shares of the picture from its upper left corner, so that a box fits any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from dittune.errors import ConfigError

SIDE = 240  # pixels of a box as a mask; 240 is a multiple of most token grids


class Box(NamedTuple):
    """A part of a picture, `0 <= x0 < x1 <= 1` and the same of y."""

    x0: float
    y0: float
    x1: float
    y1: float

    def mask(self) -> torch.Tensor:
        """Bool `[240, 240]`; at least one pixel."""
        x0, y0, x1, y1 = (round(side * SIDE) for side in self)
        inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        inside[min(y0, SIDE - 1) : max(y1, y0 + 1), min(x0, SIDE - 1) : max(x1, x0 + 1)] = True
        return inside


def parse_boxes(text: str) -> list[tuple[Box, str]]:
    """`0,0,0.5,1: a red circle; 0.5,0,1,1: a blue square` as boxes with labels.

    Raises:
        ConfigError: it is not written so, or a box is empty or leaves the picture.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        numbers, colon, label = part.partition(":")
        try:
            box = Box(*(float(number) for number in numbers.split(",")))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a box is written 'x0,y0,x1,y1: LABEL', got {part!r}") from error
        if not (colon and label.strip()):
            raise ConfigError(f"a box is written 'x0,y0,x1,y1: LABEL', got {part!r}")
        if not (0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1):
            raise ConfigError(
                f"a box has 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {numbers.strip()}"
            )
        found.append((box, label.strip()))
    return found


def refuse_overlap(masks: torch.Tensor, labels: list[str], name: str) -> None:
    """Check that no pixel is in two of the masks `[S, h, w]`.

    Raises:
        ConfigError: one is.
    """
    for i in range(len(masks)):
        for j in range(i):
            shared = int((masks[i] & masks[j]).sum())
            if shared:
                raise ConfigError(
                    f"{name}: the masks of {labels[j]!r} and {labels[i]!r} overlap in {shared} "
                    "pixels; make them apart, a token can belong to one of them only"
                )


def on_grid(masks: torch.Tensor, height: int, width: int, cover: float = 0.5) -> torch.Tensor:
    """Masks apart from each other on a grid of tokens.

    A token belongs to the mask that covers most of it, if that covers at least `cover` times as
    much of it as of the token it covers most: so a small mask keeps a token on a coarse grid.

    Args:
        masks: `[S, h, w]`, bool.

    Returns:
        Bool `[S, height, width]`.
    """
    if not len(masks):
        return masks.new_zeros(0, height, width)
    share = functional.interpolate(masks[None].double(), size=(height, width), mode="area")[0]
    highest = share.amax((1, 2), keepdim=True)
    winner = torch.zeros_like(share, dtype=torch.bool).scatter_(0, share.argmax(0)[None], True)
    return winner & (share > 0) & (share >= cover * highest)
