"""Attend-and-excite: when it repeats its updates, and that words come to be seen."""

import math

import pytest
import torch

import dittune
from dittune import AttendAndExcite
from dittune.errors import ConfigError
from dittune.words.attn_maps import WordMaps
from dittune.words.tokens import PromptWords
from tests.tiny import latents, sd, sd3

TWO = "a red circle and a blue square"


def test_updates_are_repeated_at_three_steps():
    method = AttendAndExcite()
    enough = {step: method.refinement(step, 50) for step in range(50)}
    assert {step: pair for step, pair in enough.items() if pair[0]} == {
        0: (20, 0.95),
        10: (20, 0.5),
        20: (20, 0.2),
    }
    assert [step for step in range(28) if method.refinement(step, 28)[0]] == [0, 5, 11]
    assert method.refinement(0, 1) == (20, 0.95)  # the first rule where several meet


def picture(values):
    """Maps of 6 tokens on one row of 4; words at 1 and 2 + 3."""
    return WordMaps(torch.tensor(values), PromptWords((1, 2, 3), (((1,), (2, 3)),)), (1, 2, 3, 4))


def test_the_loss_is_of_the_word_that_is_seen_least():
    nobody, all_of_it = [[0.0] * 4], [[1.0, 1.0, 1.0, 1.0]]
    seen = [[1.0, 1.0, 1.0, 0.0]]
    loss = AttendAndExcite().loss
    # The second word is seen nowhere that the first is not.
    assert loss(picture([nobody, all_of_it, nobody, nobody, nobody, nobody]), None) > 0.99
    # It has the last token to itself, which smoothing mixes with its neighbour.
    other = [[0.0, 0.0, 0.0, 1.0]]
    neighbour = math.exp(-1) / (1 + 2 * math.exp(-1))
    found = loss(picture([nobody, seen, other, nobody, nobody, nobody]), None)
    assert found.item() == pytest.approx(neighbour, abs=1e-4)


@pytest.mark.parametrize("build", [sd3, sd])
def test_updates_stop_when_it_is_enough_and_at_their_number(build):
    pipe, updates = build(), {}
    for refinements in (0, 3):
        for scale in (1e-6, 40.0):
            with dittune.attach(
                pipe, AttendAndExcite(refinements=refinements, scale=scale, stop=0.5)
            ) as handle:
                latents(pipe, TWO)
                report = handle.report()["attend_and_excite"]
            updates[refinements, scale] = report["updates"]
    assert report["loss_before"] > 0.95  # so that there is something to repeat
    assert updates[0, 1e-6] == updates[0, 40.0] == 1
    assert updates[3, 1e-6] == 4
    assert 1 <= updates[3, 40.0] <= 4


def test_the_words_come_to_be_seen():
    pipe = sd3()
    with dittune.attach(pipe, AttendAndExcite(refinements=20, stop=1.0)) as handle:
        latents(pipe, TWO, steps=6)
        report = handle.report()["attend_and_excite"]
    assert report["loss_after"] < report["loss_before"] - 0.1


def test_every_word_of_a_concept_counts_and_found_concepts_give_their_noun():
    pipe, results = sd3(), []
    for concepts in ("", "circle, square", "circle+square", "red+circle, blue+square"):
        with dittune.attach(pipe, AttendAndExcite(concepts=concepts, refinements=0)):
            results.append(latents(pipe, TWO))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[3])


def test_a_word_that_has_enough_moves_nothing():
    pipe = sd3()
    plain = latents(pipe, TWO)
    for enough, moves in ((1e-6, False), (0.9, True)):
        with dittune.attach(pipe, AttendAndExcite(enough=enough, refinements=2)):
            assert torch.equal(latents(pipe, TWO), plain) is not moves
    thresholds = [AttendAndExcite(enough=0.3).refinement(step, 50)[1] for step in (0, 10, 20)]
    assert thresholds == [pytest.approx(0.25), 0, 0]


@pytest.mark.parametrize("enough", [0.0, 1.5])
def test_enough_is_a_share(enough):
    with pytest.raises(ConfigError, match=r"enough is in \(0, 1\], got"):
        AttendAndExcite(enough=enough)


def test_refinements_below_zero():
    with pytest.raises(ConfigError, match="refinements is a number from 0 on, got -1"):
        AttendAndExcite(refinements=-1)
