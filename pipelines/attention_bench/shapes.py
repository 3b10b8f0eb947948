"""What is timed: shapes of real models, and patterns of about the published settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dittune.call import TokenLayout
from dittune.methods.radial import Radial
from dittune.patterns import Local, Neighborhood, Plan, best_order
from dittune.patterns.algebra import BlockRule
from dittune.patterns.grid import coordinates
from dittune.patterns.sliding_tile import SlidingTile
from dittune.sparse.plan import Place, image_plan


class Shape(NamedTuple):
    """One attention site of a model at one size, batch 1.

    Attributes:
        name: as in `--only`.
        grid: `(frames, height, width)` in tokens.
        text: tokens in front of them.
        heads: number of heads.
        dim: of a head.
    """

    name: str
    grid: tuple[int, int, int]
    text: int
    heads: int
    dim: int

    def place(self, device: torch.device) -> Place:
        frames, height, width = self.grid
        end = self.text + frames * height * width
        return Place(TokenLayout((self.text, end), (0, self.text), self.grid), self.heads, device)


GPU_SHAPES = (
    Shape("flux-1k", (1, 64, 64), 512, 24, 128),
    Shape("flux-2k", (1, 128, 128), 512, 24, 128),
    Shape("flux-4k", (1, 256, 256), 512, 24, 128),
    Shape("flux-8k", (1, 512, 512), 512, 24, 128),
    Shape("sd3.5-1k", (1, 64, 64), 333, 38, 64),
    Shape("wan-480p", (21, 30, 52), 0, 40, 128),
    Shape("wan-720p", (21, 45, 80), 0, 40, 128),
    Shape("hunyuan-720p", (33, 45, 80), 256, 24, 128),
)
CPU_SHAPES = (
    Shape("image-256", (1, 16, 16), 0, 4, 64),
    Shape("image-4k", (1, 64, 64), 0, 4, 64),
    Shape("joint-4k", (1, 64, 64), 77, 4, 64),
    Shape("image-16k", (1, 128, 128), 0, 4, 64),
    Shape("image-64k", (1, 256, 256), 0, 4, 64),
    Shape("video-5k", (5, 30, 36), 0, 4, 64),
    *(Shape(f"video-{frames}-frames", (frames, 12, 20), 0, 4, 64) for frames in (8, 16, 32, 64)),
)


def _clear(shape: Shape, place: Place) -> Plan:
    pattern = Local(16)
    return image_plan(place, pattern, best_order(pattern, shape.grid, place.block))


def _natten(shape: Shape, place: Place) -> Plan:
    """Windows of about a tenth of the grid, as published for FLUX at 4K and Hunyuan."""
    frames = shape.grid[0]
    shares = (1.0, 0.3125, 0.3125) if frames == 1 else (0.6, 0.5, 0.3)
    window = tuple(max(1, round(n * share)) for n, share in zip(shape.grid, shares, strict=True))
    pattern = Neighborhood(shape.grid, window)
    return image_plan(place, pattern, best_order(pattern, shape.grid, place.block))


def _tiles(shape: Shape, place: Place) -> Plan:
    """Three tiles around each on each axis: full blocks only."""
    tile = {64: (1, 8, 8), 128: (1, 8, 16)}[place.block]
    if shape.grid[0] > 1:
        tile = {64: (4, 4, 4), 128: (2, 8, 8)}[place.block]
    many = (-(-n // t) for n, t in zip(shape.grid, tile, strict=True))
    pattern = SlidingTile(shape.grid, tuple(3 if n >= 3 else 1 for n in many), tile)
    return image_plan(place, pattern, pattern.order(place.block))


def _radial(shape: Shape, place: Place) -> Plan:
    return Radial(decay=1.0).plan(place)


PATTERNS: dict[str, Callable[[Shape, Place], Plan]] = {
    "tiles-3": _tiles,
    "clear-16": _clear,
    "natten": _natten,
    "radial": _radial,
}


def patterns_of(shape: Shape) -> list[str]:
    """What is timed on a shape; radial attention is among frames."""
    return [name for name in PATTERNS if name != "radial" or shape.grid[0] > 1]


def plan_of(shape: Shape, pattern: str, device: torch.device) -> Plan:
    """The plan of one pattern on one shape."""
    return PATTERNS[pattern](shape, shape.place(device))


def sample_mask(plan: Plan, shape: Shape, rows: torch.Tensor) -> torch.Tensor:
    """What some tokens see, by the definition of the pattern: bool `[rows, tokens]`."""
    pattern = dict(plan.rules[0])["image", "image"]
    places = coordinates(shape.grid)
    mask = torch.ones(len(rows), shape.text + len(places), dtype=torch.bool)
    is_image = rows >= shape.text
    chosen = rows[is_image] - shape.text
    if isinstance(pattern, BlockRule):  # its tokens are row-major
        kept, numbers = pattern.keep(*plan.block), torch.arange(len(places))
        seen = kept[chosen // plan.block[0]][:, numbers // plan.block[1]]
    else:
        seen = pattern.allows(places[chosen][:, None], places)
    mask[is_image, shape.text :] = seen
    return mask
