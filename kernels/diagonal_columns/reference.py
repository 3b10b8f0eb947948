"""The definition: dense attention under a mask, in whatever precision it is given."""

from __future__ import annotations

import torch


def diagonal_columns_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    column_key: torch.Tensor,
    column_value: torch.Tensor,
    scale: float | None = None,
    column_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `diagonal_columns_attention`, through the whole `S x (S + C)` map."""
    rows, columns = query.shape[2], column_key.shape[2]
    keys = torch.cat([key, column_key], dim=2)
    seen = torch.eye(rows, dtype=torch.bool, device=query.device)
    seen = torch.cat([seen, seen.new_ones(rows, columns)], dim=1)  # (S, S + C)
    logits = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if column_bias is not None:
        logits[..., rows:] += column_bias
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
    return weights @ torch.cat([value, column_value], dim=2)
