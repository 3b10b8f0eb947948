"""A plan says exactly what its pattern says: against pair-by-pair masks on awkward grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dittune.errors import ConfigError
from dittune.patterns import (
    Box,
    GivenBlocks,
    Local,
    Neighborhood,
    Radial,
    Segment,
    Sequence,
    SlidingTile,
    TokenOrder,
    local_rules,
    make_plan,
    per_head,
    text_segment,
)
from tests.patterns.dense import expand, natural, pattern_mask

GRIDS = [(1, 7, 9), (3, 5, 6), (1, 1, 1), (2, 1, 13), (1, 16, 16)]
ORDERS = {
    "rows": lambda grid: TokenOrder(grid),
    "tiles": lambda grid: TokenOrder(grid, (2, 3, 4), pad_to=16),
    "loose tiles": lambda grid: TokenOrder(grid, (1, 4, 2)),
    "hilbert": lambda grid: TokenOrder(grid, curve="hilbert"),
}
PATTERNS = {
    "local": lambda grid: Local(2.5),
    "neighborhood": lambda grid: Neighborhood(grid, tuple(min(n, 3) for n in grid)),
    "dilated": lambda grid: Neighborhood(
        grid, tuple(-(-n // 4) for n in grid), dilation=tuple(min(n, 2) for n in grid)
    ),
    "tiles": lambda grid: SlidingTile(grid, (1, 1, 1), (2, 4, 4)),
    "radial": lambda grid: Radial(grid, 0.5, least=2, sink=True),
    "both": lambda grid: Local(4) & ~Local(1.5),
    "either": lambda grid: Box(grid, (0, 1, 1)) | Radial(grid, 0.5, least=1),
    "nothing": lambda grid: Local(2) & ~Local(2),
}


def image(order, align=16):
    return Sequence((Segment("image", order),), align)


def image_plan(pattern, order, block=(16, 16), **options):
    sequence = image(order)
    return make_plan(sequence, sequence, {("image", "image"): pattern}, block, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lists_say_what_the_pattern_says(grid, order, pattern):
    pattern = PATTERNS[pattern](grid)
    wanted = pattern_mask(pattern, grid)
    for block, as_bits in (((16, 16), False), ((16, 8), False), ((8, 16), True)):
        plan = image_plan(pattern, ORDERS[order](grid), block, as_bits=as_bits)
        mask = expand(plan)
        assert torch.equal(natural(plan, mask), wanted)
        assert torch.equal(expand(plan, side="column"), mask)
        check_kinds(plan, mask)
        assert plan.stats().token_density == pytest.approx(wanted.float().mean().item())


def check_kinds(plan, mask):
    """Full blocks are full, element blocks need their rule, nothing listed is empty."""
    real = torch.zeros_like(mask)
    rows = plan.queries.permutation.inverse if plan.queries.permutation else slice(None)
    columns = plan.keys.permutation.inverse if plan.keys.permutation else slice(None)
    real[rows] = 1
    exists = torch.zeros(mask.shape[1], dtype=torch.bool)
    exists[columns] = True
    real &= exists
    for blocks, element in (
        (plan.layouts[0].full, None),
        (plan.layouts[0].partial, plan.layouts[0].slot >= 0),
    ):
        for n, (q, k) in enumerate(blocks.tolist()):
            span = slice(q * plan.block[0], (q + 1) * plan.block[0])
            other = slice(k * plan.block[1], (k + 1) * plan.block[1])
            seen, there = mask[span, other] & real[span, other], real[span, other]
            assert seen.any()
            if element is None:
                assert exists[other].all() and exists[other].numel() == plan.block[1]
            assert torch.equal(seen, there) != bool(element is not None and element[n])


@pytest.mark.parametrize("pattern", ["local", "both", "dilated"])
def test_inexact_plans_use_every_touched_block_whole(pattern):
    grid = (2, 7, 9)
    pattern, order = PATTERNS[pattern](grid), TokenOrder(grid, (1, 4, 4), pad_to=16)
    exact, whole = image_plan(pattern, order), image_plan(pattern, order, exact=False)
    assert whole.rule == "none" and exact.rule != "none"
    used = [{tuple(b) for x in p.layouts for b in (*x.full.tolist(), *x.partial.tolist())}
            for p in (exact, whole)]  # fmt: skip
    assert used[0] == used[1]
    more = natural(whole, expand(whole))
    assert (more | ~pattern_mask(pattern, grid)).all()
    assert more.sum() > pattern_mask(pattern, grid).sum()


SMALL = st.sampled_from(sorted(PATTERNS))


@settings(max_examples=15, deadline=None)
@given(SMALL, SMALL, st.sampled_from(sorted(ORDERS)))
def test_algebra(left, right, order):
    grid = (2, 5, 7)
    a, b = PATTERNS[left](grid), PATTERNS[right](grid)
    mask_a, mask_b = pattern_mask(a, grid), pattern_mask(b, grid)
    for pattern, wanted in (
        (a & b, mask_a & mask_b),
        (a | b, mask_a | mask_b),
        (~a, ~mask_a),
        (~(a & b), ~mask_a | ~mask_b),
    ):
        plan = image_plan(pattern, ORDERS[order](grid))
        assert torch.equal(natural(plan, expand(plan)), wanted)
    assert ~~a == a and (a & b) == (a & b) and hash(a | b) == hash(a | b)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [1, 16, 21])
def test_text_and_pooled_segments(text, text_first):
    grid, pooled = (1, 9, 10), (1, 3, 4)
    segments = (text_segment(text), Segment("image", TokenOrder(grid, (1, 4, 4), pad_to=16)))
    segments = segments if text_first else segments[::-1]
    queries = Sequence(segments, 16)
    keys = Sequence((*segments, Segment("pooled", TokenOrder(pooled))), 16)
    plan = make_plan(queries, keys, local_rules(3, pooled=True), (16, 16))
    disc = pattern_mask(Local(3), grid)
    t, i, p = text, 90, 12
    wanted = torch.ones(t + i, t + i + p, dtype=torch.bool)
    at = slice(t, t + i) if text_first else slice(0, i)
    wanted[at, at] = disc
    wanted[slice(0, t) if text_first else slice(i, None), -p:] = False
    assert torch.equal(natural(plan, expand(plan)), wanted)
    assert torch.equal(expand(plan), expand(plan, side="column"))
    assert plan.rule == "disc"


def test_two_rules_become_bits():
    order = TokenOrder((1, 8, 8), (1, 4, 4))
    sequence = Sequence((Segment("a", order), Segment("b", order)), 16)
    rules = {("a", "a"): Local(2), ("b", "b"): Box((1, 8, 8), (0, 1, 0)),
             ("a", "b"): True, ("b", "a"): False}  # fmt: skip
    plan = make_plan(sequence, sequence, rules, (16, 16))
    assert plan.rule == "bits"
    mask = natural(plan, expand(plan))
    assert torch.equal(mask[:64, :64], pattern_mask(Local(2), (1, 8, 8)))
    assert torch.equal(mask[64:, 64:], pattern_mask(Box((1, 8, 8), (0, 1, 0)), (1, 8, 8)))
    assert mask[:64, 64:].all() and not mask[64:, :64].any()


@pytest.mark.parametrize("numbers", [[3, 1], [0, 0], [21, 40]])
def test_valid_keys_at_run_time(numbers):
    segments = text_segment(21, is_variable=True), Segment("image", TokenOrder((1, 4, 8)))
    sequence = Sequence(segments, 16)
    rules = {(a.name, b.name): True for a in segments for b in segments}
    plan = make_plan(sequence, sequence, rules, (16, 16))
    count = plan.key_count({"text": torch.tensor(numbers)})
    assert count.shape == (2, 4) and count.dtype == torch.int32
    for row, number in zip(count, numbers):
        mask = natural(plan, expand(plan, key_count=row))
        assert mask[:, :21].sum(1).unique().tolist() == [min(number, 21)]
        assert mask[:, 21:].all()
    assert torch.equal(plan.key_count({"text": 3}), plan.key_count({"text": torch.tensor([3])}))
    with pytest.raises(ConfigError, match="'image' is not among the variable segments"):
        plan.key_count({"image": 3})


def test_heads_with_plans_of_their_own():
    order = TokenOrder((2, 8, 8), (1, 4, 4), pad_to=16)
    local, wide = image_plan(Local(2), order), image_plan(Local(5), order)
    box = image_plan(Box((2, 8, 8), (1, 2, 0)), order)
    same_rule = per_head([local, wide], [0, 1, 1, 0])
    mixed = per_head([wide, box, local], [0, 1, 2])
    assert same_rule.rule == "disc" and mixed.rule == "bits"
    for plan, patterns in (
        (same_rule, [Local(2), Local(5)]),
        (mixed, [Local(5), Box((2, 8, 8), (1, 2, 0)), Local(2)]),
    ):
        for number, pattern in enumerate(patterns):
            mask = expand(plan, number)
            assert torch.equal(natural(plan, mask), pattern_mask(pattern, (2, 8, 8)))
            assert torch.equal(expand(plan, number, side="column"), mask)
    whole = image_plan(Local(5), order, exact=False)
    assert same_rule.exact and not per_head([local, whole], [0, 1]).exact
    densities = [plan.stats().token_density for plan in (local, wide)]
    assert same_rule.stats().token_density == pytest.approx(sum(densities) / 2)
    with pytest.raises(ConfigError, match="heads name plans 0 to 1"):
        per_head([local, wide], [0, 2])
    with pytest.raises(ConfigError, match="on the same sequences"):
        per_head([local, image_plan(Local(2), order, (8, 8))], [0, 1])


def test_given_blocks():
    kept = torch.rand(4, 4) < 0.4
    kept[2] = False
    plan = image_plan(GivenBlocks(kept), TokenOrder((1, 7, 9)))
    wanted = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[:63, :63]
    assert torch.equal(natural(plan, expand(plan)), wanted)
    with pytest.raises(ConfigError, match=r"a \(4, 3\) grid"):
        image_plan(GivenBlocks(kept[:, :3]), TokenOrder((1, 7, 9)))


def test_rows_with_most_blocks_come_first():
    plan = image_plan(Local(3), TokenOrder((1, 16, 16), (1, 4, 4)))
    lengths = sum(plan.tensors[f"row_{kind}_start"][0].diff() for kind in ("full", "partial"))
    assert (lengths[plan.tensors["row_order"][0].long()].diff() <= 0).all()
    assert plan.stats().balance == pytest.approx((lengths.float().mean() / lengths.max()).item())


def test_picture():
    plan = image_plan(Local(2), TokenOrder((1, 8, 9), (1, 4, 4), pad_to=16))
    drawn = plan.draw(cell=2)
    assert drawn.shape == (2 * 6, 2 * 6, 3) and drawn.dtype == torch.uint8
    visited = (drawn[::2, ::2] != 255).any(-1)
    assert visited.float().mean().item() == pytest.approx(plan.stats().block_density)


def test_plans_are_cached_by_geometry():
    order = TokenOrder((1, 8, 8), (1, 4, 4))
    first, second = image_plan(Local(2), order), image_plan(Local(2), order)
    assert first is second
    assert image_plan(Local(3), order) is not first
    kept = GivenBlocks(torch.ones(4, 4, dtype=torch.bool))
    assert image_plan(kept, order) is not image_plan(kept, order)


def test_errors():
    sequence = Sequence((text_segment(20), Segment("image", TokenOrder((1, 8, 8)))), 16)
    everything = {("text", "image"): True, ("text", "text"): True, ("image", "text"): True}
    with pytest.raises(ConfigError, match=r"no rule for \[\('image', 'image'\)\]"):
        make_plan(sequence, sequence, everything, (16, 16))
    with pytest.raises(ConfigError, match=r"rules for .*'pooled'"):
        make_plan(sequence, sequence, {("image", "pooled"): True}, (16, 16))
    rules = everything | {("image", "image"): Local(3)}
    with pytest.raises(ConfigError, match="inside a block of 64; align the sequence"):
        make_plan(sequence, sequence, rules, (64, 64))
    padded = TokenOrder((1, 8, 6), (1, 4, 3), pad_to=16)
    with pytest.raises(ConfigError, match="padding inside a block of 32; pad its tiles"):
        image_plan(Local(3), padded, (32, 32))
    with pytest.raises(ConfigError, match="different names"):
        Sequence((text_segment(4), text_segment(5)))
    with pytest.raises(ConfigError, match="align is at least 1"):
        Sequence((text_segment(4),), 0)
    with pytest.raises(ConfigError, match="at least 1 token on each side"):
        make_plan(sequence, sequence, rules, (0, 16))
    with pytest.raises(ConfigError, match="is for another grid"):
        image_plan(Box((1, 8, 8), (0, 1, 1)), TokenOrder((1, 4, 4)))
    with pytest.raises(ConfigError, match="at least one, got none"):
        per_head([], [])
