"""What sparse attention is compared with: dense attention, by whoever is fastest here."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense_rivals(device: torch.device) -> dict[str, Dense]:
    """Dense attention on `[B, H, S, D]` by name; on CUDA each back-end of PyTorch, FA4, FlashInfer.

    The latter two are there where they can be imported.
    """
    if device.type == "cpu":
        return {"sdpa": functional.scaled_dot_product_attention}
    kinds = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    found: dict[str, Dense] = {n: functools.partial(_sdpa, kind) for n, kind in kinds.items()}
    if _has("flash_attn.cute"):
        found["fa4"] = _fa4
    if _has("flashinfer"):
        found["flashinfer"] = _flashinfer
    return found


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _sdpa(kind: SDPBackend, query, key, value) -> torch.Tensor:
    with sdpa_kernel(kind):
        return functional.scaled_dot_product_attention(query, key, value)


def _fa4(query, key, value) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flashinfer(query, key, value) -> torch.Tensor:
    from flashinfer import single_prefill_with_kv_cache

    outs = [
        single_prefill_with_kv_cache(*(t[i].transpose(0, 1) for t in (query, key, value)))
        for i in range(len(query))
    ]
    return torch.stack(outs).transpose(1, 2)
