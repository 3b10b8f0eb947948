"""Regions against a dense mask of who may see which words."""

import pytest
import torch

import dittune
from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.methods.regions import Regions
from dittune.run import Run
from dittune.subjects.row_groups import attend_by_plans
from tests.subjects.test_row_groups import core
from tests.tiny import FAMILIES, latents

TWO = "0,0,0.5,1: red circle; 0.5,0,1,1: blue square"
WORDS = ((1,), (3, 4))  # on a text axis of 6
LEFT, RIGHT = [0, 1, 4, 5], [2, 3, 6, 7]  # tokens of a grid of 2 x 4
KINDS = {
    "image first": ("joint", TokenLayout((0, 8), (8, 14), (1, 2, 4)), 14, 14),
    "text first": ("joint", TokenLayout((6, 14), (0, 6), (1, 2, 4)), 14, 14),
    "cross": ("cross", TokenLayout((0, 8), (0, 6), (1, 2, 4)), 8, 6),
}


def call_of(name):
    kind, layout, queries, keys = KINDS[name]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64)
        for n in (queries, keys, keys)
    )
    site = Site(0, kind, "there", 2)
    return AttnCall(q, k, v, {}, ("cond",), layout, site, None, core, Run())


def allowed_by_hand(name, regions):
    """Who sees whom, one pair at a time."""
    kind, layout, queries, keys = KINDS[name]
    places = (LEFT, RIGHT)[: len(regions)]

    def owner(token, is_query):
        """("image", region or None) or ("text", region or None)."""
        inside = layout.image[0] <= token < layout.image[1]
        is_image = is_query if kind == "cross" else inside
        start = layout.image[0] if is_image else layout.text[0]
        inside = places if is_image else WORDS[: len(regions)]
        found = [i for i, tokens in enumerate(inside) if token - start in tokens]
        return ("image" if is_image else "text"), found[0] if found else None

    def sees(query, key):
        (what, mine), (other, theirs) = owner(query, True), owner(key, False)
        if other == "text":
            return theirs is None or theirs == mine or (what == "text" and mine is None)
        return what == "image" or mine is None or mine == theirs

    return torch.tensor([[sees(q, k) for k in range(keys)] for q in range(queries)])


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("regions", [TWO, "0,0,0.5,1: red circle"])
@pytest.mark.parametrize("name", KINDS)
def test_words_are_seen_in_their_region(name, regions, scale):
    call = call_of(name)
    count = regions.count(":")
    method = Regions(regions=regions, scale=scale)
    plan = method._plan(call, 0, WORDS[:count])
    allowed = allowed_by_hand(name, range(count))
    bias = torch.zeros(allowed.shape, dtype=torch.float64)
    for place, words in zip((LEFT, RIGHT)[:count], WORDS):
        for row in place:
            bias[call.layout.image[0] + row, [call.layout.text[0] + w for w in words]] = scale
    scores = call.query @ call.key.transpose(2, 3) / 2 + bias
    wanted = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ call.value
    out = attend_by_plans(call, [plan], core)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_conditional_rows_and_pictures_with_a_region_change(family):
    pipe = FAMILIES[family]()
    prompt = ["a red circle and a blue square", "a blue square and a red circle"]
    plain = latents(pipe, prompt)
    with dittune.attach(pipe, Regions(regions=TWO)):
        found = latents(pipe, prompt)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(found, plain, strict=True))
    with dittune.attach(pipe, Regions(regions=TWO)):
        alone = latents(pipe, prompt[:1])
    torch.testing.assert_close(alone[0], found[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"regions": "0,0,0.6,1: a; 0.5,0,1,1: b"}, "overlap"),
        ({"regions": "0,0,0.5,1: a; 0.5,0,1,1: a"}, "two boxes"),
        ({"regions": "left: a"}, "x0,y0,x1,y1"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Regions(**settings)


def test_a_phrase_must_be_in_the_prompt_and_text_in_the_model():
    pipe = FAMILIES["sd3"]()
    with (
        dittune.attach(pipe, Regions(regions="0,0,1,0.5: a green ring")),
        pytest.raises(ConfigError, match="'a green ring' is not a word of the prompt"),
    ):
        latents(pipe)
    with pytest.raises(SelectionError, match="attention to text"):
        Regions(regions=TWO).sites([Site(0, "self", "there", 2)])
