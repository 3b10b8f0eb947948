"""Whether Triton is there, and whether it takes a tensor."""

from __future__ import annotations

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not_triton(query: torch.Tensor, most_dim: int) -> str | None:
    """Why a kernel for head dims up to `most_dim` cannot run on this query; None if it can."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'dittune[gpu]')"
    if query.device.type != "cuda" and not IS_INTERPRETED:
        return f"it needs CUDA tensors, got {query.device}; TRITON_INTERPRET=1 runs it anywhere"
    if query.dtype not in TYPES:
        return f"it knows {TYPES}, got {query.dtype}"
    if query.shape[-1] > most_dim:
        return f"head dims reach {most_dim} in {query.dtype}, got {query.shape[-1]}"
    return None
