"""CONFORM: the pairs it contrasts, and when it repeats its updates."""

import pytest
import torch

import dittune
from dittune import Conform
from dittune.errors import ConfigError
from dittune.words.attn_maps import WordMaps, smooth
from dittune.words.map_losses import contrast
from dittune.words.tokens import PromptWords
from tests.tiny import latents, sd3

PAIRS = "a red circle and a blue square"
WORDS = PromptWords((0, 1, 2, 3, 4), (((0,), (1, 2)), ((3,), (4,))))


def picture(seed=0, words=WORDS):
    maps = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(seed))
    return WordMaps(maps, words, words.tokens)


def test_words_of_a_concept_are_pairs():
    given = picture()
    vectors = smooth(torch.stack([given.maps[0], given.maps[1] + given.maps[2], *given.maps[3:]]))
    expected = contrast(vectors.flatten(1), torch.tensor([0, 0, 1, 1]), 0.5)
    assert Conform().loss(given, None).item() == pytest.approx(expected.item())


def test_the_maps_of_the_step_before_take_part_and_are_not_changed():
    given, before = picture(), Conform().remember(picture(1))
    kept = before.clone()
    both = torch.cat([Conform().remember(given), before])
    expected = contrast(both, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), 0.5)
    assert Conform().loss(given, before).item() == pytest.approx(expected.item())
    assert torch.equal(before, kept)


def test_single_words_have_pairs_from_the_second_step_on():
    single = PromptWords((0, 1), (((0,),), ((1,),)))
    given = picture(words=single)
    assert Conform().loss(given, None) == 0
    assert Conform().loss(given, Conform().remember(picture(1, single))) > 0


def test_one_concept_has_nothing_to_be_contrasted_with():
    given = picture(words=PromptWords((0, 1), (((0,), (1,)),)))
    assert Conform().loss(given, Conform().remember(given)) == 0


def test_updates_are_repeated_at_three_steps_whatever_the_loss():
    assert [step for step in range(50) if Conform().refinement(step, 50)[0]] == [0, 10, 20]
    pipe = sd3()
    with dittune.attach(pipe, Conform(refinements=3, scale=1e-6, stop=1.0)) as handle:
        latents(pipe, PAIRS, steps=5)
        assert handle.report()["conform"]["updates"] == 5 + 3 * 3


def test_words_of_a_concept_come_together():
    pipe, losses = sd3(), []
    for scale in (1e-6, 20.0):
        with dittune.attach(pipe, Conform(scale=scale, stop=1.0)) as handle:
            latents(pipe, PAIRS, steps=6)
            losses.append(handle.report()["conform"]["loss_after"])
    assert losses[1] < losses[0]


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="conform: temperature is above 0, got 0"):
        Conform(temperature=0)
    with pytest.raises(ConfigError, match="conform: refinements is from 0 on, got -2"):
        Conform(refinements=-2)
