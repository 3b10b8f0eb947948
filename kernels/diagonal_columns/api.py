"""The public function: the sparse form, in plain PyTorch on any device."""

from __future__ import annotations

import torch


def diagonal_columns_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    column_key: torch.Tensor,
    column_value: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Row `i` attends to key `i` and to all columns; the `S x S` map is never formed.

    Softmax over `1 + C` logits a row, at least in float32; time and memory are `S (1 + C)`.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H, S, D]`, key `i` belongs to row `i`.
        value: `[B, H, S, D]`.
        column_key: `[B, H, C, D]`; `C` may be 0, then the result is `value`.
        column_value: `[B, H, C, D]`.
        scale: of the logits; `D ** -0.5` if None.

    Returns:
        `[B, H, S, D]` in the type of `value`.

    Raises:
        ValueError: `query`, `key` and `value` differ in their number of rows.
    """
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError(
            "a diagonal needs as many queries as keys, got "
            f"{query.shape[2]}, {key.shape[2]} and {value.shape[2]} rows"
        )
    own = (query * key).sum(-1, keepdim=True)  # (B, H, S, 1)
    logits = torch.cat([own, query @ column_key.transpose(-1, -2)], dim=-1)  # (B, H, S, 1 + C)
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax(logits * scale, dim=-1, dtype=at_least_fp32).to(value.dtype)
    return weights[..., :1] * value + weights[..., 1:] @ column_value
