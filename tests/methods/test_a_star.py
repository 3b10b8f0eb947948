"""A-STAR: segregation, retention, and what it reports."""

import pytest
import torch

import dittune
from dittune import AStar
from dittune.words.attn_maps import WordMaps
from dittune.words.tokens import PromptWords
from tests.tiny import FAMILIES, latents, sd3

TWO = "a red circle and a blue square"


def picture(first, second, third):
    """Three tokens; the first two are one concept of two words, the third is another."""
    maps = torch.stack([torch.tensor([row]) for row in (first, second, third)])
    return WordMaps(maps, PromptWords((0, 1, 2), (((0,), (0, 1)), ((2,),))), (0, 1, 2))


def test_the_loss_by_hand():
    given = picture([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0])
    # A token that two words share counts once: the concept is [1, 1, 0, 0].
    assert AStar().loss(given, None).item() == pytest.approx(1 / 4)
    masks = AStar().remember(given)
    assert masks.tolist() == [[[True, True, False, False]], [[False, True, True, False]]]
    assert AStar().loss(given, masks).item() == pytest.approx(1 / 4 + 2 * 0.5)
    moved = masks.roll(1, dims=-1)
    assert AStar().loss(given, moved).item() == pytest.approx(1 / 4 + 2 * 0.75)


def test_the_measures_by_hand():
    given = picture([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0])
    masks = AStar().remember(given)
    assert AStar().measure(given, None) == {"overlap": pytest.approx(1 / 4)}
    numbers = AStar().measure(given, masks.roll(1, dims=-1))
    assert numbers["retention_iou"].item() == pytest.approx(1 / 3)
    alone = given._replace(words=PromptWords((0,), (((0,),),)))
    assert AStar().measure(alone, None) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_its_report(family):
    pipe = FAMILIES[family]()
    longer = {"max_sequence_length": 16} if family == "flux" else {}
    with dittune.attach(pipe, AStar(scale=5.0)) as handle:
        latents(pipe, [TWO, "a ring"], steps=3, **longer)
        report = handle.report()["a_star"]
    assert set(report) == {"updates", "loss_before", "loss_after", "overlap", "retention_iou"}
    assert report["updates"] == 3
    assert 0 < report["overlap"] <= 0.5 and 0 < report["retention_iou"] <= 1


def test_masks_are_of_the_step_before():
    """Only the first step is without retention, which is at least a half a concept."""
    pipe, losses = sd3(), []

    class Look(AStar):
        name = "look"

        def loss(self, picture, before):
            losses.append((before is None, super().loss(picture, before).item()))
            return super().loss(picture, before)

    with dittune.attach(pipe, Look(scale=1.0)):
        latents(pipe, TWO, steps=3)
    assert [first for first, _ in losses] == [True, True, False, False, False, False]
    assert all(loss <= 0.5 for first, loss in losses if first)
    assert all(loss >= 1.0 for first, loss in losses if not first)


def test_concepts_come_to_overlap_less():
    pipe, overlaps = sd3(), []
    for scale in (1e-6, 20.0):
        with dittune.attach(pipe, AStar(scale=scale)) as handle:
            latents(pipe, TWO, steps=8)
            overlaps.append(handle.report()["a_star"]["overlap"])
    assert overlaps[1] < overlaps[0]
