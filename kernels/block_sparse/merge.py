"""Joins attention over disjoint sets of keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_attention(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result as if each query had attended to all sets of keys at once.

    The sets must be disjoint: a key in two of them counts twice. Differentiable in all arguments.
    Rows that saw no key at all stay 0 and -inf.

    Args:
        outputs: of each set, `[..., S, D]`.
        lses: natural log of the sum of exponentials of each set, `[..., S]`.

    Returns:
        Output `[..., S, D]` in the type of the first, and LSE `[..., S]`.
    """
    lse = torch.stack([each.to(torch.promote_types(each.dtype, torch.float32)) for each in lses])
    top = lse.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(lse - top)  # (sets, ..., S)
    total = weights.sum(0)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1)
    mixed = sum(w[..., None] * out for w, out in zip(weights / total, outputs, strict=True))
    return mixed.to(outputs[0].dtype), (top + total.log()).masked_fill(is_empty, -torch.inf)
