"""`dittune bench attention`: right first, then timed.

Every back-end computes the same plan. Before it is timed, some of its rows are compared with
attention by definition in float64: its error must not exceed twice that of PyTorch's own attention
in the same type. Building the plan, bringing tokens into its order and back, and the kernel are
timed apart. The bound is dense over visited blocks; its share is how much of it becomes true.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dittune.errors import DittuneError
from dittune.kernels.block_sparse import block_sparse_attention
from dittune.pipelines.attention_bench.plot import draw
from dittune.pipelines.attention_bench.rivals import dense_rivals
from dittune.pipelines.attention_bench.shapes import (
    CPU_SHAPES,
    GPU_SHAPES,
    Shape,
    patterns_of,
    plan_of,
    sample_mask,
)
from dittune.pipelines.attention_bench.timing import commit, quantile, times
from dittune.pipelines.bench import hardware
from dittune.pipelines.row_log import RowLog

SAMPLED = 48  # rows that are compared with the definition
LONGEST_DENSE = 20_000  # tokens; a CPU takes minutes beyond that, the comparison is left out there


@dataclass(frozen=True)
class Timing:
    """One line of the table; milliseconds, medians with 20th and 80th percentile."""

    commit: str
    device: str
    torch: str
    threads: str
    shape: str
    tokens: int
    heads: int
    dim: int
    dtype: str
    pattern: str
    backend: str
    block_density: float
    full_share: float
    error: float
    error_allowed: float
    kernel_ms: float
    kernel_p20: float
    kernel_p80: float
    kernel_best: float
    order_ms: float
    plan_ms: float
    tflops: float
    dense: str
    dense_ms: float
    dense_best: float
    speedup: float
    bound_share: float


def bench_attention(cpu: bool, only: str, rounds: int, out: Path) -> dict[str, Any]:
    """Time every shape x pattern x back-end whose `shape/pattern/backend` contains `only`.

    Returns:
        The document of `--json`; rows are appended to `out/attention.csv`, drawn in `out`.

    Raises:
        DittuneError: a back-end is not right; nothing of it is timed.
    """
    device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
    is_cpu = device.type == "cpu"
    log = RowLog(out / "attention.csv", Timing)
    out.mkdir(parents=True, exist_ok=True)
    log.read()  # fails early where the file is another one
    rows, skipped = [], []
    for shape in CPU_SHAPES if is_cpu else GPU_SHAPES:
        names = [f"{shape.name}/{p}/{b}" for p in patterns_of(shape)
                 for b in (("cpu",) if is_cpu else ("triton", "flex"))]  # fmt: skip
        wanted = [name.split("/")[1:] for name in names if only in name]
        if not wanted:
            continue
        torch.manual_seed(0)
        tokens = shape.place(device).tokens
        dtype = torch.float32 if is_cpu else torch.bfloat16
        inputs = [torch.randn(1, shape.heads, tokens, shape.dim, device=device).to(dtype)
                  for _ in range(3)]  # fmt: skip
        dense = _dense(inputs, device, rounds, skipped, shape)
        for pattern, backend in wanted:
            try:
                row = _time(shape, pattern, backend, inputs, dense, rounds)
            except RuntimeError as error:  # cannot run here, or out of memory
                skipped.append(f"{shape.name}/{pattern}/{backend}: {str(error).splitlines()[0]}")
                continue
            log.append([row])
            rows.append(vars(row))
    everything = [vars(row) for row in log.read()]
    (out / "attention.svg").write_text(draw(everything), encoding="utf-8")
    return {"method": __doc__, "hardware": hardware(), "rows": rows, "skipped": skipped}


def _dense(inputs, device, rounds, skipped, shape: Shape) -> tuple[str, list[float]]:
    """The fastest dense attention and its times."""
    found = {}
    if device.type == "cpu" and inputs[0].shape[2] > LONGEST_DENSE:
        return "", []
    for name, attend in dense_rivals(device).items():
        try:
            few = rounds if device.type != "cpu" else min(rounds, 3)
            found[name] = times(lambda attend=attend: attend(*inputs), device, few)
        except Exception as error:  # of packages that are not ours, anything may come
            skipped.append(f"{shape.name}/{name}: {type(error).__name__}: {str(error)[:200]}")
    return min(found.items(), key=lambda item: statistics.median(item[1]), default=("", []))


def _time(shape: Shape, pattern: str, backend: str, inputs, dense, rounds: int) -> Timing:
    device = inputs[0].device
    started = time.perf_counter()
    plan = plan_of(shape, pattern, device)
    plan_ms = 1e3 * (time.perf_counter() - started)
    stats, moved = plan.stats(), plan.to(device)
    order = plan.queries.permutation
    order = order and order.to(device)
    permute = (lambda t: t) if order is None else order.permute
    unpermute = (lambda t: t) if order is None else order.unpermute
    ordered = [permute(t) for t in inputs]

    def attend() -> torch.Tensor:
        lists, block = moved.tensors, plan.block
        return block_sparse_attention(*ordered, lists, block, plan.rule, None, backend)[0]

    error, allowed = _errors(plan, shape, inputs, unpermute(attend()))
    if not error <= allowed:
        raise DittuneError(
            f"{shape.name}/{pattern}/{backend} is wrong: error {error:.2e}, allowed {allowed:.2e}"
        )
    kernel = times(attend, device, rounds)

    def move() -> torch.Tensor:
        query, _, _ = (permute(t) for t in inputs)
        return unpermute(query)

    moving = times(move, device, rounds)
    median, best = statistics.median(kernel), min(kernel)
    visited = stats.block_density * plan.queries.slots * plan.keys.slots
    name, dense_times = dense
    dense_ms = statistics.median(dense_times) if dense_times else float("nan")
    what = hardware()
    return Timing(
        commit=commit(), device=what["device"], torch=what["torch"], threads=what["threads"],
        shape=shape.name, tokens=inputs[0].shape[2], heads=shape.heads, dim=shape.dim,
        dtype=str(inputs[0].dtype).removeprefix("torch."), pattern=pattern, backend=backend,
        block_density=stats.block_density, full_share=stats.full_share, error=error,
        error_allowed=allowed, kernel_ms=median, kernel_p20=quantile(kernel, 0.2),
        kernel_p80=quantile(kernel, 0.8), kernel_best=best,
        order_ms=0.0 if order is None else statistics.median(moving), plan_ms=plan_ms,
        tflops=4e-9 * shape.heads * shape.dim * visited / median, dense=name, dense_ms=dense_ms,
        dense_best=min(dense_times, default=float("nan")), speedup=dense_ms / median,
        bound_share=dense_ms / median * stats.block_density,
    )  # fmt: skip


def _errors(plan, shape: Shape, inputs, out: torch.Tensor) -> tuple[float, float]:
    """Mean error of sampled rows against float64, and twice that of PyTorch's own attention."""
    rows = torch.randperm(out.shape[2])[:SAMPLED].sort()[0]
    mask = sample_mask(plan, shape, rows).to(out.device)
    query, key, value = inputs[0][:, :, rows.to(out.device)], *inputs[1:]
    theirs = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    wrong, other = 0.0, 0.0
    for head in range(shape.heads):  # one at a time: float64 copies of all are too large
        one, keys, values = (t[:, head].double() for t in (query, key, value))
        logits = (one @ keys.transpose(1, 2) * shape.dim**-0.5).masked_fill(~mask, -torch.inf)
        true = logits.softmax(-1) @ values
        wrong += float((out[:, head, rows.to(out.device)] - true).abs().mean())
        other += float((theirs[:, head] - true).abs().mean())
    return wrong / shape.heads, 2 * other / shape.heads + 1e-7


def as_text(result: dict[str, Any]) -> str:
    """The document of `bench_attention` for people."""
    lines = [" ".join(result["hardware"].values())]
    for r in result["rows"]:
        lines.append(
            f"{r['shape']}/{r['pattern']}/{r['backend']}: {r['kernel_ms']:.2f} ms "
            f"({r['kernel_p20']:.2f} to {r['kernel_p80']:.2f}), order {r['order_ms']:.2f}, plan "
            f"{r['plan_ms']:.0f}; {r['tflops']:.3g} TFLOP/s on {r['block_density']:.1%} of blocks; "
            f"dense {r['dense'] or 'not timed'} {r['dense_ms']:.2f} ms: {r['speedup']:.2f} x, "
            f"{r['bound_share']:.0%} of the bound; fastest rounds "
            f"{r['dense_best'] / r['kernel_best']:.2f} x"
        )
    return "\n".join(lines + [f"not timed: {text}" for text in result["skipped"]])
