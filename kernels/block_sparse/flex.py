"""The FlexAttention path: the same lists as a `BlockMask`, for CUDA.

Uncompiled FlexAttention ignores block lists and computes all pairs, so the mask function looks
every pair up and is right by itself; compiled, it is asked in partial blocks only.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dittune.kernels.block_sparse.lists import Task

ABSENT, FULL = -3, -2  # of a block; otherwise its slot, which is -1 or more


def flex_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_reference`. The `BlockMask` is built anew in each call."""
    mask = flex_block_mask(task, query.shape[1], (query.shape[2], key.shape[2]))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    out, aux = attend(
        query, key, value, block_mask=mask, scale=task.scale, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def flex_block_mask(task: Task, heads: int, lengths: tuple[int, int]) -> BlockMask:
    """The plan as a `BlockMask` of `heads` heads, for `(Sq, Skv)` tokens."""
    lists = task.lists
    plan_of = lists.head_plan.expand(heads).long()
    full_many, full = _padded(lists.row_full_start, lists.row_full_index, lists.grid[2])
    many, partial = _padded(lists.row_partial_start, lists.row_partial_index, lists.grid[2])
    return BlockMask.from_kv_blocks(
        many[plan_of][None],
        partial[plan_of][None],
        full_many[plan_of][None],
        full[plan_of][None],
        BLOCK_SIZE=task.block,
        mask_mod=_mask_mod(task, plan_of),
        seq_lengths=lengths,
    )


def _padded(
    start: torch.Tensor, index: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists `[P, n + 1]`, `[m]` as counts `[P, n]` and rows of equal width `[P, n, width]`."""
    many = start.diff(dim=1)
    at = start[:, :-1, None] + torch.arange(width, device=start.device)
    inside = torch.arange(width, device=start.device) < many[..., None]
    if not len(index):
        return many, torch.zeros_like(at)
    return many, torch.where(inside, index[at.clamp(max=len(index) - 1).long()], 0).int()


def _states(task: Task) -> torch.Tensor:
    """What each block is, int32 `[P, nq, nk]`."""
    lists = task.lists
    plans, nq, nk = lists.grid
    states = torch.full((plans * nq, nk), ABSENT, dtype=torch.int32, device=lists.bits.device)
    rows = torch.arange(plans * nq, device=states.device)
    for start, index, value in (
        (lists.row_full_start, lists.row_full_index, lists.row_full_index * 0 + FULL),
        (lists.row_partial_start, lists.row_partial_index, lists.row_partial_slot),
    ):
        row = rows.repeat_interleave(start.diff(dim=1).flatten(), output_size=len(index))
        states[row, index.long()] = value
    return states.view(plans, nq, nk)


def _mask_mod(task: Task, plan_of: torch.Tensor):
    """Whether a pair attends, from scalars, as FlexAttention asks for it."""
    lists, (block_q, block_k), rule = task.lists, task.block, task.rule
    states, batch = _states(task), len(lists.key_count)

    def block_sparse(b, h, q, k):
        plan, row, column = plan_of[h], q // block_q, k // block_k
        state = states[plan, row, column]
        seen = k - column * block_k < lists.key_count[b % batch, column]
        if rule == "bits":
            inside = k - column * block_k
            byte = lists.bits[state.clamp(min=0), q - row * block_q, inside // 8]
            seen = seen & ((((byte.int() >> (inside % 8)) & 1) > 0) | (state < 0))
        elif rule != "none":
            query = [lists.query_table[plan, q, i] for i in range(6)]
            place = [lists.key_table[plan, k, i] for i in range(3)]
            if rule == "window":
                axes = [(query[i] <= place[i]) & (place[i] <= query[i + 3]) for i in range(3)]
                found = axes[0] & axes[1] & axes[2]
            else:
                steps = [query[i] - place[i] for i in range(3)]
                found = steps[0] ** 2 + steps[1] ** 2 + steps[2] ** 2 < query[3]
            seen = seen & (found | (state < 0))
        return (state == FULL) | ((state > FULL) & seen)

    return block_sparse
