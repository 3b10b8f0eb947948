"""Each pattern against its definition, written out again cell by cell."""

import math

import pytest
import torch

from dittune.errors import ConfigError
from dittune.patterns import (
    Box,
    Local,
    Neighborhood,
    Radial,
    RadialBlocks,
    SameWindow,
    SlidingTile,
    scale_dit_sequence,
)
from tests.patterns.dense import brute, pattern_mask

GRIDS = [(1, 7, 9), (3, 4, 5), (1, 1, 6), (4, 6, 1)]


@pytest.mark.parametrize("radius", [1, 2, 2.5, 100])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_local(grid, radius):
    def sees(q, k):
        return sum((a - b) ** 2 for a, b in zip(q, k)) < radius**2

    assert torch.equal(pattern_mask(Local(radius), grid), brute(grid, sees))


@pytest.mark.parametrize(("radius", "cells"), [(8, 193), (16, 793), (32, 3205)])
def test_size_of_a_disc(radius, cells):
    centre = torch.tensor([0, 40, 40])
    square = torch.cartesian_prod(torch.arange(1), torch.arange(81), torch.arange(81))
    assert int(Local(radius).allows(centre, square).sum()) == cells


def window_of(i, n, k, s, d, causal):
    """Tokens of one axis that token `i` sees."""
    group = [x for x in range(n) if x % d == i % d]
    at = group.index(i)
    if causal:
        leader = min(at // s * s + s - 1, len(group) - 1)
        return [x for j, x in enumerate(group) if j <= at and leader - j < k]
    centre = min(at // s * s + s // 2, len(group) - 1)
    start = max(0, min(centre - k // 2, len(group) - k))
    return group[start : start + k]


SETTINGS = [
    ((1, 7, 9), (1, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3),
    ((3, 8, 6), (2, 4, 5), (1, 3, 5), (1, 1, 1), (False,) * 3),
    ((5, 7, 11), (2, 3, 3), (2, 1, 2), (2, 2, 3), (False,) * 3),
    ((6, 4, 5), (3, 2, 5), (1, 2, 1), (1, 1, 1), (True, False, False)),
    ((7, 3, 9), (3, 1, 4), (2, 1, 1), (2, 3, 2), (True, False, True)),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_neighborhood(setting):
    grid = setting[0]

    def sees(q, k):
        axes = zip(q, k, *setting)
        return all(b in window_of(a, n, w, s, d, c) for a, b, n, w, s, d, c in axes)

    mask = pattern_mask(Neighborhood(*setting), grid)
    assert torch.equal(mask, brute(grid, sees))
    assert mask.any(1).all()
    if not any(setting[-1]):
        window = setting[1]
        assert mask.sum(1).unique().tolist() == [window[0] * window[1] * window[2]]


def test_neighborhood_at_its_limits():
    grid = (2, 6, 8)
    assert pattern_mask(Neighborhood(grid, grid), grid).all()
    blocked = pattern_mask(Neighborhood(grid, (1, 3, 4), (1, 3, 4)), grid)
    windows = brute(grid, lambda q, k: [a // n for a, n in zip(q, (1, 3, 4))]
                    == [b // n for b, n in zip(k, (1, 3, 4))])  # fmt: skip
    assert torch.equal(blocked, windows)


@pytest.mark.parametrize("grid", [(7, 10, 9), (1, 12, 12), (3, 3, 20)], ids=str)
def test_sliding_tile(grid):
    tile, window = (3, 4, 4), (1, 3, 3)
    tiles = [-(-n // t) for n, t in zip(grid, tile)]
    window = tuple(w if w <= n else 1 for w, n in zip(window, tiles))

    def sees(q, k):
        for a, b, t, n, w in zip(q, k, tile, tiles, window):
            centre = min(max(a // t, w // 2), n - 1 - w // 2)
            if abs(b // t - centre) > w // 2:
                return False
        return True

    mask = pattern_mask(SlidingTile(grid, window, tile), grid)
    assert torch.equal(mask, brute(grid, sees))


def test_box():
    def sees(q, k):
        return q[0] == k[0] and abs(q[1] - k[1]) <= 2 and abs(q[2] - k[2]) <= 1

    assert torch.equal(pattern_mask(Box((2, 5, 7), (0, 2, 1)), (2, 5, 7)), brute((2, 5, 7), sees))


def test_same_window():
    grid, small = (1, 8, 12), (1, 4, 6)

    def number(cell, side):
        return cell[1] // side * 3 + cell[2] // side

    def sees(q, k):
        return abs(number(q, 4) - number(k, 2)) <= 1

    pattern = SameWindow(grid, (1, 4, 4), (1, 2, 2))
    assert torch.equal(pattern_mask(pattern, grid, small), brute(grid, sees, small))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("grid", "least"), [((5, 3, 4), 1), ((9, 2, 30), 8), ((1, 4, 4), 2)])
def test_radial(grid, least, sink):
    per_frame = grid[1] * grid[2]
    power = 1
    while power <= per_frame:
        power *= 2

    def sees(q, k):
        apart = abs(q[0] - k[0])
        place, other = (cell[1] * grid[2] + cell[2] for cell in (q, k))
        if apart <= 1 or (sink and k[0] == 0):
            return True
        halvings = 0
        while apart >> halvings:
            halvings += 1
        width = power / 2**halvings
        if width < 128 and apart % int(128 / width):
            return False
        return abs(place - other) <= max(width * 0.8, least)

    assert torch.equal(pattern_mask(Radial(grid, 0.8, least, sink), grid), brute(grid, sees))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("grid", [(4, 16, 20), (5, 10, 33), (2, 3, 5), (10, 4, 17)], ids=str)
def test_radial_blocks(grid, sink):
    """The published shrinking, on canvases of whole frame pairs."""
    block, frames, size = 64, grid[0], grid[1] * grid[2]
    pattern = Radial(grid, 0.5, block, sink)
    pairs = pattern_mask(pattern, grid).view(frames, size, frames, size)
    blocks = -(-frames * size // block)
    wanted = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            canvas = torch.zeros(blocks * block, blocks * block)
            canvas[i * size : (i + 1) * size, j * size : (j + 1) * size] = pairs[i, :, j]
            attending = canvas.view(blocks, block, blocks, block).sum(1)  # rows, of each column
            there = torch.full((blocks, 1, 1), block)
            there[-1] = (frames * size - 1) % block + 1  # the last block may be short
            share = attending / there
            filled, some = (share > 1 / 3).sum(-1), (share > 0).sum(-1)
            wanted |= filled > 0.6 * some
    assert torch.equal(RadialBlocks(pattern).keep(block, block), wanted)
    assert wanted.any(1).all()


@pytest.mark.parametrize("square", [*range(1, 40), 10**6 + 1])
def test_a_disc_has_no_token_at_its_radius(square):
    assert Local(math.sqrt(square)).limit == square
    assert Local(math.sqrt(square) + 1e-6).limit == square + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Local(0), "radius is above 0"),
        (lambda: Neighborhood((1, 4, 4), (2, 2, 2)), "use window 1 on an axis with one token"),
        (lambda: Neighborhood((1, 4, 4), (1, 2, 2), (1, 3, 1)), "stride <= window"),
        (lambda: Neighborhood((1, 4, 4), (1, 2, 0)), "window is"),
        (lambda: SlidingTile((6, 16, 16), (1, 2, 1)), "window is odd"),
        (lambda: SlidingTile((6, 16, 16), (3, 1, 1)), r"fits the \(1, 2, 2\) tiles"),
        (lambda: Radial((2, 4, 4), 0.0), "decay is above 0"),
        (lambda: Box((1, 4, 4), (0, -1, 0)), "reach is"),
        (lambda: RadialBlocks(Radial((2, 4, 4))).keep(128, 64), "square"),
        (lambda: scale_dit_sequence((1, 64, 66), 8), "multiples of 4"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
