"""Two methods in one generation: they both act, or are refused before anything is made."""

from itertools import permutations

import pytest

import dittune
from dittune.errors import ConfigError, SelectionError
from tests.test_contract import ACTIVE, PAIR
from tests.tiny import latents, sd, sd3

CORES = {"natten", "clear", "scale_dit", "sparsed"}
LAST = {"regions", "shared_attention", "isolation"}
WORDS = {"attention_regulation", "reweight"}
GRADIENTS = {"a_star", "attend_and_excite", "conform"}
NEVER = [CORES, LAST, WORDS]  # two of one of them
NEVER_BOTH = [(LAST, CORES), (WORDS, CORES | LAST), ({"scale_dit"}, GRADIENTS),
              ({"softpag"}, {"sparsed"})]  # fmt: skip
PICTURES = [name for name in dittune.available_methods() if name not in ("radial", "vmoba")]


def made(name):
    chosen = {"isolation": 1}.get(name, 0)
    return dittune.load_method(name)(**(ACTIVE[name][chosen] if ACTIVE[name] else {}))


def are_apart(first, second):
    pair = {first, second}
    return any(pair <= group for group in NEVER) or any(
        (first in one and second in other) or (first in other and second in one)
        for one, other in NEVER_BOTH
    )


def is_wrong_order(first, second):
    return (
        first in LAST
        or (first == "merge_padding" and second in WORDS)
        or (first not in WORDS and second == "merge_padding")
        or (first, second) == ("scale_dit", "softpag")
    )


@pytest.mark.parametrize(("first", "second"), [*permutations(PICTURES, 2)])
def test_they_act_together_or_are_refused(first, second, pipe):
    methods = made(first), made(second)
    if are_apart(first, second) or is_wrong_order(first, second):
        with (
            pytest.raises((ConfigError, SelectionError)) as told,
            dittune.attach(pipe, *methods),
        ):
            latents(pipe, PAIR, steps=3)
        assert {first, second} & set(str(told.value).replace(":", "").split())
        return
    with dittune.attach(pipe, *methods):
        both = latents(pipe, PAIR, steps=3)
    for alone, other in (methods, methods[::-1]):
        if other.name != "merge_padding":  # changes no picture
            with dittune.attach(pipe, alone):
                assert not both.equal(latents(pipe, PAIR, steps=3))


@pytest.fixture(scope="module")
def pipe():
    return sd3()


@pytest.fixture(scope="module")
def unet():
    return sd()


def test_the_message_says_what_to_do(pipe):
    with pytest.raises(SelectionError, match="list softpag before isolation: what follows"):
        dittune.attach(pipe, made("isolation"), made("softpag"))
    with pytest.raises(SelectionError, match=r"natten and isolation cannot .* give them different"):
        dittune.attach(pipe, made("natten"), made("isolation"))
    with pytest.raises(SelectionError, match="regions and isolation cannot act together: each"):
        dittune.attach(pipe, made("regions"), made("isolation"))
    dittune.attach(pipe, made("merge_padding"), made("softpag"), made("isolation")).detach()


@pytest.mark.parametrize(("first", "second"), [*permutations(PICTURES, 2)])
def test_in_a_unet_no_pair_ends_in_a_traceback(first, second, unet):
    try:
        with dittune.attach(unet, made(first), made(second)):
            latents(unet, PAIR, steps=3)
    except (ConfigError, SelectionError):
        assert are_apart(first, second) or is_wrong_order(first, second)


@pytest.mark.parametrize("pair", [("reweight", "natten"), ("regions", "isolation")])
def test_methods_that_share_no_site_act_together(pair, unet):
    with dittune.attach(unet, *map(made, pair)):
        both = latents(unet, PAIR, steps=3)
    for name in pair:
        with dittune.attach(unet, made(name)):
            assert not both.equal(latents(unet, PAIR, steps=3))
