"""Block counts, densities and speed-up bounds as published, or counted with published code."""

import math

import pytest
import torch

from dittune.patterns import (
    Local,
    Neighborhood,
    Radial,
    RadialBlocks,
    Segment,
    Sequence,
    SlidingTile,
    TokenOrder,
    best_order,
    best_tile,
    local_rules,
    make_plan,
    scale_dit_rules,
    scale_dit_sequence,
    text_segment,
    tile_cost,
)


def blocks(plan):
    (layout,) = plan.layouts
    return len(layout.full) + len(layout.partial), len(layout.full)


def clear_plan(side, radius, tile):
    sequence = Sequence((text_segment(512), Segment("image", TokenOrder((1, side, side), tile))))
    return make_plan(sequence, sequence, local_rules(radius))


@pytest.mark.parametrize(
    ("side", "radius", "tile", "used", "full_percent"),
    [
        (64, 16, None, 744, 36.6),
        (64, 16, (1, 8, 16), 612, 44.4),
        (64, 8, (1, 8, 16), 492, 55.3),
        (128, 8, None, 2904, 35.8),
        (128, 8, (1, 8, 16), 2052, 50.7),
        (128, 16, None, 4768, 21.8),
        (128, 16, (1, 8, 16), 2668, 39.0),
        (256, 8, None, 19248, 21.4),
        (256, 8, (1, 8, 16), 8436, 48.7),
        (256, 16, None, 34896, 11.8),
        (256, 16, (1, 8, 16), 11196, 36.7),
        (256, 32, (1, 8, 16), 23944, 31.5),
        pytest.param(512, 8, None, 92640, 17.7, marks=pytest.mark.slow),
        pytest.param(512, 8, (1, 8, 16), 34260, 47.9, marks=pytest.mark.slow),
        pytest.param(512, 16, (1, 8, 16), 45916, 35.7, marks=pytest.mark.slow),
    ],
)
def test_clear_blocks(side, radius, tile, used, full_percent):
    found, full = blocks(clear_plan(side, radius, tile))
    assert found == used
    assert round(100 * full / found, 1) == full_percent


@pytest.mark.parametrize(
    ("side", "radius", "gflop", "efficiency_percent"),
    [(64, 8, 63.5, 64.1), (64, 16, 86.6, 70.3), (64, 32, 154.1, None), (128, 8, 246.2, 59.6)],
)
def test_clear_work(side, radius, gflop, efficiency_percent):
    """GFLOP of one FLUX layer: 4 x pairs x 3072 channels."""
    stats = clear_plan(side, radius, (1, 8, 16)).stats()
    pairs = stats.token_density * (side * side + 512) ** 2
    assert round(4 * pairs * 3072 / 1e9, 1) == gflop
    if efficiency_percent:
        assert round(100 * stats.tile_efficiency, 1) == efficiency_percent


@pytest.mark.parametrize(
    ("grid", "used", "density"),
    [
        ((1, 128, 128), 4336, 0.1106),
        ((1, 256, 256), 17912, 0.0298),
        pytest.param((1, 512, 512), 72904, 0.00767, marks=pytest.mark.slow),
        pytest.param((1, 512, 1024), 146728, 0.003866, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scale_dit_blocks(grid, used, density):
    sequence = scale_dit_sequence(grid, text=512)
    plan = make_plan(sequence, sequence, scale_dit_rules(sequence), (128, 64), exact=False)
    assert blocks(plan) == (used, used)
    assert plan.rule == "none"
    assert plan.stats().block_density == pytest.approx(density, rel=2e-3)


@pytest.mark.parametrize(
    ("frames", "decay", "used", "sparsity"),
    [
        (18, 1.0, 125656, 0.569081),
        (18, 0.8, 109888, 0.623155),
        (18, 0.5, 98824, 0.661097),
        (18, 0.2, 83728, 0.712867),
        (18, 0.1, 83728, 0.712867),
        (20, 0.8, 126912, 0.647467),
    ],
)
def test_radial_blocks_of_wan(frames, decay, used, sparsity):
    kept = RadialBlocks(Radial((frames, 48, 80), decay, sink=True)).keep(128, 128)
    assert int(kept.sum()) == used
    assert round(1 - kept.float().mean().item(), 6) == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize(("decay", "used"), [(0.95, 226056), (1.0, 241088)])
def test_radial_blocks_of_hunyuan_with_text(decay, used):
    segments = Segment("image", TokenOrder((30, 48, 80))), text_segment(256)
    rules = {(a.name, b.name): True for a in segments for b in segments}
    rules["image", "image"] = RadialBlocks(Radial((30, 48, 80), decay))
    sequence = Sequence(segments)
    plan = make_plan(sequence, sequence, rules)
    assert blocks(plan) == (used, used)
    assert plan.tensors["row_order"].shape == (1, 902)


@pytest.mark.parametrize(
    ("frames", "sink", "sparsity"),
    [(64, False, 0.8224), (128, False, 0.8912), (41, True, 0.7401)],
)
def test_radial_blocks_where_frames_are_no_whole_blocks(frames, sink, sparsity):
    kept = RadialBlocks(Radial((frames, 45, 80), sink=sink)).keep(128, 128)
    assert kept.any(1).all() and kept.any(0).all()
    whole = frames * 45 * 80 // 128  # the published mask has no last, short block
    kept = kept[:whole, :whole]
    assert round(1 - kept.float().mean().item(), 4) == sparsity


@pytest.mark.parametrize("grid", [(5, 3, 7), (4, 4, 8), (1, 3, 3), (9, 1, 5), (7, 9, 20)], ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_radial_blocks_are_counted_without_a_matrix(grid, sink):
    for block in (4, 8, 128):
        rule = RadialBlocks(Radial(grid, 0.5, block, sink))
        assert rule.count(block) == int(rule.keep(block, block).sum())


@pytest.mark.parametrize("last", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_radial_blocks_grow_like_n_log_n(last):
    """16 to 1,024 frames of 720p: `a n log n + b n` fits within 10 %, and better than powers do."""
    frames = 2.0 ** torch.arange(4, math.log2(last) + 1, dtype=torch.float64)
    counts = [RadialBlocks(Radial((int(n), 45, 80))).count(128) for n in frames]
    counts = torch.tensor(counts, dtype=torch.float64)

    def error(growth):
        """Largest relative error of the best mixture with linear growth."""
        basis = torch.stack([growth, frames], 1) / counts[:, None]
        ones = torch.ones(len(counts), 1, dtype=torch.float64)
        best = torch.linalg.lstsq(basis, ones).solution
        return float((basis @ best - 1).abs().max())

    found = {"n log n": error(frames * frames.log2()), "n^1.5": error(frames**1.5)}
    found["n^2"] = error(frames**2)
    print(dict(zip(frames.int().tolist(), counts.int().tolist())), found)
    assert found["n log n"] < 0.1 and found["n log n"] == min(found.values())
    assert last == 128 or found["n^1.5"] > 0.1


HUNYUAN, COSMOS, FLUX_4K = (30, 48, 80), (16, 44, 80), (1, 256, 256)


@pytest.mark.parametrize(
    ("grid", "tiles", "window", "stride", "visits", "bounds", "full_percent"),
    [
        (HUNYUAN, ((4, 8, 8), (2, 8, 8)), (18, 24, 24), (1, 1, 1), (275, 900), (3.27, 5.24), 15.4),
        (HUNYUAN, ((2, 8, 8), (2, 8, 8)), (18, 24, 24), (1, 1, 1), (250, 900), (3.6, 5.44), 16.6),
        (HUNYUAN, ((2, 8, 8), (2, 8, 8)), (18, 24, 24), (16, 8, 8), (81, 900), (11.11,) * 2, 100),
        (HUNYUAN, ((2, 8, 8), (2, 8, 8)), (30, 40, 40), (1, 32, 8), (375, 900), (2.4, 2.4), 100),
        (FLUX_4K, ((1, 16, 8),) * 2, (1, 80, 80), (1, 1, 1), (77, 512), (6.65, 7.51), 49.5),
        (FLUX_4K, ((1, 16, 8),) * 2, (1, 80, 80), (1, 16, 16), (50, 512), (10.24, 10.24), 100),
        (COSMOS, ((4, 4, 8),) * 2, (16, 24, 16), (1, 1, 1), (84, 440), (5.24, 6.09), 36.8),
        (COSMOS, ((2, 8, 8),) * 2, (16, 24, 16), (1, 1, 1), (120, 480), (4.0, 5.14), 18.9),
        (COSMOS, ((4, 4, 8),) * 2, (16, 24, 16), (1, 8, 16), (48, 440), (9.17, 9.17), 100),
    ],
)
def test_neighborhood_bounds(grid, tiles, window, stride, visits, bounds, full_percent):
    cost = tile_cost(Neighborhood(grid, window, stride), grid, *tiles)
    assert (cost.worst, cost.total) == visits
    assert (round(cost.bound, 2), round(cost.mean_bound, 2)) == bounds
    assert round(100 * cost.full_share, 1) == full_percent


def test_nothing_to_visit_bounds_nothing():
    cost = tile_cost(~Local(99), (1, 8, 8), (1, 4, 4))
    assert cost.worst == 0 and cost.bound == cost.mean_bound == math.inf


def test_neighborhood_tiles_in_a_cube():
    cost = tile_cost(Neighborhood((48, 48, 48), (11, 11, 11)), (48, 48, 48), (4, 4, 4))
    full, visited = cost.full_share * cost.mean / cost.total, cost.mean / cost.total
    assert round(100 * full, 3) == 0.092
    assert round(100 * (visited - full), 2) == 5.18


@pytest.mark.parametrize(
    ("grid", "tile", "window", "percent"),
    [
        ((48, 48, 48), (4, 4, 4), (3, 3, 3), 1.5625),
        ((48, 48, 48), (4, 4, 4), (5, 5, 5), 7.2338),
        (HUNYUAN, (6, 8, 8), (3, 3, 3), 9.0),
        (HUNYUAN, (6, 8, 8), (5, 5, 5), 41.6667),
    ],
)
def test_sliding_tile_density(grid, tile, window, percent):
    pattern = SlidingTile(grid, window, tile)
    sequence = Sequence((Segment("image", pattern.order(64)),), 64)
    stats = make_plan(sequence, sequence, {("image", "image"): pattern}, (64, 64)).stats()
    assert round(100 * stats.token_density, 4) == percent
    assert stats.token_density == stats.block_density
    assert stats.full_share == stats.tile_efficiency == 1


@pytest.mark.parametrize(
    ("pattern", "grid", "block"),
    [
        (Local(8), (1, 64, 64), 128),
        (Local(6), (1, 30, 45), 64),
        (Neighborhood((3, 20, 28), (3, 9, 9)), (3, 20, 28), 64),
        (Neighborhood((1, 24, 40), (1, 8, 16), (1, 8, 8)), (1, 24, 40), 64),
    ],
)
def test_the_simulator_predicts_plans_and_finds_the_best(pattern, grid, block):
    def used(order):
        sequence = Sequence((Segment("image", order),), block)
        return blocks(make_plan(sequence, sequence, {("image", "image"): pattern}, (block,) * 2))

    best = best_tile(pattern, grid, block)
    cost = tile_cost(pattern, grid, best, block=block)
    found, _ = used(best_order(pattern, grid, block))
    tokens = grid[0] * grid[1] * grid[2]
    assert cost.work == found * block**2 / tokens**2
    assert found <= used(TokenOrder(grid))[0]
    for tile in ((1, 8, block // 8), (1, 4, block // 4), (1, 16, block // 16)):
        assert found <= used(TokenOrder(grid, tile, pad_to=block))[0]


def test_best_tile_of_published_cases():
    strided = Neighborhood(HUNYUAN, (18, 24, 24), (16, 8, 8))
    assert tile_cost(strided, HUNYUAN, best_tile(strided, HUNYUAN)).full_share == 1
    assert sorted(best_tile(Local(16), (1, 256, 256))) == [1, 8, 16]


@pytest.mark.parametrize("grid", [(3, 13, 11), (1, 9, 30)], ids=str)
def test_counting_by_axis_equals_counting_pairs(grid):
    pattern = Neighborhood(grid, (1, 5, 7), (1, 2, 3))
    tiles = (2, 4, 4), (1, 3, 8)
    assert tile_cost(pattern, grid, *tiles) == tile_cost(pattern | pattern, grid, *tiles)


def test_small_grids_stay_row_major():
    assert best_order(Local(2), (1, 8, 8), 128) == TokenOrder((1, 8, 8))


def test_a_grid_that_fills_no_block_well_has_the_fullest_tiles():
    """Video of 3 x 4 x 6 tokens: sides that divide it make 48 of 64 tokens at most."""
    pattern = Neighborhood((3, 4, 6), (2, 3, 3))
    tile = best_tile(pattern, (3, 4, 6), 64)
    assert tile[0] * tile[1] * tile[2] == 48
    assert best_order(pattern, (3, 4, 6), 64).tile == tile
