"""Radial attention: the farther apart two frames of a video, the less of each other they see.

The blocks of the pattern `dittune.patterns.Radial` as published, on tokens in the model's own
order; text sees all and is seen by all. The first steps and layers stay dense: what a video shows
is decided there.

Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
(arXiv 2506.19852) and the repository mit-han-lab/radial-attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from dittune.errors import ConfigError
from dittune.patterns import Plan, RadialBlocks, TokenOrder
from dittune.patterns import Radial as Bands
from dittune.sparse.method import SparseMethod
from dittune.sparse.plan import Place, image_plan


@dataclass(frozen=True, kw_only=True)
class Radial(SparseMethod):
    """Block-sparse self attention among the frames of a video; pictures stay as they are.

    Published settings: Wan 2.1 14B at 69 frames `decay=0.2`, Wan 2.2 at 77 frames `decay=0.8,
    start=0.275`, HunyuanVideo at 117 frames `decay=0.95, dense_layers=""`; 8-step models
    `start=0.25`.

    Args:
        decay: factor on the width of the bands, above 0, at most 1; no band gets narrower than a
            block.
        sink: whether all tokens see the first frame; None is yes where the text is not part of the
            sequence (Wan), as published.
        block: tokens of a block's side, and the least half-width of a band. Where a frame has fewer
            tokens it is the largest power of two that fits: the rule would drop larger blocks.

    Raises:
        ConfigError: `decay` or `block` out of range.
    """

    start: float = 0.24
    decay: float = 0.2
    dense_layers: str = "0"
    sink: bool | None = None
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ConfigError(f"radial: decay is above 0 and at most 1, got {self.decay}")
        if self.block < 1:
            raise ConfigError(f"radial: block is a number of tokens, got {self.block}")

    def plan(self, place: Place) -> Plan:
        layout, grid = place.layout, place.layout.grid
        if grid[0] == 1:
            return image_plan(place, True, TokenOrder(grid))
        sink = layout.text[0] == layout.text[1] if self.sink is None else self.sink
        block = min(self.block, 2 ** ((grid[1] * grid[2]).bit_length() - 1))
        rule = RadialBlocks(Bands(grid, self.decay, block, sink))
        return image_plan(place, rule, TokenOrder(grid), block=block)
