"""Launches the Triton kernels. CUDA; or anything with TRITON_INTERPRET=1, slowly, for tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dittune.kernels.block_sparse.lists import Task
from dittune.kernels.block_sparse.triton_kernels import (
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from dittune.kernels.triton_support import IS_INTERPRETED


class Tile(NamedTuple):
    """How one program works.

    Attributes:
        queries: of a tile; at most the block size of the plan.
        keys: likewise.
        warps: of 32 threads.
        stages: of software pipelining.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# For head dims up to the key. Chosen to compile for Hopper without spilling registers (but for the
# rule `bits`, a little); not yet tuned on a GPU.
FORWARD = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)}
FORWARD_FP32 = {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)}
QUERY_GRADIENT = {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 8, 1)}
QUERY_GRADIENT_FP32 = {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}
KEY_GRADIENT = {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)}
KEY_GRADIENT_FP32 = {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)}


def tile_for(
    table: dict[int, Tile], query: torch.Tensor, block: tuple[int, int]
) -> tuple[Tile, dict[str, object]]:
    """The tile for a query, and the constants that all kernels take."""
    dim = query.shape[-1]
    tile = next(tile for most, tile in table.items() if dim <= most)
    tile = tile._replace(queries=min(tile.queries, block[0]), keys=min(tile.keys, block[1]))
    constants = {
        "D": dim,
        "BD": max(16, 1 << (dim - 1).bit_length()),
        "BQ": block[0],
        "BK": block[1],
        "BM": tile.queries,
        "BN": tile.keys,
        "UPCAST": IS_INTERPRETED and query.dtype == torch.bfloat16,
        "PRECISION": "ieee",  # of float32 products; 16-bit types are not affected
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return tile, constants


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_reference`."""
    lists, out = task.lists, torch.empty_like(query)
    query, key, value = (_last_axis_dense(t) for t in (query, key, value))
    batch, heads, rows, _ = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    table = FORWARD_FP32 if query.dtype == torch.float32 else FORWARD
    tile, constants = tile_for(table, query, task.block)
    _, nq, nk = lists.grid
    target = out if out.stride(-1) == 1 else query.new_empty(query.shape)
    forward_kernel[(nq * task.block[0] // tile.queries, batch * heads)](
        query, key, value, target, lse, lists.row_full_start, lists.row_full_index,
        lists.row_partial_start, lists.row_partial_index, lists.row_partial_slot, lists.row_order,
        lists.key_count, lists.head_plan, lists.query_table, lists.key_table, lists.bits,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *target.stride()[:3],
        nk if len(lists.key_count) > 1 else 0, int(len(lists.head_plan) > 1),
        heads, rows, key.shape[2], nq, task.scale * math.log2(math.e), task.rule, **constants,
    )  # fmt: skip
    return out if target is out else out.copy_(target), lse


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
    """Gradients of query, key and value. Queries go by rows, keys by columns; no atomics."""
    lists, to_base_2 = task.lists, math.log2(math.e)
    query, key, value, grad_out = (_last_axis_dense(t) for t in (query, key, value, grad_out))
    batch, heads, rows, _ = query.shape
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    delta = ((grad_out.float() * out.float()).sum(-1) - grad_lse).contiguous()
    # Rows without keys: all weights become exp2(x - inf) = 0.
    lse2 = (lse * to_base_2).masked_fill(lse == -torch.inf, torch.inf).contiguous()
    _, nq, nk = lists.grid
    rest = (
        lists.key_count, lists.head_plan, lists.query_table, lists.key_table, lists.bits,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
        nk if len(lists.key_count) > 1 else 0, int(len(lists.head_plan) > 1),
        heads, rows, key.shape[2],
    )  # fmt: skip
    scales = task.scale, task.scale * to_base_2, task.rule
    is_fp32 = query.dtype == torch.float32
    table = QUERY_GRADIENT_FP32 if is_fp32 else QUERY_GRADIENT
    tile, constants = tile_for(table, query, task.block)
    query_gradient_kernel[(nq * task.block[0] // tile.queries, batch * heads)](
        query, key, value, grad_out, grads[0], lse2, delta, lists.row_full_start,
        lists.row_full_index, lists.row_partial_start, lists.row_partial_index,
        lists.row_partial_slot, lists.row_order, *rest, nq, *scales, **constants,
    )  # fmt: skip
    table = KEY_GRADIENT_FP32 if is_fp32 else KEY_GRADIENT
    tile, constants = tile_for(table, query, task.block)
    key_gradient_kernel[(nk * task.block[1] // tile.keys, batch * heads)](
        query, key, value, grad_out, grads[1], grads[2], lse2, delta, lists.column_full_start,
        lists.column_full_index, lists.column_partial_start, lists.column_partial_index,
        lists.column_partial_slot, lists.column_order, *rest, nk, *scales, **constants,
    )  # fmt: skip
    return tuple(grads)


def _last_axis_dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
