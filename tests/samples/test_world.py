"""The world draws what its captions say, and keeps its splits apart."""

import itertools

import numpy as np
import pytest

from dittune.samples.shapes import world
from dittune.samples.shapes.prompts import BARE_COUNTS, COUNTS, PROMPT_SETS, prompt_set


def scenes(count, seed=0, split="train", objects=None):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, objects, split) for _ in range(count)]


def kinds(things):
    return [(thing.color, thing.shape) for thing in things]


def test_captions_parse_back_to_their_scene():
    rng = np.random.default_rng(1)
    for scene in scenes(500):
        request = world.parse(world.caption(scene, rng))
        assert kinds(request.objects) == kinds(scene.objects)
        assert request.background in (None, scene.background)
        for named, thing in zip(request.objects, scene.objects, strict=True):
            assert named.size in (None, thing.size)
        if request.relation:
            assert request.relation in world.true_relations(*scene.objects)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no object"),
        ("a red cat", "cannot read 'a red cat'"),
        ("a red circle left of a blue square and a pink ring", "needs two objects"),
    ],
)
def test_texts_outside_the_grammar_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        world.parse(text)


def test_objects_of_a_scene_differ_in_colour_and_keep_apart():
    for scene in scenes(300):
        colors = [thing.color for thing in scene.objects]
        assert len(set(colors)) == len(colors)
        for a, b in itertools.combinations(scene.objects, 2):
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert gap >= world.GAP
        for thing in scene.objects:
            near, far = min(thing.x, thing.y) - thing.radius, max(thing.x, thing.y) + thing.radius
            assert near >= world.MARGIN and far <= world.CANVAS - world.MARGIN


def test_no_held_out_pair_is_ever_in_a_training_scene():
    for scene in scenes(2000):
        for pair in itertools.combinations(kinds(scene.objects), 2):
            assert world.split_of_pair(*pair) == "train"


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_held_out_scenes_hold_a_pair_of_their_own_and_none_of_the_other(split, count):
    other = {"val": "test", "test": "val"}[split]
    for scene in scenes(40, split=split, objects=count):
        pairs = itertools.combinations(kinds(scene.objects), 2)
        splits = {world.split_of_pair(*pair) for pair in pairs}
        assert split in splits and other not in splits


def test_every_colour_shape_is_in_train():
    seen = {kind for scene in scenes(3000) for kind in kinds(scene.objects)}
    assert seen == set(itertools.product(world.COLORS, world.SHAPES))


def test_a_larger_picture_is_the_same_scene():
    scene = scenes(1, seed=5)[0]
    large = world.draw(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - world.draw(scene)).mean() < 2


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_prompt_sets_are_fixed_and_of_their_split(name):
    prompts, counts = prompt_set(name), BARE_COUNTS if name.endswith("-bare") else COUNTS
    assert len(prompts) == len(set(prompts)) == sum(counts.values())
    requests = [world.parse(prompt) for prompt in prompts]
    assert {n: sum(len(r.objects) == n for r in requests) for n in counts} == counts
    if counts is BARE_COUNTS:
        assert all(r.background is None and r.relation is None for r in requests)
        assert not any(thing.size for r in requests for thing in r.objects)
    for request in requests:
        if len(request.objects) > 1:
            assert world.split_of(kinds(request.objects)) == name.removesuffix("-bare")
    singles = {kinds(r.objects)[0] for r in requests if len(r.objects) == 1}
    assert len(singles) == len(world.COLORS) * len(world.SHAPES)


def test_unknown_prompt_set_names_the_known_ones():
    with pytest.raises(ValueError, match="train, val, test"):
        prompt_set("validation")
    with pytest.raises(ValueError, match=r"sets: train, val, test$"):
        prompt_set("test-bare", "video")
