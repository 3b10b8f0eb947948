"""Random plans on every back-end that runs here, gradients included, against float64.

The error may be twice that of PyTorch's own attention under the same mask in the same type. Memory
is poisoned with NaN, so that what is not written is found out.
"""

import random

import pytest
import torch
import torch.nn.functional as F

from dittune.kernels.block_sparse import block_sparse_attention
from dittune.patterns import (
    Box,
    GivenBlocks,
    Local,
    Neighborhood,
    Segment,
    Sequence,
    TokenOrder,
    make_plan,
    text_segment,
)
from tests.patterns.dense import expand

CASES, SAMPLE = 2000, 12
CUDA = torch.cuda.is_available()
BACKENDS = ("triton", "flex") if CUDA else ("cpu", "reference")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_pattern(draw, grid):
    kind = draw.choice(["disc", "box", "window", "ring", "all"])
    if kind == "disc":
        return Local(draw.uniform(0.5, 6))
    if kind == "box":
        return Box(grid, tuple(draw.randrange(n) for n in grid))
    if kind == "window":
        window = tuple(draw.randint(1, n) for n in grid)
        stride = tuple(draw.randint(1, k) for k in window)
        causal = tuple(draw.random() < 0.3 for _ in grid)
        return Neighborhood(grid, window, stride, causal=causal)
    if kind == "ring":
        return Local(draw.uniform(2, 6)) & ~Local(draw.uniform(0.5, 2))
    return True


def random_plan(draw):
    """Text before or behind, coarse keys, padded tiles, curves, blocks that are not square."""
    smallest = 64 if CUDA else 16
    block = (draw.choice([1, 2]) * smallest, draw.choice([1, 2]) * smallest)
    grid = draw.choice([1, 1, 2, 3]), draw.randint(1, 13), draw.randint(1, 13)
    tile = tuple(draw.randint(1, n) for n in grid)
    order = TokenOrder(grid, draw.choice([None, tile]), draw.choice(["rows", "hilbert"]))
    if order.tile and draw.random() < 0.3:
        order = TokenOrder(grid, (1, 4, 4), pad_to=max(block))
    if draw.random() < 0.15:
        sequence = Sequence((Segment("image", TokenOrder(grid)),), max(block))
        shape = [-(-sequence.slots // size) for size in block]
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(draw.randrange(999)))
        rules = {("image", "image"): GivenBlocks(kept < draw.random())}
        return make_plan(sequence, sequence, rules, block)
    parts = [Segment("image", order)]
    if draw.random() < 0.6:
        parts.insert(draw.randrange(2), text_segment(draw.randint(1, 40)))
    keys = list(parts)
    if draw.random() < 0.4:
        keys.append(Segment("coarse", TokenOrder((1, 1, draw.randint(1, 30)))))
    rules = {(q.name, k.name): draw.random() < 0.8 for q in parts for k in keys}
    rules["image", "image"] = random_pattern(draw, grid)
    queries, keys = (Sequence(tuple(each), max(block)) for each in (parts, keys))
    return make_plan(queries, keys, rules, block, draw.random() < 0.8, draw.random() < 0.3)


def results(tensors, mask, attend):
    """Output and gradients of rows that see anything, in float64 on the CPU."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = attend(*tensors)
    seen = mask.any(-1).to(out.device)
    weights = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    loss = (out * weights)[:, :, seen].float().sum() if seen.any() else (out * 0).sum()
    grads = torch.autograd.grad(loss, tensors)
    return [out.detach()[:, :, seen].double().cpu(), *(g.double().cpu() for g in grads)]


def check(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    plan = random_plan(draw)
    mask = expand(plan, 0)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    batch, heads, dim = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([8, 16, 24])
    device = "cuda" if CUDA else "cpu"
    lengths = plan.queries.slots, plan.keys.slots, plan.keys.slots
    rounded = [torch.randn(batch, heads, n, dim).to(dtype) for n in lengths]

    def dense(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.device))

    truth = results([t.double() for t in rounded], mask, dense)
    theirs = results([t.to(device) for t in rounded], mask, dense)
    moved = plan.to(device)
    for backend in BACKENDS:
        ours = results(
            [t.to(device) for t in rounded],
            mask,
            lambda *t, backend=backend: block_sparse_attention(
                *t, moved.tensors, plan.block, plan.rule, backend=backend
            )[0],
        )
        names = "output", "query", "key", "value"
        for name, true, other, mine in zip(names, truth, theirs, ours):
            assert mine.isfinite().all(), f"{seed} {backend} {name}"
            if not true.numel():
                continue
            floor = torch.finfo(torch.float32).eps * max(1.0, true.abs().max().item())
            allowed = 2 * (other - true).abs().mean() + floor
            error = (mine - true).abs().mean()
            assert error <= allowed, f"{seed} {backend} {name} {dtype}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_a_sample(seed):
    check(seed)


@pytest.mark.slow
def test_two_thousand():
    for seed in range(SAMPLE, CASES):
        check(seed)
