"""The Triton kernels against attention by definition: on a GPU if there is one, else interpreted.

The interpreter must be asked for before Triton is imported, hence in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dittune.kernels.block_sparse import block_sparse_attention
from dittune.kernels.triton_support import HAS_TRITON, IS_INTERPRETED
from dittune.patterns import Local, TokenOrder
from tests.kernels.plans import PLANS, brute_force, image_plan, tensors_of

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
runs = pytest.mark.skipif(
    not torch.cuda.is_available() and not IS_INTERPRETED, reason="runs in the interpreter's process"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = ("disc, text, pooled", "window", "bits", "empty rows", "per head")


def everything(tensors, plan, attend):
    """Output, LSE where a row has keys, and the gradients through both."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = attend(*tensors, plan)
    seen = brute_force(*(t.double().cpu() for t in tensors), plan)[1] > -torch.inf
    seen = seen.to(lse.device)
    assert torch.equal(seen, lse > -torch.inf)
    weights = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape)
    # Rows without keys are NaN in the gradient by definition: leave them out of the loss.
    loss = (out * weights).sum(-1)[seen].sum() + (lse * weights[..., 0])[seen].sum()
    grads = torch.autograd.grad(loss, tensors)
    results = [out.detach(), lse.detach()[seen], *(grad.nan_to_num(0) for grad in grads)]
    return [result.double().cpu() for result in results]


def ours(query, key, value, plan):
    tensors = plan.to(query.device).tensors
    return block_sparse_attention(query, key, value, tensors, plan.block, plan.rule, 0.3, "triton")


def compare(plan, dtype, dim, batch=1):
    """Not worse than twice attention by definition in the same type, both against float64."""
    rounded = tensors_of(plan, dtype, batch, dim, heads=len(plan.heads))
    truth = everything([t.double() for t in rounded], plan, brute_force)
    same_type = everything(rounded, plan, brute_force)
    found = everything([t.to(DEVICE) for t in rounded], plan, ours)
    floor = 20 * torch.finfo(torch.float32).eps
    for name, true, other, mine in zip(
        ("out", "lse", "query", "key", "value"), truth, same_type, found
    ):
        size = max(1.0, true.abs().max().item()) if true.numel() else 1.0  # 1: the inputs' scale
        allowed = 2 * (other - true).abs().sum() / max(1, true.numel()) + floor * size
        error = (mine - true).abs().sum() / max(1, true.numel())
        assert error <= allowed, f"{name}: mean error {error:.1e}, allowed {allowed:.1e}"


@runs
@pytest.mark.parametrize("name", QUICK)
def test_float32(name):
    compare(PLANS[name](), torch.float32, dim=16)


@runs
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PLANS) - set(QUICK)))
def test_more_plans(name):
    compare(PLANS[name](), torch.float32, dim=16)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_an_odd_head_dim(dtype):
    compare(image_plan(Local(2.5), TokenOrder((1, 5, 9))), dtype, dim=24)


@runs
@pytest.mark.parametrize("as_bits", [False, True])
def test_tiles_smaller_than_blocks(as_bits, monkeypatch):
    from dittune.kernels.block_sparse import triton as launcher

    for table in ("FORWARD_FP32", "QUERY_GRADIENT_FP32", "KEY_GRADIENT_FP32"):
        monkeypatch.setattr(launcher, table, {64: launcher.Tile(16, 16, 4, 1)})
    plan = image_plan(Local(3.5), TokenOrder((1, 7, 11)), (32, 32), as_bits=as_bits)
    compare(plan, torch.float32, dim=16)


@runs
def test_strides_and_key_counts_of_a_batch():
    plan = PLANS["disc, text, pooled"]()
    count = plan.key_count({"text": torch.tensor([3, 17])})
    tensors = [
        t.transpose(1, 2).contiguous().transpose(1, 2)
        for t in tensors_of(plan, torch.float32, dim=16, heads=1)
    ]
    given = plan.tensors | {"key_count": count}
    given = {name: t.to(DEVICE) for name, t in given.items()}
    moved = [t.to(DEVICE) for t in tensors]
    out, _ = block_sparse_attention(*moved, given, plan.block, plan.rule, 0.3, "triton")
    assert out.stride() == moved[0].stride()
    for row in range(2):
        wanted, _ = brute_force(*(t[row, None] for t in tensors), plan, key_count=count[row])
        assert (out[row].cpu() - wanted[0]).abs().max() < 1e-5


def run(arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parents[2],
        timeout=3000,
    )


@pytest.mark.skipif(torch.cuda.is_available() or IS_INTERPRETED, reason="the tests above run here")
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_the_interpreter(slow):
    chosen = ["-m", "slow"] if slow else []
    names = ["-k", "not interpreter and not compile", "-p", "no:cacheprovider"]
    done = run(["-m", "pytest", "-q", __file__, *chosen, *names], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    expected = len(PLANS) - len(QUICK) if slow else len(QUICK) + 5
    assert re.search(rf"^{expected} passed", done.stdout, re.M), done.stdout[-500:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "chunk_kernel"]
)
def test_compiles_for_hopper(kernel):
    """Fits into shared memory, uses tensor cores for 16-bit types, hardly spills."""
    done = run(["-m", "tests.kernels.cubins", kernel])
    assert done.returncode == 0, done.stderr[-4000:]
    for line in done.stdout.splitlines():
        print(line)
        found = json.loads(line)
        assert found["shared"] <= 232448
        assert found["registers"] <= 255
        assert found["stack"] <= (128 if found["rule"] == "bits" else 16), line
        assert (found["tensor_cores"] > 0) == (found["type"] != "float32")
