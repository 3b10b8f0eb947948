"""The definition: dense attention under the mask that a plan means. Any device and precision."""

from __future__ import annotations

import torch

from dittune.kernels.block_sparse.lists import Task, pairs_allowed


def dense_mask(task: Task, queries: int, keys: int) -> torch.Tensor:
    """Which pairs attend, bool `[1 or B, 1 or H, queries, keys]`."""
    lists, (block_q, block_k) = task.lists, task.block
    plans, nq, nk = lists.grid
    batch = len(lists.key_count)
    mask = torch.zeros(
        batch, plans, queries, nk, block_k, dtype=torch.bool, device=lists.key_count.device
    )
    for plan in range(plans):
        full, partial = lists.row_full_start[plan].tolist(), lists.row_partial_start[plan].tolist()
        for row in range(nq):
            part = mask[:, plan, row * block_q : (row + 1) * block_q]
            part[:, :, lists.row_full_index[full[row] : full[row + 1]].long()] = True
            mine = slice(partial[row], partial[row + 1])
            columns = lists.row_partial_index[mine]
            seen = pairs_allowed(task, plan, row, columns, lists.row_partial_slot[mine])
            part[:, :, columns.long()] = seen[:, : part.shape[1]].expand(-1, part.shape[1], -1, -1)
    return mask.flatten(3)[:, lists.head_plan.long(), :, :keys]


def block_sparse_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Sq, D]` and natural-log LSE `[B, H, Sq]`; empty rows give 0 and -inf.

    Computed in at least float32; plain PyTorch, hence differentiable.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    mask = dense_mask(task, query.shape[2], key.shape[2])
    logits = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * task.scale
    logits = logits.masked_fill(~mask, -torch.inf)
    has_keys = mask.any(-1, keepdim=True)  # (1 or B, 1 or H, Sq, 1)
    top = logits.detach().amax(-1, keepdim=True).masked_fill(~has_keys, 0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True).masked_fill(~has_keys, 1)
    out = (weights @ value.to(exact) / total).to(query.dtype)
    lse = (top + total.log()).masked_fill(~has_keys, -torch.inf)
    return out, lse[..., 0]
