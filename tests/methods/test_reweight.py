"""Words that count more or less, against the maps of the definition."""

import pytest
import torch

import dittune
from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.methods.reweight import Reweight, parse_weights, text_factors
from dittune.run import Run
from dittune.seam import _sdpa_core
from dittune.words.tokens import PromptWords
from tests.tiny import FAMILIES, latents, sd, sd3

TWO = "a red circle and a blue square"
JOINT = TokenLayout((2, 14), (14, 20), (1, 3, 4)), "joint", 21  # others before and after
CROSS = TokenLayout((0, 12), (0, 6), (1, 3, 4)), "cross", 12


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("kind", [JOINT, CROSS], ids=["joint", "cross"])
def test_columns_of_the_map_are_multiplied_for_image_rows(kind, has_mask):
    layout, name, queries = kind
    keys = queries if name == "joint" else 6
    torch.manual_seed(0)
    query = torch.randn(4, 2, queries, 8, dtype=torch.float64)
    key, value = torch.randn(2, 4, 2, keys, 8, dtype=torch.float64)
    mask = torch.randn(1, 1, 1, keys, dtype=torch.float64) if has_mask else None
    call = AttnCall(
        query, key, value, {"attn_mask": mask} if has_mask else {}, ("uncond", "cond"), layout,
        Site(0, name, "there", 2), None, _sdpa_core, Run(),
    )  # fmt: skip
    method = Reweight(weights="red:3, hot dog:-0.5")
    words = [
        PromptWords((1, 2, 3), (((1,),), ((2, 3),))),
        PromptWords((1, 2), (((2,),), ((1, 2),))),  # another place, and a token of both
    ]
    call.run.memory(method).factors = text_factors(words, (3.0, -0.5), value)
    out = method.attend(call, lambda given: given.core(given))

    maps = torch.einsum("bhqd,bhkd->bhqk", query, key) / 8**0.5
    maps = (maps + mask if has_mask else maps).softmax(-1)
    begin, (first, last) = layout.text[0], layout.image
    for row, tokens in ((2, {1: 3, 2: -0.5, 3: -0.5}), (3, {2: -1.5, 1: -0.5})):
        for token, factor in tokens.items():
            maps[row, :, first:last, begin + token] *= factor
    torch.testing.assert_close(out, maps @ value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_batch_do_not_depend_on_each_other(family):
    pipe, prompts = FAMILIES[family](), [TWO, "a blue circle"]
    settings = {"max_sequence_length": 16} if family == "flux" else {}
    with dittune.attach(pipe, Reweight(weights="circle:4")):
        both = latents(pipe, prompt=prompts, **settings)
        alone = latents(pipe, prompt=prompts[:1], **settings)
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)
    plain = latents(pipe, prompt=prompts, **settings)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(both, plain, strict=True))


def test_a_hidden_word_does_not_matter():
    """Two prompts that differ in one word give closer pictures when that word is hidden."""
    pipe = sd()
    prompts = ["a red circle", "a blue circle"]
    far = torch.dist(*(latents(pipe, prompt=p) for p in prompts))
    near = []
    for prompt in prompts:
        with dittune.attach(pipe, Reweight(weights=f"{prompt.split()[1]}:0")):
            near.append(latents(pipe, prompt=prompt))
    assert torch.dist(*near) < far


def test_weights_as_text():
    assert parse_weights("large:2, hot dog:-0.5,dog#2:1e1") == {
        "large": 2.0, "hot dog": -0.5, "dog#2": 10.0,
    }  # fmt: skip
    assert parse_weights(" ") == {}
    for wrong in ("large", "large:", ":2", "large:x", "large:nan", "a:1,a:2", "a+b:2", "a:1,,b:2"):
        with pytest.raises(ConfigError, match="weights are written like 'large:2, red"):
            Reweight(weights=wrong)


def test_bad_use_is_refused():
    pipe = sd3()
    absent = pytest.raises(ConfigError, match="'ring' is not a word of the prompt")
    with dittune.attach(pipe, Reweight(weights="ring:2")), absent:
        latents(pipe, prompt=TWO)
    with pytest.raises(SelectionError, match="needs attention to text"):
        Reweight(weights="red:2").sites([Site(0, "self", "there", 2)])
