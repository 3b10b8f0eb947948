"""Plans and tensors that the tests of the block-sparse kernels share."""

import torch

from dittune.kernels.block_sparse.lists import unpack
from dittune.patterns import (
    Box,
    GivenBlocks,
    Local,
    Neighborhood,
    Segment,
    Sequence,
    TokenOrder,
    local_rules,
    make_plan,
    per_head,
    text_segment,
)
from tests.patterns.dense import expand


def image_plan(pattern, order, block=(16, 16), **options):
    sequence = Sequence((Segment("image", order),), max(block))
    return make_plan(sequence, sequence, {("image", "image"): pattern}, block, **options)


def _disc():
    """Text of awkward length in front, padded tiles, pooled keys: all kinds of blocks."""
    image = Segment("image", TokenOrder((1, 9, 10), (1, 4, 4), pad_to=16))
    queries = Sequence((text_segment(21), image), 16)
    pooled = Segment("pooled", TokenOrder((1, 3, 4)))
    keys = Sequence((text_segment(21, is_variable=True), image, pooled), 16)
    return make_plan(queries, keys, local_rules(3, pooled=True), (16, 16))


def _empty_rows():
    kept = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    kept[1], kept[4], kept[:, 2] = False, False, False
    kept[2] = True
    queries = Sequence((Segment("image", TokenOrder((1, 9, 8))),), 16)
    keys = Sequence((Segment("image", TokenOrder((1, 8, 5))),), 16)
    return make_plan(queries, keys, {("image", "image"): GivenBlocks(kept)}, (16, 16))


def _per_head():
    order, grid = TokenOrder((2, 8, 7), (1, 4, 4), pad_to=16), (2, 8, 7)
    patterns = Local(2), Box(grid, (1, 2, 0)), Local(100)
    return per_head([image_plan(pattern, order) for pattern in patterns], [2, 0, 1])


PLANS = {
    "disc, text, pooled": _disc,
    "window": lambda: image_plan(
        Neighborhood((3, 6, 7), (2, 3, 5), (1, 1, 2)), TokenOrder((3, 6, 7), (1, 4, 4))
    ),
    "bits": lambda: image_plan(Local(4) & ~Local(2), TokenOrder((1, 7, 11), curve="hilbert")),
    "hidden elements": lambda: image_plan(Local(2) & ~Local(2.5), TokenOrder((1, 5, 5))),
    "empty rows": _empty_rows,
    "one short block": lambda: image_plan(Local(100), TokenOrder((1, 1, 5))),
    "one token": lambda: image_plan(Local(1), TokenOrder((1, 1, 1))),
    "wide keys": lambda: image_plan(Local(2.5), TokenOrder((1, 8, 13)), (16, 32)),
    "wide queries": lambda: image_plan(Local(2.5), TokenOrder((1, 8, 13)), (32, 16)),
    "per head": _per_head,
}


def task_of(plan, scale=0.3):
    return unpack(plan.tensors, plan.block, plan.rule, scale)


def tensors_of(plan, dtype=torch.float64, batch=2, dim=8, heads=3, **options):
    """Query, key, value."""
    lengths = plan.queries.slots, plan.keys.slots, plan.keys.slots
    shapes = [(batch, heads, length, dim) for length in lengths]
    return [torch.randn(shape, dtype=torch.float64).to(dtype, **options) for shape in shapes]


def brute_force(query, key, value, plan, scale=0.3, key_count=None):
    """Attention by definition, from the plan's lists as `expand` reads them."""
    heads = plan.heads * query.shape[1] if len(plan.heads) == 1 else plan.heads
    mask = torch.stack([expand(plan, number, key_count) for number in heads])
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0)
    return weights @ value, torch.logsumexp(logits, dim=-1)
