"""The operator `dittune::block_sparse_attention`, opaque to compilers, with its gradient."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from dittune.kernels.block_sparse.lists import BlockLists, Task

# A back-end is a module with `forward` and `backward`; it is imported when first used.
BACKENDS = {
    "cpu": "dittune.kernels.block_sparse.cpu",
    "triton": "dittune.kernels.block_sparse.triton",
}


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module of a back-end."""
    return importlib.import_module(BACKENDS[name])


@torch.library.custom_op("dittune::block_sparse_attention", mutates_args=())
def block_sparse_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor],
    block: list[int],
    rule: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output like `query` and LSE `[B, H, Sq]`; `lists` are the fields of `BlockLists`."""
    task = Task(BlockLists(*lists), tuple(block), rule, scale)
    return backend_module(backend).forward(query, key, value, task)


@block_sparse_op.register_fake
def _(query, key, value, lists, block, rule, scale, backend):
    exact = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("dittune::block_sparse_attention_backward", mutates_args=())
def block_sparse_backward_op(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    saved: list[torch.Tensor],
    lists: list[torch.Tensor],
    block: list[int],
    rule: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; `saved` are these three, output and LSE."""
    task = Task(BlockLists(*lists), tuple(block), rule, scale)
    return backend_module(backend).backward(grad_out, grad_lse, *saved, task)


@block_sparse_backward_op.register_fake
def _(grad_out, grad_lse, saved, lists, block, rule, scale, backend):
    return tuple(t.new_empty(t.shape) for t in saved[:3])


def _setup_context(ctx, inputs, output):
    query, key, value, lists, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, *lists)


def _backward(ctx, grad_out, grad_lse):
    tensors = list(ctx.saved_tensors)
    saved, lists = tensors[:5], tensors[5:]
    grads = block_sparse_backward_op(grad_out, grad_lse, saved, lists, *ctx.rest)
    return *grads, [None] * len(lists), None, None, None, None


block_sparse_op.register_autograd(_backward, setup_context=_setup_context)
