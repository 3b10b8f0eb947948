"""Neighborhood attention: each image token sees a window around it, shifted inside at borders.

Source: "Generalized Neighborhood Attention" (arXiv 2504.16922) and "Faster Neighborhood Attention"
(arXiv 2403.04690).
"""

from __future__ import annotations

from dataclasses import dataclass

from dittune.errors import ConfigError
from dittune.patterns import Neighborhood, Plan, best_order
from dittune.sparse.method import SparseMethod
from dittune.sparse.plan import Place, image_plan


@dataclass(frozen=True, kw_only=True)
class Natten(SparseMethod):
    """Windows of image tokens; without training, for pictures larger than a model was made for.

    In a video windows are boxes of frames, rows and columns; the published one for HunyuanVideo at
    720p has `frames=18, window=24`.

    On an axis with fewer tokens than the window (a deep stage of a UNet) all of them are seen;
    where it has room for the window but not for its gaps, these get smaller.

    Args:
        window: tokens of a window's side.
        frames: latent frames of a window in a video; 0 is as many as `window`.
        stride: so many tokens in a row share a window; of the size of the window, the picture falls
            into separate windows. Multiples of 8 spare work: whole blocks stay without a mask.
        dilation: only every so many tokens are seen, in a window that many times as wide.

    Raises:
        ConfigError: not `1 <= stride <= window`, a dilation below 1, or less than no frames.
    """

    window: int = 16
    frames: int = 0
    stride: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.stride <= self.window or self.dilation < 1 or self.frames < 0:
            raise ConfigError(
                "natten: 1 <= stride <= window, 1 <= dilation and 0 <= frames, got window "
                f"{self.window}, stride {self.stride}, dilation {self.dilation}, "
                f"frames {self.frames}"
            )

    def plan(self, place: Place) -> Plan:
        grid = place.layout.grid
        sides = self.frames or self.window, self.window, self.window
        window = tuple(map(min, sides, grid))
        dilation = tuple(min(self.dilation, n // side) for n, side in zip(grid, window))
        stride = tuple(min(self.stride, size) for size in window)
        pattern = Neighborhood(grid, window, stride, dilation)
        return image_plan(place, pattern, best_order(pattern, grid, place.block))
