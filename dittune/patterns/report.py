"""Numbers and a picture of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from dittune.patterns.plan import Plan

# Absent, full, tail and element blocks.
COLOURS = ((255, 255, 255), (35, 60, 110), (120, 150, 200), (235, 165, 60))


class PlanStats(NamedTuple):
    """What a plan costs, averaged over the heads.

    Attributes:
        token_density: attending pairs of all pairs of tokens; what papers quote.
        block_density: used blocks of all blocks; what a kernel pays. Its inverse bounds the
            speed-up over dense attention.
        full_share: full blocks of the used ones.
        tile_efficiency: attending pairs of the pairs in used blocks.
        balance: mean over longest row of blocks; 1 is even work.
        memory: bytes of the plan's tensors.
    """

    token_density: float
    block_density: float
    full_share: float
    tile_efficiency: float
    balance: float
    memory: int


def plan_stats(plan: Plan) -> PlanStats:
    """See `PlanStats`."""
    nq, nk = plan.tensors["row_order"].shape[1], plan.tensors["column_order"].shape[1]
    allowed = [layout.allowed() for layout in plan.layouts]
    used = [len(layout.full) + len(layout.partial) for layout in plan.layouts]
    full = sum(len(plan.layouts[number].full) for number in plan.heads)
    total = sum(used[number] for number in plan.heads)
    pairs = sum(allowed[number] for number in plan.heads)
    longest = max(int(_row_lengths(plan.layouts[number], nq).max()) for number in set(plan.heads))
    heads = len(plan.heads)
    return PlanStats(
        token_density=pairs / (heads * plan.queries.tokens * plan.keys.tokens),
        block_density=total / (heads * nq * nk),
        full_share=full / max(total, 1),
        tile_efficiency=pairs / max(total * plan.block[0] * plan.block[1], 1),
        balance=total / max(heads * nq * longest, 1),
        memory=sum(t.numel() * t.element_size() for t in plan.tensors.values()),
    )


def _row_lengths(layout, rows: int) -> torch.Tensor:
    blocks = torch.cat([layout.full[:, 0], layout.partial[:, 0]])
    return torch.bincount(blocks, minlength=rows)


def picture(plan: Plan, head: int = 0, cell: int = 4) -> torch.Tensor:
    """One square a block: white absent, dark blue full, light blue tail, orange element blocks.

    Args:
        plan: the plan.
        head: whose plan to draw.
        cell: pixels of a square's side.

    Returns:
        uint8 `[nq * cell, nk * cell, 3]`, ready for `PIL.Image.fromarray(picture.numpy())`.
    """
    layout = plan.layouts[plan.heads[head % len(plan.heads)]]
    nq, nk = plan.tensors["row_order"].shape[1], plan.tensors["column_order"].shape[1]
    kinds = torch.zeros(nq, nk, dtype=torch.int64)
    kinds[layout.full[:, 0], layout.full[:, 1]] = 1
    kinds[layout.partial[:, 0], layout.partial[:, 1]] = torch.where(layout.slot < 0, 2, 3)
    colours = torch.tensor(COLOURS, dtype=torch.uint8)[kinds]
    return colours.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
