"""The CPU path: one row of blocks after the other, only the blocks that are listed.

Logits are kept for a few blocks at a time, so memory does not grow with the length of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dittune.kernels.block_sparse.lists import Task, pairs_allowed

LOGITS_AT_ONCE = 2**20  # numbers; a few MB, which stay in the cache


class _Part(NamedTuple):
    """Some listed blocks of one row of one plan.

    Attributes:
        heads: which heads, a slice or int64 `[h]`.
        queries: which tokens.
        keys: token numbers, int64 `[n * block_k]`.
        hidden: pairs that do not attend, bool `[1 or B, 1, 1 or block_q, m]`, of the last `m` keys.
    """

    heads: slice | torch.Tensor
    queries: slice
    keys: torch.Tensor
    hidden: torch.Tensor | None


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
            new_top = torch.clamp(logits.amax(-1, keepdim=True), min=top)
            shift = new_top.masked_fill(new_top == -torch.inf, 0)  # nothing seen yet
            weights = logits.sub_(shift).exp_()
            kept = torch.exp(top - shift)
            total = total * kept + weights.sum(-1, keepdim=True)
            mixed = mixed * kept + weights @ _take(value, part, exact)
            top = new_top
            heads, queries = part.heads, part.queries
        out[:, heads, queries] = (mixed / total.masked_fill(total == 0, 1)).to(out.dtype)
        lse[:, heads, queries] = (shift + total.log())[..., 0]
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
    lse = lse.masked_fill(lse == -torch.inf, 0)  # rows without keys: all weights are exp(-inf)
    for row in _rows(query, key, task):
        for part in row:
            heads, queries = part.heads, part.queries
            weights = _logits(query, key, part, task).sub_(lse[:, heads, queries, None]).exp_()
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
    lists, (block_q, block_k) = task.lists, task.block
    plans, nq, _ = lists.grid
    for plan in range(plans):
        heads = slice(None)
        if plans > 1:
            heads = (lists.head_plan.expand(query.shape[1]) == plan).nonzero()[:, 0]
        many = query.shape[1] if plans == 1 else len(heads)
        logits = max(1, query.shape[0] * many * block_q * block_k)
        for row in range(nq if many else 0):
            parts = _parts(task, plan, row, heads, max(1, LOGITS_AT_ONCE // logits), key.shape[2])
            if parts:
                yield parts


def _parts(
    task: Task, plan: int, row: int, heads: slice | torch.Tensor, at_once: int, length: int
) -> list[_Part]:
    lists, (block_q, block_k) = task.lists, task.block
    first, last = lists.row_full_start[plan, row : row + 2].tolist()
    full = lists.row_full_index[first:last]
    first, last = lists.row_partial_start[plan, row : row + 2].tolist()
    partial, slots = lists.row_partial_index[first:last], lists.row_partial_slot[first:last]
    columns, queries = torch.cat([full, partial]).long(), slice(row * block_q, (row + 1) * block_q)
    out = []
    for i in range(0, len(columns), at_once):
        keys = (columns[i : i + at_once, None] * block_k + torch.arange(block_k)).flatten()
        masked = slice(max(0, i - len(full)), max(0, i + at_once - len(full)))
        hidden = None
        if len(partial[masked]):
            hidden = ~pairs_allowed(task, plan, row, partial[masked], slots[masked]).flatten(2)
            hidden = hidden[:, None]
        # Slots beyond the last key, always hidden, read the last key instead.
        out.append(_Part(heads, queries, keys.clamp(max=length - 1), hidden))
    return out


def _logits(query: torch.Tensor, key: torch.Tensor, part: _Part, task: Task) -> torch.Tensor:
    """`[B, h, q, n * block_k]`, -inf where a pair does not attend."""
    exact = torch.promote_types(query.dtype, torch.float32)
    mine = query[:, part.heads, part.queries].to(exact) * task.scale
    logits = mine @ _take(key, part, exact).transpose(-1, -2)
    if part.hidden is not None:
        hidden = part.hidden[:, :, : logits.shape[2]]
        logits[..., -hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
    return logits


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
