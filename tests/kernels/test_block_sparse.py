"""Every path of block-sparse attention on a CPU against attention by definition, in float64."""

import pytest
import torch
import torch.nn.functional as F

from dittune.kernels.block_sparse import (
    block_sparse_attention,
    block_sparse_reference,
    merge_attention,
)
from dittune.kernels.block_sparse import cpu as cpu_path
from dittune.kernels.block_sparse.op import block_sparse_op
from dittune.kernels.block_sparse.reference import dense_mask
from dittune.patterns import GivenBlocks, Local, TokenOrder
from tests.kernels.plans import PLANS, brute_force, image_plan, task_of, tensors_of
from tests.patterns.dense import expand


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is full of NaN: who forgets to write a row is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]()


def attend(query, key, value, plan, backend="cpu", scale=0.3):
    return block_sparse_attention(
        query, key, value, plan.tensors, plan.block, plan.rule, scale, backend
    )


def test_reference_mask_is_the_plan(plan):
    mask = dense_mask(task_of(plan), plan.queries.slots, plan.keys.slots)
    for head, number in enumerate(plan.heads):
        assert torch.equal(mask[0, head], expand(plan, number))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward(plan, backend):
    tensors = tensors_of(plan)
    out, lse = attend(*tensors, plan, backend)
    wanted, wanted_lse = brute_force(*tensors, plan)
    assert (out - wanted).abs().max() < 1e-10
    empty = wanted_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (lse - wanted_lse)[~empty].abs().sum() < 1e-8
    assert (out[empty] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients(plan, backend):
    """Through the output and through the LSE; rows without keys give no gradient, and no NaN."""
    tensors = [t.requires_grad_() for t in tensors_of(plan)]
    wanted, wanted_lse = brute_force(*tensors, plan)
    seen = wanted_lse.detach() > -torch.inf
    weights = torch.randn_like(wanted), torch.randn_like(wanted_lse)
    lost = (wanted * weights[0]).sum(-1)[seen].sum() + (wanted_lse * weights[1])[seen].sum()
    wanted = [grad.nan_to_num(0) for grad in torch.autograd.grad(lost, tensors)]
    out, lse = attend(*tensors, plan, backend)
    loss = (out * weights[0]).sum() + (lse * weights[1])[seen].sum()
    grads = torch.autograd.grad(loss, tensors)
    for grad, other in zip(grads, wanted):
        assert (grad - other).abs().max() < 1e-10


def test_rows_in_several_parts(monkeypatch, plan):
    monkeypatch.setattr(cpu_path, "LOGITS_AT_ONCE", 1)
    tensors = [t.requires_grad_() for t in tensors_of(plan)]
    results = []
    for backend in ("cpu", "reference"):
        out, lse = attend(*tensors, plan, backend)
        loss = out.square().sum() + lse[lse > -torch.inf].sum()
        results.append((out, lse.exp(), *torch.autograd.grad(loss, tensors)))
    for ours, wanted in zip(*results):
        assert (ours - wanted).abs().max() < 1e-10


def test_gradcheck():
    plan = PLANS["disc, text, pooled"]()
    tensors = [t.requires_grad_() for t in tensors_of(plan, batch=1, dim=2)]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, plan), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(plan, dtype):
    """Not worse than twice dense attention in the same type, against float64."""
    rounded = tensors_of(plan, dtype)
    truth, _ = brute_force(*[t.double() for t in rounded], plan)
    out, lse = attend(*rounded, plan)
    assert out.dtype == dtype and lse.dtype == torch.float32
    mask = torch.stack([expand(plan, n) for n in (plan.heads * 3)[:3]])
    dense = F.scaled_dot_product_attention(*rounded, attn_mask=mask, scale=0.3)
    seen = mask.any(-1).expand(out.shape[:3])
    errors = [(x.double() - truth)[seen].abs() for x in (out, dense)]
    assert errors[0].numel() == 0 or errors[0].max() <= 2 * errors[1].max() + 1e-7


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strided_tensors(layout):
    """As models give them: `[B, S, H, D]` seen as `[B, H, S, D]`, and parts of a fused tensor."""
    plan = PLANS["window"]()
    tensors = tensors_of(plan)
    if layout == "transposed":
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    else:
        strided = list(torch.stack(tensors, dim=3).unbind(3))
    assert not strided[0].is_contiguous()
    out, _ = attend(*strided, plan)
    assert torch.equal(out, attend(*tensors, plan)[0])


def test_all_blocks_is_dense_attention():
    plan = image_plan(Local(100), TokenOrder((1, 8, 12)))
    tensors = tensors_of(plan)
    out, _ = attend(*tensors, plan, scale=None)
    assert (out - F.scaled_dot_product_attention(*tensors)).abs().max() < 1e-12
    few, _ = attend(*tensors, image_plan(Local(2), TokenOrder((1, 8, 12))), scale=None)
    assert (out - few).abs().max() > 0.1


def test_absent_blocks_are_not_touched():
    """NaN in keys that no row lists stays there; a masked dense path would spread it."""
    kept = torch.tensor([[True, False, True], [True, False, False], [False, False, True]])
    plan = image_plan(GivenBlocks(kept), TokenOrder((1, 4, 12)))
    query, key, value = (t.requires_grad_() for t in tensors_of(plan))
    with torch.no_grad():
        key[:, :, 16:32] = torch.nan
        value[:, :, 16:32] = torch.nan
    out, lse = attend(query, key, value, plan)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    assert not any(t.isnan().any() for t in (out, lse, *grads))
    assert (grads[1][:, :, 16:32] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_valid_keys_differ_in_a_batch(backend):
    plan = PLANS["disc, text, pooled"]()
    count = plan.key_count({"text": torch.tensor([3, 17])})
    tensors = tensors_of(plan)
    other = plan.tensors | {"key_count": count}
    out, _ = block_sparse_attention(*tensors, other, plan.block, plan.rule, 0.3, backend)
    for row in range(2):
        wanted, _ = brute_force(*(t[row, None] for t in tensors), plan, key_count=count[row])
        assert (out[row] - wanted[0]).abs().max() < 1e-10


def test_merge_is_attention_over_the_union():
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    query.requires_grad_()
    parts = []
    for keys in (slice(0, 2), slice(2, 6), slice(6, 7)):
        logits = query @ key[:, :, keys].transpose(-1, -2) * 8**-0.5
        parts.append((logits.softmax(-1) @ value[:, :, keys], logits.logsumexp(-1)))
    nothing = torch.zeros_like(query), torch.full((2, 3, 7), -torch.inf, dtype=torch.float64)
    out, lse = merge_attention(*zip(*parts, nothing))
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (out - dense).abs().max() < 1e-12
    assert (lse - (query @ key.transpose(-1, -2) * 8**-0.5).logsumexp(-1)).abs().max() < 1e-12
    grads = [
        torch.autograd.grad(x.square().sum(), query, retain_graph=True)[0] for x in (out, dense)
    ]
    assert (grads[0] - grads[1]).abs().max() < 1e-12
    empty, no_lse = merge_attention(*zip(nothing, nothing))
    assert (empty == 0).all() and (no_lse == -torch.inf).all()


def test_merged_halves_of_a_plan_are_the_plan():
    """Two plans with disjoint blocks, gradients included: one row sees keys in one half only."""
    kept = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1]]).bool()
    left = torch.tensor([True, True, False])
    order = TokenOrder((1, 5, 9))
    plans = [image_plan(GivenBlocks(kept & half), order) for half in (left, ~left)]
    tensors = [t.requires_grad_() for t in tensors_of(plans[0])]
    merged, _ = merge_attention(*zip(*(attend(*tensors, plan) for plan in plans)))
    whole, _ = attend(*tensors, image_plan(GivenBlocks(kept), order))
    assert (merged - whole).abs().max() < 1e-12
    grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (merged, whole)]
    for ours, wanted in zip(*grads):
        assert (ours - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["disc, text, pooled", "per head", "bits"])
def test_opcheck(name):
    plan = PLANS[name]()
    tensors = [t.requires_grad_() for t in tensors_of(plan)]
    arguments = list(task_of(plan).lists), list(plan.block), plan.rule, 0.3, "cpu"
    torch.library.opcheck(block_sparse_op, (*tensors, *arguments))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend):
    torch.use_deterministic_algorithms(False)  # the compiler has its own settings for it
    plan = PLANS["window"]()
    tensors = [t.requires_grad_() for t in tensors_of(plan)]

    def block(query, key, value):
        out, lse = attend(query * 2, key, value, plan, backend="auto")
        return out.transpose(1, 2).flatten(2).sin() + lse.mean()

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for function in (block, compiled):
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for eager, ours in zip(*results):
        assert (eager - ours).abs().max() < 1e-10
    torch._dynamo.reset()


CHANGES = {
    "query is .* got": lambda q, k, v: (q[0], k, v),
    "same batch, heads and head dim": lambda q, k, v: (q[:, :1], k, v),
    "one floating type, got torch.float16": lambda q, k, v: (q.half(), k, v),
    "80 queries and 126 keys make 5 x 8": lambda q, k, v: (q[:, :, :80], k, v),
}


@pytest.mark.parametrize("message", CHANGES)
def test_inputs_that_do_not_fit(message):
    plan = PLANS["window"]()
    with pytest.raises(ValueError, match=message):
        attend(*CHANGES[message](*tensors_of(plan)), plan)


def test_plans_that_do_not_fit():
    plan = PLANS["per head"]()
    query, key, value = tensors_of(plan)
    with pytest.raises(ValueError, match="for 3 heads and 1 batch rows, the query has 2"):
        attend(query[:, :2], key[:, :2], value[:, :2], plan)
    missing = {name: t for name, t in plan.tensors.items() if name != "bits"}
    with pytest.raises(ValueError, match=r"see \['bits'\]"):
        block_sparse_attention(query, key, value, missing, plan.block, plan.rule)
    with pytest.raises(ValueError, match=r"the rule is one of .* got 'ring'"):
        block_sparse_attention(query, key, value, plan.tensors, plan.block, "ring")


def test_a_back_end_that_cannot_run_says_why():
    plan = PLANS["window"]()
    tensors = tensors_of(plan)
    for backend, reason in (("triton", "triton|CUDA tensors, got cpu"), ("flex", "got cpu")):
        with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run: .*({reason})"):
            attend(*tensors, plan, backend)
    with pytest.raises(ValueError, match=r"auto or one of .* got 'cuda'"):
        attend(*tensors, plan, "cuda")


def test_reference_takes_a_task():
    plan = PLANS["bits"]()
    tensors = tensors_of(plan)
    out, _ = block_sparse_reference(*tensors, task_of(plan))
    assert torch.equal(out, attend(*tensors, plan, "reference")[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name in PLANS if name != "one token"])
def test_flex_mask(name):
    """Uncompiled, the mask function alone must be right; the lists are compared as lists."""
    from torch.nn.attention.flex_attention import flex_attention

    from dittune.kernels.block_sparse.flex import flex_block_mask

    plan = PLANS[name]()
    query, key, value = tensors_of(plan)
    mask = flex_block_mask(task_of(plan), 3, (query.shape[2], key.shape[2]))
    out = flex_attention(query, key, value, block_mask=mask, scale=0.3)
    assert (out - brute_force(query, key, value, plan)[0]).abs().max() < 1e-10
    layout = plan.layouts[plan.heads[0]]
    used = torch.zeros(plan.tensors["row_order"].shape[1], plan.tensors["column_order"].shape[1])
    used[layout.full[:, 0], layout.full[:, 1]] = 1
    used[layout.partial[:, 0], layout.partial[:, 1]] = 1
    assert torch.equal(mask.to_dense()[0, 0].float(), used)
