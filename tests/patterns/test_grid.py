"""Token orders are permutations that keep neighbours together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dittune.errors import ConfigError
from dittune.patterns import Permutation, TokenOrder
from dittune.patterns.grid import hilbert_index

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
TILES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
ORDERS = st.builds(
    TokenOrder,
    GRIDS,
    st.none() | TILES,
    st.sampled_from(["rows", "hilbert"]),
    st.sampled_from([1, 4, 32]),
)


@settings(max_examples=60, deadline=None)
@given(ORDERS)
def test_permute_then_unpermute_is_the_identity(order):
    permutation = Permutation.from_slots(order.slots())
    tokens = torch.randn(2, 3, order.tokens, 4)
    permuted = permutation.permute(tokens)
    assert torch.equal(permutation.unpermute(permuted), tokens)
    slots = order.slots()
    assert torch.equal(permuted[:, :, slots >= 0], tokens[:, :, slots[slots >= 0]])
    assert not permuted[:, :, slots < 0].any()
    along_one = permutation.permute(tokens.transpose(1, 2), dim=1)
    assert torch.equal(along_one.transpose(1, 2), permuted)


@settings(max_examples=60, deadline=None)
@given(ORDERS)
def test_each_tile_is_a_run_padded_to_a_multiple(order):
    tile = order.tile or order.grid
    place = order.coordinates()
    real = place[:, 0] >= 0
    assert real.sum() == order.tokens == len(place[real].unique(dim=0))
    many = [-(-n // t) for n, t in zip(order.grid, tile)]
    outer = place // torch.tensor(tile)
    number = (outer[:, 0] * many[1] + outer[:, 1]) * many[2] + outer[:, 2]
    assert (number[real].diff() >= 0).all()
    first = {int(n): i for i, n in reversed(list(enumerate(number))) if real[i]}
    assert all(i % order.pad_to == 0 for i in first.values())


def test_a_clipped_tile_order_slot_by_slot():
    order = TokenOrder((1, 3, 3), tile=(1, 2, 2), pad_to=4)
    assert order.slots().tolist() == [0, 1, 3, 4, 2, 5, -1, -1, 6, 7, -1, -1, 8, -1, -1, -1]
    assert order.coordinates()[5].tolist() == [0, 1, 2]
    assert order.coordinates()[6].tolist() == [-1, -1, -1]


def test_rows_are_the_order_of_the_model():
    assert TokenOrder((2, 3, 5)).slots().tolist() == list(range(30))


@pytest.mark.parametrize("side", [1, 2, 4, 16])
def test_hilbert_steps_to_a_neighbouring_cell(side):
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    index = hilbert_index(row.flatten(), column.flatten(), side)
    assert index.sort().values.tolist() == list(range(side * side))
    order = index.argsort()
    steps = row.flatten()[order].diff().abs() + column.flatten()[order].diff().abs()
    assert (steps == 1).all()


def test_hilbert_starts_as_published():
    """Cells (row, column) of the curve on 2 x 2 and the first quarter on 4 x 4."""
    path = TokenOrder((1, 2, 2), curve="hilbert").coordinates()[:, 1:].tolist()
    assert path == [[0, 0], [1, 0], [1, 1], [0, 1]]
    path = TokenOrder((1, 4, 4), curve="hilbert").coordinates()[:4, 1:].tolist()
    assert path == [[0, 0], [0, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 4, 4),), r"grid is \(frames, height, width\)"),
        (((1, 4, 4), (1, 4)), "tile is"),
        (((1, 4, 4), None, "zigzag"), "'rows' or 'hilbert', got 'zigzag'"),
        (((1, 4, 4), None, "rows", 0), "pad_to is at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TokenOrder(*arguments)
