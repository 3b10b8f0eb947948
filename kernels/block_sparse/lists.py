"""The tensors of a block-sparse plan, and the one rule for which pairs of a block attend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

RULES = ("none", "window", "disc", "bits")


class BlockLists(NamedTuple):
    """Which blocks of the score matrix are used: int32 tensors (`bits`: uint8), on one device.

    There are `P` different plans, `nq` rows and `nk` columns of blocks. Blocks are listed by rows,
    for the output and the gradient of the queries, and the same blocks by columns, for the
    gradient of keys and values. The blocks of row `r` of plan `p` are
    `row_full_index[row_full_start[p, r] : row_full_start[p, r + 1]]`, and so on.

    *Full* blocks need no mask; they contain no padded key. Of a *partial* block only the first
    `key_count` keys are real and, where its slot is not negative, only pairs that the rule allows
    attend:

    * `window`: `query_table[..., :3] <= key_table <= query_table[..., 3:]` on all three axes;
    * `disc`: squared distance of `query_table[..., :3]` and `key_table` is below
      `query_table[..., 3]`;
    * `bits`: bit `j % 8` of `bits[slot, i, j // 8]` for query `i` and key `j` of the block.

    Attributes:
        row_full_start: `[P, nq + 1]`, positions in `row_full_index`.
        row_full_index: `[n]`, key blocks.
        row_partial_start: `[P, nq + 1]`, positions in the next two.
        row_partial_index: `[m]`, key blocks.
        row_partial_slot: `[m]`.
        row_order: `[P, nq]`, the order in which to work on rows, longest first.
        column_full_start: `[P, nk + 1]`; this and the next five as above, of query blocks.
        column_full_index: `[n]`.
        column_partial_start: `[P, nk + 1]`.
        column_partial_index: `[m]`.
        column_partial_slot: `[m]`.
        column_order: `[P, nk]`.
        key_count: `[1 or B, nk]`, real keys of each key block.
        head_plan: `[1 or H]`, the plan of each head.
        query_table: `[P, Sq, 6]`; empty for `none` and `bits`.
        key_table: `[P, Skv, 3]`; empty for `none` and `bits`.
        bits: `[elements, block_q, ceil(block_k / 8)]`; empty but for `bits`.
    """

    row_full_start: torch.Tensor
    row_full_index: torch.Tensor
    row_partial_start: torch.Tensor
    row_partial_index: torch.Tensor
    row_partial_slot: torch.Tensor
    row_order: torch.Tensor
    column_full_start: torch.Tensor
    column_full_index: torch.Tensor
    column_partial_start: torch.Tensor
    column_partial_index: torch.Tensor
    column_partial_slot: torch.Tensor
    column_order: torch.Tensor
    key_count: torch.Tensor
    head_plan: torch.Tensor
    query_table: torch.Tensor
    key_table: torch.Tensor
    bits: torch.Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        """`(P, nq, nk)`."""
        return *self.row_order.shape, self.column_order.shape[1]


class Task(NamedTuple):
    """What all back-ends get besides query, key and value.

    Attributes:
        lists: the blocks.
        block: tokens of a block, `(queries, keys)`.
        rule: of partial blocks, one of `RULES`.
        scale: of the logits.
    """

    lists: BlockLists
    block: tuple[int, int]
    rule: str
    scale: float


def check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task) -> None:
    """Whether shapes, types and devices fit; indices inside the lists are trusted.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    lists, block = task.lists, task.block
    if query.ndim != 4 or key.shape != value.shape or key.ndim != 4:
        raise ValueError(
            "query is [B, H, Sq, D], key and value [B, H, Skv, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    batch, heads, rows, dim = query.shape
    if key.shape[:2] != (batch, heads) or key.shape[3] != dim:
        raise ValueError(
            "query and key have the same batch, heads and head dim, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"query, key and value have one floating type, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}; under autocast, cast them first"
        )
    # A plan moves as a whole; only the number of keys is given apart from it.
    devices = {t.device for t in (query, key, value, lists.row_order, lists.key_count)}
    if len(devices) > 1:
        raise ValueError(f"query, key, value and plan are on one device, got {devices}")
    blocks = -(-rows // block[0]), -(-key.shape[2] // block[1])
    if blocks != lists.grid[1:]:
        raise ValueError(
            f"the plan has {lists.grid[1]} x {lists.grid[2]} blocks of {block[0]} x {block[1]}, "
            f"{rows} queries and {key.shape[2]} keys make {blocks[0]} x {blocks[1]}"
        )
    if len(lists.head_plan) not in (1, heads) or len(lists.key_count) not in (1, batch):
        raise ValueError(
            f"the plan is for {len(lists.head_plan)} heads and {len(lists.key_count)} batch rows, "
            f"the query has {heads} and {batch}"
        )
    if task.rule not in RULES:
        raise ValueError(f"the rule is one of {RULES}, got {task.rule!r}")


def pairs_allowed(
    task: Task, plan: int, row: int, columns: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Which pairs of some partial blocks of one row attend.

    Args:
        task: the plans.
        plan: which of them.
        row: query block.
        columns: key blocks, int `[n]`.
        slots: of these blocks, int `[n]`.

    Returns:
        bool `[1 or B, 1 or block_q, n, block_k]`; the last row may have fewer queries.
    """
    lists, (block_q, block_k), columns = task.lists, task.block, columns.long()
    inside_block = torch.arange(block_k, device=columns.device)
    seen = (inside_block < lists.key_count[:, columns, None])[:, None]  # (1 or B, 1, n, block_k)
    if task.rule == "bits":
        packed = lists.bits[slots.long().clamp(min=0)]  # (n, block_q, block_k / 8)
        bit = torch.arange(8, device=packed.device, dtype=torch.uint8)
        found = ((packed[..., None] >> bit) & 1).flatten(2)[..., :block_k].transpose(0, 1) > 0
    elif task.rule == "none":
        return seen
    else:
        at = (columns[:, None] * block_k + inside_block).clamp(max=lists.key_table.shape[1] - 1)
        query = lists.query_table[plan, row * block_q : (row + 1) * block_q, :, None, None]
        key = lists.key_table[plan].T[:, at]  # (3, n, block_k)
        if task.rule == "window":
            sides = [(query[:, i] <= key[i]) & (key[i] <= query[:, i + 3]) for i in range(3)]
            found = sides[0] & sides[1] & sides[2]
        else:
            found = sum((query[:, i] - key[i]).square_() for i in range(3)) < query[:, 3]
    return seen & (found | (slots < 0)[:, None])


def unpack(
    tensors: Mapping[str, torch.Tensor], block: tuple[int, int], rule: str, scale: float
) -> Task:
    """The task from tensors by name.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    if set(tensors) != set(BlockLists._fields):
        wrong = sorted(set(tensors) ^ set(BlockLists._fields))
        raise ValueError(f"a plan has the tensors {BlockLists._fields}, see {wrong}")
    return Task(BlockLists(**tensors), block, rule, scale)
