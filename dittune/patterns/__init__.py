"""Which pairs of tokens attend: patterns, token orders, and the plans sparse kernels run."""

from dittune.patterns.algebra import BlockRule, Boxes, GivenBlocks, Pattern
from dittune.patterns.grid import Grid, Permutation, TokenOrder
from dittune.patterns.hierarchical import Box, SameWindow, scale_dit_rules, scale_dit_sequence
from dittune.patterns.local import Local, local_rules
from dittune.patterns.neighborhood import Neighborhood
from dittune.patterns.plan import Plan, make_plan, per_head
from dittune.patterns.radial import Radial, RadialBlocks
from dittune.patterns.sequence import Segment, Sequence, text_segment
from dittune.patterns.simulate import TileCost, best_order, best_tile, tile_cost
from dittune.patterns.sliding_tile import SlidingTile

__all__ = [
    "BlockRule",
    "Box",
    "Boxes",
    "GivenBlocks",
    "Grid",
    "Local",
    "Neighborhood",
    "Pattern",
    "Permutation",
    "Plan",
    "Radial",
    "RadialBlocks",
    "SameWindow",
    "Segment",
    "Sequence",
    "SlidingTile",
    "TileCost",
    "TokenOrder",
    "best_order",
    "best_tile",
    "local_rules",
    "make_plan",
    "per_head",
    "scale_dit_rules",
    "scale_dit_sequence",
    "text_segment",
    "tile_cost",
]
