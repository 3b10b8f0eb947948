"""The definition: dense attention under the mask that the choice means. Any device, any type."""

from __future__ import annotations

import torch


def routed_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Sq, D]` and natural-log LSE `[B, H, Sq]`; rows without keys give 0 and -inf.

    Computed in at least float32; plain PyTorch, hence differentiable. See `api.routed_attention`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    size = start.diff().long()
    chunk = torch.arange(len(size), device=size.device).repeat_interleave(size)  # of each key
    inside = torch.arange(key.shape[2], device=size.device) - start[:-1].long()[chunk]
    is_real = inside < count[:, chunk]  # (1 or B, Skv)
    seen = chosen[:, :, chunk].transpose(2, 3) & is_real[:, None, None]
    logits = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    has_keys = seen.any(-1, keepdim=True)
    top = logits.detach().amax(-1, keepdim=True).masked_fill(~has_keys, 0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True).masked_fill(~has_keys, 1)
    out = (weights @ value.to(exact) / total).to(query.dtype)
    return out, (top + total.log()).masked_fill(~has_keys, -torch.inf)[..., 0]
