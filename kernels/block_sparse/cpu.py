"""The CPU path: one row of blocks after the other, only the blocks that are listed.

Logits are kept for a few blocks at a time, so memory does not grow with the length of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dittune.kernels.block_sparse.lists import Task, pairs_allowed

LOGITS_AT_ONCE = 2**20  # numbers; a few MB, which stay in the cache
HIDDEN = -1e30  # instead of -inf, whose exponential takes several times longer than others


class _Part(NamedTuple):
    """Some listed blocks of one row of one plan.

    Attributes:
        heads: which heads, a slice or int64 `[h]`.
        queries: which tokens.
        keys: token numbers, int64 `[n * block_k]`.
        seen: 1 for pairs that attend, else 0, `[1 or B, 1, 1 or q, m]`, of the last `m` keys; or
            None.
    """

    heads: slice | torch.Tensor
    queries: slice
    keys: torch.Tensor
    seen: torch.Tensor | None


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_reference`."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=exact)
    for row in _rows(query, key, task):
        top, total, mixed = -torch.inf, 0, 0
        for part in row:
            logits = _logits(query, key, part, task)
            new_top = logits.amax(-1, keepdim=True).clamp_(min=top)
            weights = _exp(logits, new_top, part)
            kept = torch.exp(top - new_top)
            total = total * kept + weights.sum(-1, keepdim=True)
            mixed = mixed * kept + weights @ _take(value, part, exact)
            top = new_top
            heads, queries = part.heads, part.queries
        out[:, heads, queries] = (mixed / total.masked_fill(total == 0, 1)).to(out.dtype)
        lse[:, heads, queries] = (top + total.log())[..., 0]
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    task: Task,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; logits are computed again, exactly as in `forward`."""
    exact = lse.dtype
    grads = [torch.zeros(t.shape, dtype=exact) for t in (query, key, value)]
    delta = (grad_out.to(exact) * out.to(exact)).sum(-1) - grad_lse  # (B, H, Sq)
    lse = lse.masked_fill(lse == -torch.inf, 0)  # rows without keys
    for row in _rows(query, key, task):
        for part in row:
            heads, queries = part.heads, part.queries
            logits = _logits(query, key, part, task)
            weights = _exp(logits, lse[:, heads, queries, None], part)
            grad = grad_out[:, heads, queries].to(exact)
            grad_logits = grad @ _take(value, part, exact).transpose(-1, -2)
            grad_logits = grad_logits.sub_(delta[:, heads, queries, None]).mul_(weights)
            grad_logits = grad_logits.mul_(task.scale)
            grads[0][:, heads, queries] += grad_logits @ _take(key, part, exact)
            mine = query[:, heads, queries].to(exact)
            _add(grads[1], part, grad_logits.transpose(-1, -2) @ mine)
            _add(grads[2], part, weights.transpose(-1, -2) @ grad)
    return tuple(
        grad.to(t.dtype, copy=False) for grad, t in zip(grads, (query, key, value), strict=True)
    )


def _rows(query: torch.Tensor, key: torch.Tensor, task: Task) -> Iterator[list[_Part]]:
    """The rows that have blocks, each in parts of bounded size."""
    plans, nq, _ = task.lists.grid
    for plan in range(plans):
        heads, many = slice(None), query.shape[1]
        if plans > 1:
            heads = (task.lists.head_plan.expand(many) == plan).nonzero()[:, 0]
            many = len(heads)
        logits = query.shape[0] * many * task.block[0] * task.block[1]
        for row in range(nq if many else 0):
            parts = _parts(query, key, task, plan, row, heads, max(1, LOGITS_AT_ONCE // logits))
            if parts:
                yield parts


def _parts(
    query: torch.Tensor,
    key: torch.Tensor,
    task: Task,
    plan: int,
    row: int,
    heads: slice | torch.Tensor,
    at_once: int,
) -> list[_Part]:
    """One row, `at_once` blocks a part, full blocks first."""
    lists, (block_q, block_k) = task.lists, task.block
    first, last = lists.row_full_start[plan, row : row + 2].tolist()
    full = lists.row_full_index[first:last]
    first, last = lists.row_partial_start[plan, row : row + 2].tolist()
    partial, slots = lists.row_partial_index[first:last], lists.row_partial_slot[first:last]
    queries = slice(row * block_q, min((row + 1) * block_q, query.shape[2]))
    columns, out = torch.cat([full, partial]).long(), []
    for i in range(0, len(columns), at_once):
        keys = (columns[i : i + at_once, None] * block_k + torch.arange(block_k)).flatten()
        masked = slice(max(0, i - len(full)), max(0, i + at_once - len(full)))
        seen = None
        if len(partial[masked]):
            seen = pairs_allowed(task, plan, row, partial[masked], slots[masked]).flatten(2)
            seen = seen[:, None, : queries.stop - queries.start]
            seen = seen.to(torch.promote_types(query.dtype, torch.float32))
        # Places beyond the last key, never seen, read the last key instead.
        out.append(_Part(heads, queries, keys.clamp(max=key.shape[2] - 1), seen))
    return out


def _logits(query: torch.Tensor, key: torch.Tensor, part: _Part, task: Task) -> torch.Tensor:
    """`[B, h, q, n * block_k]`, about `HIDDEN` where a pair does not attend."""
    exact = torch.promote_types(query.dtype, torch.float32)
    mine = query[:, part.heads, part.queries].to(exact) * task.scale
    logits = mine @ _take(key, part, exact).transpose(-1, -2)
    if part.seen is not None:
        logits[..., -part.seen.shape[-1] :].add_((part.seen - 1) * -HIDDEN)
    return logits


def _exp(logits: torch.Tensor, shift: torch.Tensor, part: _Part) -> torch.Tensor:
    """`exp(logits - shift)` in place, 0 for pairs that do not attend.

    What lies far below the rest becomes next to nothing, which is cheaper than underflow, and then
    exactly 0 where a pair does not attend; so rows that see nothing sum to 0.
    """
    least = -700 if logits.dtype == torch.float64 else -80
    weights = logits.sub_(shift).clamp_(min=least).exp_()
    if part.seen is not None:
        weights[..., -part.seen.shape[-1] :].mul_(part.seen)
    return weights


def _take(tensor: torch.Tensor, part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """The listed keys of the heads, `[B, h, n * block_k, D]`."""
    return tensor[:, part.heads].index_select(2, part.keys).to(dtype)


def _add(grad: torch.Tensor, part: _Part, values: torch.Tensor) -> None:
    """Adds to the listed keys; a key may be listed twice, hence no plain indexing."""
    if isinstance(part.heads, slice):
        grad.index_add_(2, part.keys, values)
    else:
        mine = grad[:, part.heads].index_add_(2, part.keys, values)
        grad[:, part.heads] = mine
