"""Attention to chosen chunks: every path against attention by definition, in float64.

Triton runs on a GPU if there is one, else interpreted, in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dittune.kernels.routed_attention import gather, routed_attention
from dittune.kernels.triton_support import HAS_TRITON, IS_INTERPRETED

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
runs = pytest.mark.skipif(
    not HAS_TRITON or not (HAS_GPU or IS_INTERPRETED), reason="runs in the interpreter's process"
)
SIZES = {  # lengths of chunks; one of a single key, one whose keys are all padding
    "even": (24, 24, 24),
    "odd": (5, 70, 1, 33, 9),
    "one": (20,),
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is full of NaN: who forgets to write a row is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def task(name, dtype=torch.float64, dim=8, batch=2, heads=3, queries=37):
    """Query, key, value, choice, starts and counts; some queries choose nothing."""
    sizes = torch.tensor(SIZES[name])
    random = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(batch, heads, rows, dim, generator=random, dtype=torch.float64).to(dtype)
        for rows in (queries, int(sizes.sum()), int(sizes.sum()))
    ]
    chosen = torch.rand(batch, heads, len(sizes), queries, generator=random) < 0.4
    chosen[0, 0, :, 4] = False
    chosen[1, 1, 0], chosen[0, 2, 0] = False, True
    start = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    count = torch.stack([sizes, (sizes - 7).clamp(min=0)]).int()
    return *tensors, chosen, start, count


def brute_force(query, key, value, chosen, start, count, scale=0.3):
    """One query, one key at a time."""
    seen = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    for b in range(len(query)):
        for c, first in enumerate(start[:-1].tolist()):
            for k in range(first, first + int(count[b % len(count), c])):
                seen[b, :, :, k] = chosen[b, :, c]
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0) @ value, logits.logsumexp(-1)


def check(found, wanted, tolerance):
    out, lse = (t.double().cpu() for t in found)
    empty = wanted[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out - wanted[0]).abs().max() < tolerance
    assert (lse - wanted[1])[~empty].abs().max() < tolerance
    assert (out[empty] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("name", SIZES)
def test_forward(name, backend):
    inputs = task(name)
    check(routed_attention(*inputs, 0.3, backend), brute_force(*inputs), 1e-12)


def test_without_the_fused_kernel_and_in_parts(monkeypatch):
    inputs = task("odd")
    monkeypatch.setattr(gather, "_fused", gather._plain)
    monkeypatch.setattr(gather, "LOGITS_AT_ONCE", 100)
    check(routed_attention(*inputs, 0.3, "gather"), brute_force(*inputs), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_gradients_through_both_results(backend):
    """By finite differences would be slow: by the gradients of the definition."""
    query, key, value, *rest = task("odd")
    results = []
    for attend in (brute_force, lambda *a: routed_attention(*a, 0.3, backend)):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out, lse = attend(*leaves, *rest)
        has_keys = lse > -torch.inf
        weights = torch.sin(torch.arange(out.numel())).view(out.shape)
        loss = (out * weights).sum(-1)[has_keys].sum() + (lse * weights[..., 0])[has_keys].sum()
        results.append(torch.autograd.grad(loss, leaves))
    for wanted, found in zip(*results):
        assert (found - wanted.nan_to_num(0)).abs().max() < 1e-10


def test_skipped_keys_are_never_read():
    query, key, value, chosen, start, _ = task("even", dtype=torch.float32)
    chosen[:, :, 1] = False
    key[:, :, 24:48] = value[:, :, 24:48] = torch.nan
    out, lse = routed_attention(query, key, value, chosen, start)
    assert not out.isnan().any() and not lse.isnan().any()


def test_it_is_one_operator_for_compilers():
    inputs = task("odd", dtype=torch.float32)
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    check(compiled(*inputs, 0.3), brute_force(*(t.double() for t in inputs[:3]), *inputs[3:]), 1e-5)
    from dittune.kernels.routed_attention.api import _op

    leaves = [t.requires_grad_() for t in inputs[:3]]
    torch.library.opcheck(_op, (*leaves, *inputs[3:], 0.3, "gather"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(2, 3, 37, 9)}, "query is"),
        ({1: torch.zeros(2, 3, 118, 8, dtype=torch.float16)}, "one floating type"),
        ({3: torch.zeros(2, 3, 4, 37, dtype=torch.bool)}, "chosen is bool"),
        ({5: torch.zeros(3, 5, dtype=torch.int32)}, "count is"),
        ({4: torch.zeros(6)}, "int32"),
    ],
)
def test_what_it_refuses(change, match):
    inputs = list(task("odd", dtype=torch.float32))
    for i, tensor in change.items():
        inputs[i] = tensor
    with pytest.raises(ValueError, match=match):
        routed_attention(*inputs)
    with pytest.raises(ValueError, match="auto or one of"):
        routed_attention(*task("odd"), backend="flex")


@pytest.mark.skipif(HAS_GPU or IS_INTERPRETED, reason="it can run here")
def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="cannot run: "):
        routed_attention(*task("one"), backend="triton")


@runs
@pytest.mark.parametrize(
    ("name", "dtype", "dim"),
    [
        ("even", torch.float32, 16),
        ("odd", torch.float32, 16),
        ("one", torch.float32, 8),
        ("odd", torch.float16, 24),
        ("odd", torch.bfloat16, 24),
    ],
)
def test_triton(name, dtype, dim):
    """Strided inputs; not worse than twice the definition in the same type, against float64."""
    query, key, value, chosen, start, count = task(name, dtype, dim)
    strided = [
        t.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE) for t in (query, key, value)
    ]
    rest = [t.to(DEVICE) for t in (chosen, start, count)]
    out, lse = routed_attention(*strided, *rest, 0.3, "triton")
    truth = brute_force(*(t.double() for t in (query, key, value)), chosen, start, count)
    same = routed_attention(query, key, value, chosen, start, count, 0.3, "reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    allowed = 2 * (same[0].double() - truth[0]).abs().mean() + 3e-6
    assert (out.double().cpu() - truth[0]).abs().mean() <= allowed
    check((out, lse), truth, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.skipif(not HAS_TRITON or HAS_GPU or IS_INTERPRETED, reason="the tests above run here")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", __file__, "-k", "test_triton",
         "-p", "no:cacheprovider"],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2], timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^5 passed", done.stdout, re.M), done.stdout[-500:]
