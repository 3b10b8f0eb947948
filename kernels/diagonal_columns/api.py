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
    column_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row `i` attends to key `i` and to all columns; the `S x S` map is never formed.

    Logits, `1 + C` a row, and their softmax are at least float32; time and memory are `S (1 + C)`.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H, S, D]`, key `i` belongs to row `i`.
        value: `[B, H, S, D]`.
        column_key: `[B, H, C, D]`; `C` may be 0, then the result is `value`.
        column_value: `[B, H, C, D]`.
        scale: of the logits; `D ** -0.5` if None.
        column_bias: added to the scaled logits of the columns, broadcast to `[B, H, S, C]`; -inf
            hides a column. None adds nothing.

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
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.to(exact) * scale
    own = (query * key.to(exact)).sum(-1, keepdim=True)  # (B, H, S, 1)
    logits = query @ column_key.to(exact).transpose(-1, -2)  # (B, H, S, C)
    if column_bias is not None:
        logits = logits + column_bias
    weights = torch.cat([own, logits], dim=-1).softmax(-1).to(value.dtype)
    return weights[..., :1] * value + weights[..., 1:] @ column_value
