"""The way in PyTorch, on any device: one chunk of one head after the other, its queries gathered.

On a CPU PyTorch's own fused kernel attends, which keeps no logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dittune.kernels.block_sparse.merge import merge_attention

LOGITS_AT_ONCE = 2**22  # numbers


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.routed_reference`."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=exact, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=exact, device=query.device)
    for at, rows, keys in _parts(chosen, start, count):
        inputs = query[at][rows], key[at][keys], value[at][keys]
        found = _fused(*inputs, scale) if query.device.type == "cpu" else _plain(*inputs, scale)
        before = out[at][rows], lse[at][rows]
        together = zip(before, found, strict=True)
        out[at][rows], lse[at][rows] = merge_attention(*map(list, together))
    return out.to(query.dtype), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; logits are computed again."""
    grads = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (query, key, value)]
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse  # (B, H, Sq)
    for at, rows, keys in _parts(chosen, start, count):
        mine, keys_, values, grad = (
            tensor[at][part].to(lse.dtype)
            for tensor, part in ((query, rows), (key, keys), (value, keys), (grad_out, rows))
        )
        weights = torch.exp(mine @ keys_.T * scale - lse[at][rows][:, None])
        grad_logits = weights * (grad @ values.T - delta[at][rows][:, None]) * scale
        grads[0][at][rows] += grad_logits @ keys_
        grads[1][at][keys] += grad_logits.T @ mine
        grads[2][at][keys] += weights.T @ grad
    return tuple(g.to(t.dtype) for g, t in zip(grads, (query, key, value), strict=True))


def _parts(
    chosen: torch.Tensor, start: torch.Tensor, count: torch.Tensor
) -> Iterator[tuple[tuple[int, int], torch.Tensor, slice]]:
    """Batch row and head, queries of one chunk (not too many at once), and its real keys."""
    batch, heads, chunks, _ = chosen.shape
    first, many = start.tolist(), count.expand(batch, -1).tolist()
    for at in ((b, h) for b in range(batch) for h in range(heads)):
        for c in range(chunks):
            rows, keys = chosen[at][c].nonzero()[:, 0], slice(first[c], first[c] + many[at[0]][c])
            if many[at[0]][c] and len(rows):
                for part in rows.split(max(1, LOGITS_AT_ONCE // many[at[0]][c])):
                    yield at, part, keys


def _fused(query, key, value, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(query[None, None], key[None, None], value[None, None], scale=scale)
    return out[0, 0], lse[0, 0]


def _plain(query, key, value, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(exact) @ key.to(exact).T * scale
    return logits.softmax(-1) @ value.to(exact), logits.logsumexp(-1)
