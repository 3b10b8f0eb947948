"""The CPU path: one row of blocks after the other, only the blocks that are listed.

The listed keys of a row are put side by side; PyTorch's own fused kernel does the rest, which keeps
no logits. The way back keeps those of a few blocks at a time.
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
        columns: key blocks, int64 `[n]`.
        seen: 1 for pairs that attend, else 0, `[1 or B, 1, 1 or q, m]`, of the last `m` keys; or
            None.
    """

    heads: slice | torch.Tensor
    queries: slice
    columns: torch.Tensor
    seen: torch.Tensor | None


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_reference`."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=exact)
    for (part,) in _rows(query, key, task, in_parts=False):
        heads, queries = part.heads, part.queries
        keys, values = (_take(t, part, task.block[1]) for t in (key, value))
        mask = None
        if part.seen is not None:
            mask = part.seen.log().to(query.dtype)  # 0 or -inf
            mask = torch.nn.functional.pad(mask, (keys.shape[2] - mask.shape[3], 0))
            mask = mask.expand(-1, -1, queries.stop - queries.start, -1)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mine, mine_lse = fused(
            query[:, heads, queries], keys, values, attn_mask=mask, scale=task.scale
        )
        if mask is not None:  # the fused kernel gives 0 for the LSE of nothing
            mine_lse = mine_lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        out[:, heads, queries], lse[:, heads, queries] = mine, mine_lse
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
            grad_logits = grad @ _take(value, part, task.block[1]).to(exact).transpose(-1, -2)
            grad_logits = grad_logits.sub_(delta[:, heads, queries, None]).mul_(weights)
            grad_logits = grad_logits.mul_(task.scale)
            grads[0][:, heads, queries] += grad_logits @ _take(key, part, task.block[1]).to(exact)
            mine = query[:, heads, queries].to(exact)
            keys = _tokens(part.columns, task.block[1], key.shape[2])
            _add(grads[1], heads, keys, grad_logits.transpose(-1, -2) @ mine)
            _add(grads[2], heads, keys, weights.transpose(-1, -2) @ grad)
    return tuple(
        grad.to(t.dtype, copy=False) for grad, t in zip(grads, (query, key, value), strict=True)
    )


def _rows(
    query: torch.Tensor, key: torch.Tensor, task: Task, in_parts: bool = True
) -> Iterator[list[_Part]]:
    """The rows that have blocks, each whole, or in parts of bounded size."""
    plans, nq, nk = task.lists.grid
    for plan in range(plans):
        heads, many = slice(None), query.shape[1]
        if plans > 1:
            heads = (task.lists.head_plan.expand(many) == plan).nonzero()[:, 0]
            many = len(heads)
        logits = query.shape[0] * many * task.block[0] * task.block[1]
        at_once = max(1, LOGITS_AT_ONCE // max(1, logits)) if in_parts else nk
        for row in range(nq if many else 0):
            parts = _parts(query, task, plan, row, heads, at_once)
            if parts:
                yield parts


def _parts(
    query: torch.Tensor,
    task: Task,
    plan: int,
    row: int,
    heads: slice | torch.Tensor,
    at_once: int,
) -> list[_Part]:
    """One row, `at_once` blocks a part, full blocks first."""
    lists, block_q = task.lists, task.block[0]
    first, last = lists.row_full_start[plan, row : row + 2].tolist()
    full = lists.row_full_index[first:last]
    first, last = lists.row_partial_start[plan, row : row + 2].tolist()
    partial, slots = lists.row_partial_index[first:last], lists.row_partial_slot[first:last]
    queries = slice(row * block_q, min((row + 1) * block_q, query.shape[2]))
    columns, out = torch.cat([full, partial]).long(), []
    for i in range(0, len(columns), at_once):
        masked = slice(max(0, i - len(full)), max(0, i + at_once - len(full)))
        seen = None
        if len(partial[masked]):
            seen = pairs_allowed(task, plan, row, partial[masked], slots[masked]).flatten(2)
            seen = seen[:, None, : queries.stop - queries.start]
            seen = seen.to(torch.promote_types(query.dtype, torch.float32))
        out.append(_Part(heads, queries, columns[i : i + at_once], seen))
    return out


def _logits(query: torch.Tensor, key: torch.Tensor, part: _Part, task: Task) -> torch.Tensor:
    """`[B, h, q, n * block_k]`, about `HIDDEN` where a pair does not attend."""
    exact = torch.promote_types(query.dtype, torch.float32)
    mine = query[:, part.heads, part.queries].to(exact) * task.scale
    logits = mine @ _take(key, part, task.block[1]).to(exact).transpose(-1, -2)
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


def _take(tensor: torch.Tensor, part: _Part, size: int) -> torch.Tensor:
    """The listed keys of the heads, `[B, h, n * size, D]`."""
    tensor = tensor[:, part.heads]
    if tensor.shape[2] % size:
        return tensor.index_select(2, _tokens(part.columns, size, tensor.shape[2]))
    blocks = tensor.unflatten(2, (-1, size))  # whole blocks are copied faster than tokens
    return blocks.index_select(2, part.columns).flatten(2, 3)


def _tokens(columns: torch.Tensor, size: int, keys: int) -> torch.Tensor:
    """Token numbers of key blocks; places beyond the last key, never seen, are the last key."""
    return (columns[:, None] * size + torch.arange(size)).flatten().clamp(max=keys - 1)


def _add(
    grad: torch.Tensor, heads: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds to the listed keys; a key may be listed twice, hence no plain indexing."""
    if isinstance(heads, slice):
        grad.index_add_(2, keys, values)
    else:
        grad[:, heads] = grad[:, heads].index_add_(2, keys, values)
