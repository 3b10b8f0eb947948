"""The scorer is right on drawn scenes and strict with what is not there."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dittune.samples.shapes import score, world


def kind(thing):
    return thing.color, thing.shape, thing.size


def read_right(scene, picture):
    background, found = score.segment(picture)
    return background == scene.background and sorted(map(kind, found)) == sorted(
        map(kind, scene.objects)
    )


def false_captions(scene, rng):
    """Captions that differ from a true one in one thing, of every kind."""
    first, *rest = scene.objects
    used = {thing.color for thing in scene.objects}
    color = next(c for c in world.COLORS if c not in used)
    shape = next(s for s in world.SHAPES if s != first.shape)
    size = next(s for s in ("small", "large") if s != first.size)
    named = [world.NamedObject(t.color, t.shape) for t in scene.objects]
    yield world.Request((replace(named[0], color=color), *named[1:]))
    yield world.Request((replace(named[0], shape=shape), *named[1:]))
    yield world.Request((replace(named[0], size=size), *named[1:]))
    other = next(b for b in world.BACKGROUNDS if b != scene.background)
    yield world.Request(tuple(named), background=other)
    if len(scene.objects) == 2:
        for relation in world.true_relations(rest[0], first):
            yield world.Request(tuple(named), relation=relation)
    if rest:
        yield world.Request(tuple(named[1:]))  # the first one is then an extra object


def check(count, seed):
    """Share of scenes on which every question is answered right."""
    rng = np.random.default_rng(seed)
    right = 0
    for _ in range(count):
        scene = world.sample_scene(rng)
        picture = world.draw(scene)
        truth = score.score(picture, world.caption(scene, rng)).success
        lies = any(score.score(picture, r).success for r in false_captions(scene, rng))
        right += read_right(scene, picture) and truth and not lies
    return right / count


def test_right_on_drawn_scenes():
    assert check(150, seed=11) >= 0.995


@pytest.mark.slow
def test_right_on_5000_drawn_scenes():
    assert check(5000, seed=12) >= 0.995


def test_positions_are_right_to_a_pixel():
    scene = world.sample_scene(np.random.default_rng(3), 4)
    _, found = score.segment(world.draw(scene))
    for thing in scene.objects:
        near = [f for f in found if abs(f.x - thing.x) <= 1 and abs(f.y - thing.y) <= 1]
        assert [kind(f) for f in near] == [kind(thing)]


def test_survives_blur_and_noise():
    rng = np.random.default_rng(4)
    right = 0
    for _ in range(60):
        scene = world.sample_scene(rng)
        soft = Image.fromarray(world.draw(scene)).filter(ImageFilter.GaussianBlur(0.8))
        noisy = np.asarray(soft) * 0.97 + rng.normal(0, 8, (64, 64, 3))
        right += read_right(scene, noisy.clip(0, 255).astype(np.uint8))
    assert right / 60 >= 0.9


def test_larger_pictures():
    scene = world.sample_scene(np.random.default_rng(5), 3)
    assert read_right(scene, world.draw(scene, 128))


def canvas():
    return np.full((64, 64, 3), world.BACKGROUNDS["white"], np.uint8)


def test_a_blob_is_no_shape():
    picture = canvas()
    picture[20:30, 20:44] = world.COLORS["red"]
    picture[30:44, 30:33] = world.COLORS["red"]
    _, found = score.segment(picture)
    assert [(f.color, f.shape) for f in found] == [("red", "unknown")]
    result = score.score(picture, "a red square")
    assert not result.success and result.extra == 1


def test_an_object_of_two_colours_is_neither():
    disc = world.coverage("circle", 32, 32, 12, 64) > 0.5
    picture = canvas()
    picture[disc] = world.COLORS["red"]
    picture[disc & (np.arange(64) >= 32)] = world.COLORS["blue"]
    for caption in ("a red circle", "a blue circle", "a red circle and a blue circle"):
        assert not any(score.score(picture, caption).objects)


def test_touching_objects_are_told_apart():
    picture = canvas()
    picture[10:30, 10:30] = world.COLORS["red"]
    picture[10:30, 30:50] = world.COLORS["blue"]
    assert score.score(picture, "a red square left of a blue square").success


def test_specks_are_ignored_and_extras_are_not():
    picture = world.draw(world.Scene((world.SceneObject("red", "circle", 20, 20, 10),), "white"))
    picture[50:53, 50:53] = world.COLORS["green"]
    assert score.score(picture, "a red circle").success
    picture[40:56, 40:56] = world.COLORS["green"]
    assert score.score(picture, "a red circle").extra == 1


def test_nothing_there():
    result = score.score(canvas(), "a red circle above a blue square on a black background")
    assert result == score.Score((False, False), (None, None), False, False, 0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 32, 3), (50, 50, 3)])
def test_wrong_pictures_are_refused(shape):
    with pytest.raises(ValueError, match="multiple of 64"):
        score.segment(np.zeros(shape, np.uint8))


def test_two_objects_of_one_kind():
    """Whichever is named first, each is the one that fits its words."""
    (large,), (small, _) = world.SIZES["large"], world.SIZES["small"]
    objects = (
        world.SceneObject("red", "circle", 18, 32, large),
        world.SceneObject("red", "circle", 48, 32, small),
    )
    scene = world.Scene(objects, next(iter(world.BACKGROUNDS)))
    picture = world.draw(scene)
    for caption in (
        "a red circle and a large red circle",
        "a large red circle and a red circle",
        "a red circle right of a red circle",
        "a red circle left of a red circle",
        "a small red circle right of a large red circle",
    ):
        assert score.score(picture, caption).success, caption
    for caption in (
        "a small red circle left of a large red circle",
        "a red circle above a red circle",
        "a large red circle and a large red circle",
    ):
        assert not score.score(picture, caption).success, caption
