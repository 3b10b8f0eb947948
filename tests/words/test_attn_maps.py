"""Capture of maps of words, against maps formed whole; and what is made of them."""

import math

import pytest
import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import SeamError, SelectionError
from dittune.run import Run
from dittune.words import attn_maps
from dittune.words.attn_maps import (
    MapMean,
    WordMaps,
    otsu,
    smooth,
    text_maps,
    word_maps,
    word_sites,
)
from dittune.words.map_losses import soft_ios
from dittune.words.tokens import PromptWords

GRID = (1, 3, 5)
LAYOUTS = {
    "image first": (TokenLayout((0, 15), (15, 19), GRID), "joint", 19, 19),
    "text first": (TokenLayout((4, 19), (0, 4), GRID), "joint", 19, 19),
    "reference after": (TokenLayout((4, 19), (0, 4), GRID), "joint", 25, 25),
    "cross": (TokenLayout((0, 15), (0, 7), GRID), "cross", 15, 7),
}


def call(name, dtype=torch.float64, options=None, batch=2):
    layout, kind, queries, keys = LAYOUTS[name]
    generator = torch.Generator().manual_seed(3)
    q, k = (
        torch.randn(batch, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, keys)
    )
    site = Site(0, kind, "there", 3)
    return AttnCall(q, k, k, options or {}, ("cond",), layout, site, None, None, Run())


def whole(given, scale=8**-0.5, mask=0.0):
    """The full map by a formula of its own, then the text columns of the image rows."""
    layout = given.layout
    scores = torch.einsum("bhqd,bhkd->bhqk", given.query.double(), given.key.double()) * scale
    weights = (scores + mask).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    part = weights[:, :, slice(*layout.image), slice(*layout.text)].mean(1)  # (B, N, T)
    return torch.stack([part[..., t].reshape(-1, *GRID[1:]) for t in range(part.shape[-1])], 1)


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_are_the_text_columns_of_the_whole_softmax(name, at_once, monkeypatch):
    given = call(name)
    monkeypatch.setattr(attn_maps, "PROBABILITIES", at_once * 2 * 3 * given.key.shape[2])
    maps = text_maps(given)
    torch.testing.assert_close(maps, whole(given), rtol=1e-12, atol=1e-12)
    total = maps.sum(1)
    assert (total < 0.99).all() if given.site.kind == "joint" else (total > 0.999).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_scale_and_the_mask_of_the_call_count(name):
    queries, keys = (call(name).query.shape[2], call(name).key.shape[2])
    added = torch.randn(2, 1, queries, keys, dtype=torch.float64)
    given = call(name, options={"scale": 0.7, "attn_mask": added})
    torch.testing.assert_close(text_maps(given), whole(given, 0.7, added))
    seen = torch.rand(1, 1, 1, keys) > 0.3
    seen[..., 0] = True
    given = call(name, options={"attn_mask": seen})
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(text_maps(given), whole(given, mask=bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_captured_in_single(dtype):
    given = call("cross", dtype)
    maps = text_maps(given)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), whole(given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [4, 10**6])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_finite_differences(name, at_once, monkeypatch):
    given = call(name, batch=1)
    monkeypatch.setattr(attn_maps, "PROBABILITIES", at_once * 3 * given.key.shape[2])

    def maps(query, key):
        return text_maps(given._replace(query=query, key=key))

    inputs = (given.query.clone().requires_grad_(), given.key.clone().requires_grad_())
    assert torch.autograd.gradcheck(maps, inputs)


def test_blocks_keep_no_logits_for_the_way_back(monkeypatch):
    """Saved for the gradient: less than the whole map, which is saved if it is one block."""
    saved = []
    for at_once in (10**6, 2):
        given = call("reference after", batch=1)
        monkeypatch.setattr(attn_maps, "PROBABILITIES", at_once * 3 * 25)
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            text_maps(given._replace(query=given.query.clone().requires_grad_()))
        saved.append(size)
    assert saved[1] < 3 * 15 * 25 <= saved[0]


def test_the_mean_over_layers_forgets_what_it_gave():
    mean = MapMean()
    for value in (1.0, 2.0, 6.0):
        mean.add(torch.full((1, 2, 3, 3), value))
    assert mean.take().unique().tolist() == [3.0]
    with pytest.raises(SeamError, match="no map was seen"):
        mean.take()


def sites(kinds_and_stages, sharp=()):
    return [Site(i, k, f"b{i}", 2, s, i in sharp) for i, (k, s) in enumerate(kinds_and_stages)]


def test_the_sites_asked_for_or_those_the_model_recommends():
    joint = sites([("joint", 0)] * 6, sharp=(2, 3))
    assert [s.layer for s in word_sites(joint, (), "a_star")] == [2, 3]
    assert [s.layer for s in word_sites(joint, (5, 0), "a_star")] == [0, 5]
    other = [Site(0, "self", "s", 2)]
    assert word_sites([*other, *joint], (1,), "a_star") == joint[1:2]


def test_sites_that_cannot_be_had():
    with pytest.raises(SelectionError, match=r"a_star needs attention to text .* has self"):
        word_sites([Site(0, "self", "s", 2)], (), "a_star")
    cross = sites([("cross", 1), ("cross", 2), ("cross", 2)])
    with pytest.raises(SelectionError, match=r"no cross layer 3; it has 0\.\.2"):
        word_sites(cross, (1, 3), "a_star")
    with pytest.raises(SelectionError, match=r"one resolution, got 0 at stage 1, 1 at stage 2"):
        word_sites(cross, (0, 1), "a_star")


WORDS = PromptWords((1, 2, 4), (((1,), (2, 4)),))


def test_in_cross_attention_all_but_the_first_and_the_last_token_are_rivals():
    maps = torch.rand(6, 2, 3)
    picture = word_maps(maps, WORDS, "cross")
    assert picture.rivals == (1, 2, 3, 4) and torch.equal(picture.maps, maps)
    assert torch.equal(picture.of(WORDS.words), torch.stack([maps[1], maps[2] + maps[4]]))


def test_in_joint_attention_maps_are_shares_of_the_prompts_tokens():
    maps = torch.rand(6, 2, 3)
    picture = word_maps(maps, WORDS, "joint")
    assert picture.rivals == (1, 2, 4)
    torch.testing.assert_close(picture.maps.sum(0), torch.ones(2, 3))
    torch.testing.assert_close(picture.maps[4], maps[4] / (maps[1] + maps[2] + maps[4]))
    assert not picture.maps[[0, 3, 5]].any()


def test_tempering_is_a_softmax_of_a_hundred_times_the_probabilities_and_makes_a_copy():
    maps = torch.tensor([0.9, 0.03, 0.02, 0.01])[:, None, None]
    kept = maps.clone()
    picture = WordMaps(maps, WORDS, (1, 2)).tempered()
    assert picture.maps.flatten().tolist() == pytest.approx(
        [0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0]
    )
    assert torch.equal(maps, kept)


def test_the_kernel_of_the_papers():
    point = torch.zeros(1, 5, 7)
    point[0, 2, 3] = 1
    blurred = smooth(point)[0]
    assert blurred[2, 3].item() == pytest.approx(0.3319, abs=5e-5)
    assert blurred[1, 3].item() == blurred[2, 4].item() == pytest.approx(0.1221, abs=5e-5)
    assert blurred[1, 2].item() == pytest.approx(0.0449, abs=5e-5)
    corner = torch.zeros(1, 5, 7)
    corner[0, 1, 1] = 1
    assert smooth(corner)[0, 0, 0].item() == pytest.approx(4 * 0.0449, abs=2e-4)  # mirrored
    torch.testing.assert_close(smooth(torch.ones(2, 1, 8)), torch.ones(2, 1, 8))


def test_otsu_by_hand():
    values = torch.tensor([[0.0, 0.1, 0.1], [0.9, 1.0, 0.8]])
    assert otsu(values).tolist() == [[False] * 3, [True] * 3]
    assert torch.equal(otsu(values * 7 - 3), otsu(values))  # brought to [0, 1] first
    assert not otsu(torch.full((2, 3), 0.4)).any()


def test_otsu_maximises_the_variance_between_the_classes():
    torch.manual_seed(2)
    values = torch.cat([torch.randn(60), torch.randn(40) * 0.5 + 4]).view(10, 10).double()
    scaled = (values - values.min()) / (values.max() - values.min())

    def between(high):
        low = ~high
        gap = scaled[high].mean() - scaled[low].mean()
        return high.double().mean() * low.double().mean() * gap**2

    best = max(between(scaled > t) for t in torch.linspace(0.01, 0.99, 197))
    assert between(otsu(values)) >= 0.999 * best


def test_soft_intersection_over_sum():
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    y = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    assert soft_ios(x, y).item() == pytest.approx(2 / 9)
    assert soft_ios(x, x).item() == pytest.approx(0.5)
    assert soft_ios(x * 0, x * 0).item() == 0
