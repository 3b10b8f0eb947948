"""Groups of rows with keys of their own, against dense attention under a mask of rows x keys."""

import math

import pytest
import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError
from dittune.run import Run
from dittune.subjects.row_groups import Foreign, PicturePlan, attend_by_plans, row_group

GRID = (1, 2, 3)
LAYOUTS = {
    "image first": (TokenLayout((0, 6), (6, 10), GRID), 10),
    "text first": (TokenLayout((4, 10), (0, 4), GRID), 10),
    "reference after": (TokenLayout((4, 10), (0, 4), GRID), 13),
    "no text": (TokenLayout((0, 6), (6, 6), GRID), 6),
}
PICTURES, ROLES = 3, ("uncond", "cond")


def core(call):
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, **call.options
    )


def call_of(name, dtype=torch.float64, roles=ROLES, options=None):
    layout, length = LAYOUTS[name]
    generator = torch.Generator().manual_seed(2)
    shape = (len(roles) * PICTURES, 2, length, 5)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    site = Site(0, "joint", "there", 2)
    return AttnCall(q, k, v, options or {}, roles, layout, site, None, core, Run())


def dense(call, picture, allowed, foreign, bias=None):
    """One picture's attention, `[C, H, Sq, D]`, by a formula of its own.

    `allowed` is bool `[Sq, keys]` over own keys, then those of each (picture, tokens) in `foreign`.
    """
    outs = []
    for role in range(len(call.roles)):
        rows = role * PICTURES
        key, value = [call.key[rows + picture]], [call.value[rows + picture]]
        for other, tokens in foreign:
            places = [call.layout.image[0] + int(t) for t in tokens]
            key.append(call.key[rows + other][:, places])
            value.append(call.value[rows + other][:, places])
        key, value = torch.cat(key, 1).double(), torch.cat(value, 1).double()
        scores = torch.einsum("hqd,hkd->hqk", call.query[rows + picture].double(), key) / 5**0.5
        if bias is not None:
            scores = scores + bias
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,hkd->hqd", weights, value))
    return torch.stack(outs)


@pytest.mark.parametrize("roles", [("cond",), ROLES])
@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_are_the_dense_mask(name, roles):
    call = call_of(name, roles=roles)
    length, generator = call.query.shape[2], torch.Generator().manual_seed(4)
    group = torch.randint(3, (length,), generator=generator)
    foreign = [(2, torch.tensor([1, 4])), (0, torch.tensor([5, 0, 3]))]
    extra = {0: torch.tensor([], dtype=torch.int64), 1: torch.tensor([0, 1]),
             2: torch.tensor([1, 2, 4])}  # fmt: skip
    allowed = torch.zeros(length, length + 5, dtype=torch.bool)
    groups, bias = [], torch.zeros(length, length + 5, dtype=torch.float64)
    for number in range(3):
        rows = group == number
        own = torch.rand(length, generator=generator) < 0.7
        own[0] = True
        allowed[rows] = torch.cat([own, torch.zeros(5, dtype=torch.bool)])
        allowed[rows.nonzero(), length + extra[number]] = True
        added = torch.randn(length, generator=generator, dtype=torch.float64) if number else None
        if added is not None:
            bias[rows, :length] = added
        if rows.any():
            groups.append(
                row_group(rows, own, call.layout, length + extra[number], added, number / 2)
            )
        bias[rows, length:] = number / 2
    plan = PicturePlan(1, tuple(groups), tuple(Foreign(p, t) for p, t in foreign))
    out = attend_by_plans(call, [plan], core).unflatten(0, (len(roles), PICTURES))
    wanted = dense(call, 1, allowed, foreign, bias)
    torch.testing.assert_close(out[:, 1], wanted, atol=1e-12, rtol=1e-12)
    plain = core(call).unflatten(0, (len(roles), PICTURES))
    assert torch.equal(out[:, [0, 2]], plain[:, [0, 2]])
    assert (out[:, 1] - plain[:, 1]).abs().max() > 1e-3


def test_single_precision_is_as_good_as_the_dense_mask_in_it():
    call = call_of("image first", torch.float32)
    own = torch.ones(10, dtype=torch.bool)
    groups = (row_group(own, own, call.layout, torch.arange(10, 13)),)
    plan = PicturePlan(0, groups, (Foreign(1, torch.tensor([0, 2, 5])),))
    out = attend_by_plans(call, [plan], core).unflatten(0, (2, PICTURES))[:, 0]
    wanted = dense(call, 0, torch.ones(10, 13) > 0, [(1, torch.tensor([0, 2, 5]))])
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_group_knows_where_its_text_is(name):
    layout, length = LAYOUTS[name]
    own = torch.arange(length) % 3 != 1
    group = row_group(torch.ones(length) > 0, own, layout, torch.tensor([length, length + 1]))
    text = [int(k) for k in group.keys[slice(*group.text)]]
    assert text == [k for k in range(*layout.text) if k % 3 != 1]
    assert group.keys[-2:].tolist() == [length, length + 1]


def test_without_a_plan_everything_is_bitwise_plain():
    call = call_of("text first")
    assert torch.equal(attend_by_plans(call, [], core), core(call))


def test_a_masked_model_is_refused():
    call = call_of("no text", options={"attn_mask": torch.ones(1, 1, 1, 6) > 0})
    with pytest.raises(ConfigError, match="masks its attention"):
        attend_by_plans(call, [], core)


def test_pictures_are_taken_from_every_chunk():
    call = call_of("no text", options={"attn_mask": torch.rand(6, 1, 6, 6)})
    some = call.take_pictures([2, 0])
    assert some.roles == call.roles
    rows = [2, 0, 5, 3]
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(some, name), getattr(call, name)[rows])
    assert torch.equal(some.options["attn_mask"], call.options["attn_mask"][rows])
