"""The public function: checks, the choice of a back-end, one operator with its gradient."""

from __future__ import annotations

import importlib

import torch

from dittune.kernels.errors import BackendError
from dittune.kernels.routed_attention import gather
from dittune.kernels.routed_attention.reference import routed_reference
from dittune.kernels.triton_support import why_not_triton


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to the chunks that it has chosen; work follows their number.

    The queries of a chunk are gathered, attend to its keys, and what they find is joined with what
    they found in other chunks by the log of the sum of exponentials.

    Differentiable in query, key and value, through both results. One operator for compilers.

    Args:
        query: `[B, H, Sq, D]`, floating.
        key: `[B, H, Skv, D]`, the keys of a chunk next to each other.
        value: `[B, H, Skv, D]`.
        chosen: which chunks a query attends to, bool `[B, H, C, Sq]`.
        start: first key of each chunk, and at the end `Skv`: int32 `[C + 1]`, ascending.
        count: how many of the first keys of a chunk are real, int32 `[1 or B, C]`; None is all.
        scale: of the logits; `D ** -0.5` if None.
        backend: `auto`, `triton` (CUDA), `gather` (PyTorch, anywhere) or `reference` (dense).
            `auto` takes the first of these that can run.

    Returns:
        Output `[B, H, Sq, D]` in the type of `query`, and the natural log of the sum of
        exponentials `[B, H, Sq]`, at least float32. A row without keys gives 0 and -inf.

    Raises:
        ValueError: shapes, types or devices do not fit, or a back-end of that name does not exist.
        BackendError: the back-end that was asked for cannot run here; the message says why.
    """
    if count is None:
        count = start.diff()[None]
    check(query, key, value, chosen, start, count)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    backend = choose_backend(query, backend)
    if backend == "reference":
        return routed_reference(query, key, value, chosen, start, count, scale)
    return _op(query, key, value, chosen, start, count, scale, backend)


def check(query, key, value, chosen, start, count) -> None:
    """Whether shapes, types and devices fit; the numbers in `start` and `count` are trusted.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    fits = query.ndim == key.ndim == 4 and key.shape == value.shape
    if not fits or key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(
            "query is [B, H, Sq, D], key and value [B, H, Skv, D], got {}, {}, {}".format(*shapes)
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"query, key and value have one floating type, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}; under autocast, cast them first"
        )
    batch, heads, rows, _ = query.shape
    chunks = len(start) - 1
    if chosen.dtype != torch.bool or chosen.shape != (batch, heads, chunks, rows):
        raise ValueError(
            f"chosen is bool {[batch, heads, chunks, rows]} for {chunks} chunks, got "
            f"{chosen.dtype} {list(chosen.shape)}"
        )
    if count.ndim != 2 or count.shape[0] not in (1, batch) or count.shape[1] != chunks:
        raise ValueError(f"count is [1 or {batch}, {chunks}], got {list(count.shape)}")
    if start.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError(f"start and count are int32, got {start.dtype} and {count.dtype}")
    devices = {t.device for t in (query, key, value, chosen, start, count)}
    if len(devices) > 1:
        raise ValueError(f"all tensors are on one device, got {devices}")


def choose_backend(query: torch.Tensor, backend: str = "auto") -> str:
    """The back-end that will run; see `routed_attention`."""
    most_dim = 128 if query.dtype == torch.float32 else 256
    reasons = {"triton": why_not_triton(query, most_dim), "gather": None, "reference": None}
    if backend == "auto":
        return "triton" if query.device.type == "cuda" and not reasons["triton"] else "gather"
    if backend not in reasons:
        raise ValueError(f"the back-end is auto or one of {list(reasons)}, got {backend!r}")
    if reasons[backend] is not None:
        raise BackendError(f"the back-end {backend!r} cannot run: {reasons[backend]}")
    return backend


@torch.library.custom_op("dittune::routed_attention", mutates_args=())
def _op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = importlib.import_module(f"dittune.kernels.routed_attention.{backend}")
    return module.forward(query, key, value, chosen, start, count, scale)


@_op.register_fake
def _(query, key, value, chosen, start, count, scale, backend):
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("dittune::routed_attention_backward", mutates_args=())
def _backward_op(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, saved: list[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gather.backward(grad_out, grad_lse, *saved, scale)


@_backward_op.register_fake
def _(grad_out, grad_lse, saved, scale):
    return tuple(t.new_empty(t.shape) for t in saved[:3])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    grads = _backward_op(grad_out, grad_lse, list(ctx.saved_tensors), ctx.scale)
    return *grads, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
