"""The public function: checks, and the choice of a back-end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from dittune.kernels.block_sparse.lists import BlockLists, Task, check, unpack
from dittune.kernels.block_sparse.op import backend_module, block_sparse_op
from dittune.kernels.block_sparse.reference import block_sparse_reference
from dittune.kernels.errors import BackendError
from dittune.kernels.triton_support import why_not_triton


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    block: tuple[int, int],
    rule: str = "none",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the listed blocks only; time and memory follow their number.

    With `plan = dittune.patterns.make_plan(...).to(query.device)`:
    `block_sparse_attention(query, key, value, plan.tensors, plan.block, plan.rule)`. Tokens are in
    the order of the plan's sequences (`plan.queries.permutation`). To use fewer keys than planned,
    replace `key_count` among the tensors by `plan.key_count(...)`.

    Differentiable in query, key and value, through both results. One operator for compilers.

    Args:
        query: `[B, H, Sq, D]`, floating.
        key: `[B, H, Skv, D]`.
        value: `[B, H, Skv, D]`.
        tensors: of the plan, on the same device; the fields of `lists.BlockLists`.
        block: tokens of a block, `(queries, keys)`.
        rule: of the partial blocks, `none`, `window`, `disc` or `bits`.
        scale: of the logits; `D ** -0.5` if None.
        backend: `auto`, `triton` (CUDA), `flex` (CUDA, FlexAttention), `cpu` or `reference`
            (dense, anywhere). `auto` takes the first of these that can run; a warning says why
            if that is `reference`.

    Returns:
        Output `[B, H, Sq, D]` in the type of `query`, and the natural log of the sum of
        exponentials `[B, H, Sq]`, at least float32. A row without keys gives 0 and -inf.

    Raises:
        ValueError: shapes, types or devices do not fit, or a back-end of that name does not exist.
        BackendError: the back-end that was asked for cannot run here; the message says why.
    """
    task = unpack(tensors, block, rule, query.shape[-1] ** -0.5 if scale is None else scale)
    check(query, key, value, task)
    backend = choose_backend(query, task, backend)
    if backend == "reference":
        return block_sparse_reference(query, key, value, task)
    if backend == "flex":
        from dittune.kernels.block_sparse.flex import flex_forward

        return flex_forward(query, key, value, task)
    lists = [tensor.contiguous() for tensor in task.lists]
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    is_plain = type(query) is type(key) is type(value) is torch.Tensor
    if (
        is_plain
        and not torch.compiler.is_compiling()
        and not (needs_grad and torch.is_grad_enabled())
    ):  # nobody else must know of the call: spare the dispatcher, which takes longer than we do
        task = task._replace(lists=BlockLists(*lists))
        return backend_module(backend).forward(query, key, value, task)
    return block_sparse_op(query, key, value, lists, list(block), rule, task.scale, backend)


def choose_backend(query: torch.Tensor, task: Task, backend: str = "auto") -> str:
    """The back-end that will run; see `block_sparse_attention`."""
    reasons = {
        "triton": _why_not_triton(query, task),
        "flex": _why_not_flex(query, task),
        "cpu": None if query.device.type == "cpu" else f"tensors are on {query.device}",
        "reference": None,
    }
    if backend == "auto":
        if query.device.type == "cpu":
            return "cpu"
        backend = next(name for name, reason in reasons.items() if reason is None)
        if backend == "reference":
            warnings.warn(
                "no kernel can skip blocks here, so all are computed; triton: "
                f"{reasons['triton']}; flex: {reasons['flex']}",
                stacklevel=3,
            )
        return backend
    if backend not in reasons:
        raise ValueError(f"the back-end is auto or one of {list(reasons)}, got {backend!r}")
    if reasons[backend] is not None:
        raise BackendError(f"the back-end {backend!r} cannot run: {reasons[backend]}")
    return backend


def _why_not_triton(query: torch.Tensor, task: Task) -> str | None:
    if reason := why_not_triton(query, 256):
        return reason
    if any(size < 16 or size & (size - 1) for size in task.block):
        return f"block sizes are powers of two of at least 16, got {task.block}"
    return None


def _why_not_flex(query: torch.Tensor, task: Task) -> str | None:
    if query.device.type != "cuda":
        return f"it needs CUDA tensors, got {query.device}; elsewhere it computes all blocks"
    if any(size % 64 for size in task.block):
        return f"block sizes are multiples of 64, got {task.block}"
    return None
