"""Rows of roles: inputs of a denoiser call, and the attention calls made of them."""

import pytest
import torch

from dittune.call import AttnCall, Site, TokenLayout, rows_of
from dittune.run import ModelInputs, Run

EXTRA = object()


def inputs(roles=("uncond", "cond"), size=2, **changes):
    rows = size * len(roles)
    kwargs = {
        "sample": torch.arange(rows * 3.0).view(rows, 3),
        "text": torch.arange(rows * 2.0).view(rows, 2),
        "residuals": [torch.arange(float(rows)), torch.arange(float(rows)) + 10],
        "timestep": torch.full((rows,), 7.0),
        "added": {
            "pooled": torch.arange(float(rows)),
            "levels": [torch.arange(rows)],
            "none": None,
        },
        "other": "untouched",
        **changes,
    }
    batched = ("sample", "text", "residuals", "timestep", "added", "absent")
    return ModelInputs(kwargs, roles, batched, Run())


def test_one_more_chunk_and_one_chunk_only():
    given = inputs()
    more = given.plus(EXTRA, like="cond")
    assert more.roles == ("uncond", "cond", EXTRA)
    for name in ("sample", "text", "timestep"):
        old, new = given.kwargs[name], more.kwargs[name]
        assert torch.equal(new, torch.cat([old, old[2:]]))
    assert [t.tolist() for t in more.kwargs["residuals"]] == [
        [0.0, 1.0, 2.0, 3.0, 2.0, 3.0],
        [10.0, 11.0, 12.0, 13.0, 12.0, 13.0],
    ]
    assert more.kwargs["added"]["pooled"].tolist() == [0.0, 1.0, 2.0, 3.0, 2.0, 3.0]
    assert [t.tolist() for t in more.kwargs["added"]["levels"]] == [[0, 1, 2, 3, 2, 3]]
    assert more.kwargs["added"]["none"] is None and len(given.kwargs["added"]["pooled"]) == 4
    assert more.kwargs["other"] == "untouched" and len(given.kwargs["sample"]) == 4
    cond = more.only("cond")
    assert cond.roles == ("cond",) and torch.equal(
        cond.kwargs["sample"], given.kwargs["sample"][2:]
    )
    named = given.only("cond", named=EXTRA)
    assert named.roles == (EXTRA,) and torch.equal(named.kwargs["text"], given.kwargs["text"][2:])
    with pytest.raises(KeyError, match="no 'skip' rows"):
        given.only("skip")


@pytest.mark.parametrize("timestep", [torch.tensor(7.0), torch.tensor([7.0])])
def test_one_timestep_for_all_rows_stays_one(timestep):
    more = inputs(timestep=timestep).plus(EXTRA, like="cond").only(EXTRA)
    assert more.kwargs["timestep"] is timestep and len(more.kwargs["sample"]) == 2
    alone = inputs(("cond",), size=1, timestep=torch.tensor([7.0])).plus(EXTRA, like="cond")
    assert alone.kwargs["timestep"].tolist() == [7.0, 7.0]  # one row: one timestep each


def test_memory_is_kept_apart_even_for_equal_methods():
    run, first, second = Run(), [1], [1]
    run.memory(first).count = 3
    assert run.memory(first).count == 3 and not vars(run.memory(second))


def call(mask=None):
    query, key, value = (torch.randn(6, 4, 5, 2) for _ in range(3))
    options = {} if mask is None else {"attn_mask": mask}
    layout = TokenLayout((0, 3), (3, 5), (1, 1, 3))
    site = Site(0, "joint", "block", 4)
    return AttnCall(
        query, key, value, options, ("uncond", "cond", EXTRA), layout, site, None, core, Run()
    )


def core(call):
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, **call.options
    )


MASKS = [None, (5, 5), (6, 1, 1, 5), (6, 4, 5, 5), (1, 4, 5, 5), (1, 1, 5, 5)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_part_of_a_call_is_part_of_its_result(shape):
    """Whatever the mask of the model is shaped like: by row, by head, by both, or the same."""
    mask = None if shape is None else torch.randn(shape)
    whole = call(mask)
    out = core(whole)
    rows = whole.take_rows(2, 6)
    assert rows.roles == ("cond", EXTRA)
    torch.testing.assert_close(core(rows), out[2:6])
    heads = whole.take_heads(torch.tensor([3, 1]))
    torch.testing.assert_close(core(heads), out[:, [3, 1]])
    both = rows.take_heads(torch.tensor([2]))
    torch.testing.assert_close(core(both), out[2:6, [2]])


def test_rows_of_a_role():
    method = [0]
    assert rows_of("cond", ("uncond", "cond", method), 6) == (2, 4)
    assert rows_of(method, ("uncond", "cond", method), 6) == (4, 6)
    assert rows_of([0], ("uncond", "cond", method), 6) is None  # equal is not the same
    assert rows_of("skip", ("uncond", "cond"), 4) is None
