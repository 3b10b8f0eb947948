"""Launches the Triton kernel. CUDA; or anything with TRITON_INTERPRET=1, slowly, for tests."""

from __future__ import annotations

import math

import torch

from dittune.kernels.block_sparse.triton import Tile
from dittune.kernels.routed_attention.triton_kernels import chunk_kernel
from dittune.kernels.triton_support import IS_INTERPRETED

# For head dims up to the key. Chosen to compile for Hopper without spilling registers; not yet
# tuned on a GPU.
FORWARD = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)}
FORWARD_FP32 = {64: Tile(64, 32, 8, 2), 128: Tile(16, 16, 8, 1)}


def constants_for(query: torch.Tensor) -> dict[str, object]:
    """Tile and other constants of the kernel for a query."""
    dim = query.shape[-1]
    table = FORWARD_FP32 if query.dtype == torch.float32 else FORWARD
    tile = next(tile for most, tile in table.items() if dim <= most)
    return {
        "D": dim,
        "BD": max(16, 1 << (dim - 1).bit_length()),
        "BM": tile.queries,
        "BN": tile.keys,
        "UPCAST": IS_INTERPRETED and query.dtype == torch.bfloat16,
        "PRECISION": "ieee",  # of float32 products; 16-bit types are not affected
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.routed_reference`. Nothing is read back, so the GPU never waits."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, _ = query.shape
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse2 = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    constants = constants_for(query)
    grid = -(-queries // constants["BM"]), batch * heads
    many = chosen.sum(-1, dtype=torch.int32).permute(2, 0, 1).contiguous()  # (C, B, H)
    for i in range(chosen.shape[2]):
        mine = chosen[:, :, i].flatten(0, 1)
        rows = torch.sort(mine.byte(), stable=True, dim=-1, descending=True).indices.int()
        chunk_kernel[grid](
            query, key, value, out, lse2, rows, many[i], start, count,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            count.stride(0) if len(count) > 1 else 0, i, heads, queries,
            scale * math.log2(math.e), **constants,
        )  # fmt: skip
    return out.to(query.dtype), lse2 * math.log(2)
