"""Clips move as their captions say, and the video scorer is right on them and strict."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dittune.samples.shapes import motion, world
from dittune.samples.shapes.prompts import VIDEO_COUNTS, prompt_set
from dittune.samples.shapes.score_video import VideoScore, judge, read, score_video

LENGTHS = (9, 13, 17)


def clips(count, seed=0, split="train", objects=None, frames=9):
    rng = np.random.default_rng(seed)
    return [motion.sample_clip(rng, objects, split, frames) for _ in range(count)]


def kinds(request):
    return [(named.color, named.shape) for named in request.objects]


def test_captions_parse_back_to_their_clip():
    rng = np.random.default_rng(1)
    seen = set()
    for clip in clips(400):
        request = motion.parse(motion.caption(clip, rng))
        assert kinds(request) == motion.kinds_of(clip)
        assert request.motions == tuple(thing.motion for thing in clip.objects)
        assert request.background in (None, clip.background)
        for named, thing in zip(request.objects, clip.objects, strict=True):
            assert named.size in (None, thing.start.size)
        seen |= set(request.motions)
    assert seen == {*motion.DIRECTIONS, motion.STILL}


def test_a_comma_may_stand_before_and():
    plain = "a red circle moving left and a blue square moving up"
    assert motion.parse(plain.replace(" and", ", and")) == motion.parse(plain)
    assert motion.parse(plain.replace(" and", ",")) == motion.parse(plain)


def test_every_word_is_in_the_vocabulary():
    rng, words = np.random.default_rng(2), set(motion.vocabulary())
    for clip in clips(200):
        assert set(motion.caption(clip, rng).replace(",", " ,").split()) <= words


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no object"),
        ("a red cat moving up", "cannot read 'a red cat'"),
        ("a red circle moving north", "cannot read 'moving north'"),
        ("a still red circle moving up", "both still and moving"),
        ("a red circle above a blue square", "moves 1|no relation"),
    ],
)
def test_texts_outside_the_grammar_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        motion.parse(text)


def test_a_caption_may_leave_the_motion_open():
    request = motion.parse("a Red circle and the still large blue ring on a black background.")
    assert request.motions == (None, "still") and request.background == "black"
    assert [named.size for named in request.objects] == [None, "large"]


@pytest.mark.parametrize("frames", LENGTHS)
def test_objects_stay_on_the_canvas_and_apart_and_move_far_enough(frames):
    for clip in clips(150, seed=frames, frames=frames):
        assert motion.draw(clip).shape == (frames, 64, 64, 3)
        for frame in range(frames):
            things = clip.scene(frame).objects
            for a, b in itertools.combinations(things, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius >= world.GAP
            for thing in things:
                near = min(thing.x, thing.y) - thing.radius
                far = max(thing.x, thing.y) + thing.radius
                assert near >= world.MARGIN and far <= world.CANVAS - world.MARGIN
        for thing in clip.objects:
            first, last = thing.at(0), thing.at(frames - 1)
            way = np.array([last.x - first.x, last.y - first.y])
            wanted = motion.DIRECTIONS.get(thing.motion, (0, 0))
            assert np.array_equal(np.sign(way), wanted)
            assert thing.motion == motion.STILL or abs(way).sum() >= motion.TRAVEL[0]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs_are_held_out_as_in_pictures(split):
    for clip in clips(150, split=split, objects=2):
        assert [world.split_of_pair(*pair) for pair in motion.pairs_of(clip)] == [split]
    prompts = prompt_set(split, "video")
    assert len(set(prompts)) == len(prompts) == sum(VIDEO_COUNTS.values())
    for request in map(motion.parse, prompts):
        if len(request.objects) > 1:
            assert world.split_of(kinds(request)) == split


def false_requests(clip):
    """Requests that differ from a true one in one thing, of every kind."""
    named = tuple(world.NamedObject(t.start.color, t.start.shape) for t in clip.objects)
    truth = motion.MotionRequest(named, tuple(thing.motion for thing in clip.objects))
    first = clip.objects[0]
    color = next(c for c in world.COLORS if c not in {n.color for n in named})
    shape = next(s for s in world.SHAPES if s != first.start.shape)
    size = next(s for s in ("small", "large") if s != first.start.size)
    for change in ({"color": color}, {"shape": shape}, {"size": size}):
        yield replace(truth, objects=(replace(named[0], **change), *named[1:]))
    for other in {*motion.DIRECTIONS, motion.STILL} - {first.motion}:
        yield replace(truth, motions=(other, *truth.motions[1:]))
    yield replace(truth, background=next(b for b in world.BACKGROUNDS if b != clip.background))
    if len(named) > 1:
        yield replace(truth, objects=named[1:], motions=truth.motions[1:])


def check(count, seed):
    """Share of drawn clips of which all true and false requests are judged right."""
    rng = np.random.default_rng(seed)
    right = 0
    for _ in range(count):
        clip = motion.sample_clip(rng, frames=int(rng.choice(LENGTHS)))
        reading = read(motion.draw(clip))
        truth = judge(reading, motion.parse(motion.caption(clip, rng)))
        lies = any(judge(reading, request).success for request in false_requests(clip))
        right += truth.success and truth.flicker < 0.5 and not lies
    return right / count


def test_right_on_drawn_clips():
    assert check(8, seed=11) == 1.0


@pytest.mark.slow
def test_right_on_600_drawn_clips():
    assert check(600, seed=12) >= 0.995


@pytest.fixture
def clip():
    """A red circle moving right below a still blue square."""
    circle = world.SceneObject("red", "circle", 14, 46, 10)
    square = world.SceneObject("blue", "square", 40, 16, 10)
    objects = (motion.MovingObject(circle, "right", 2), motion.MovingObject(square, "still"))
    return motion.Clip(objects, "white")


REQUEST = "a red circle moving right and a still blue square"


def test_an_object_that_is_gone_for_one_frame_is_not_there(clip):
    frames = motion.draw(clip)
    frames[4] = world.draw(world.Scene(clip.scene(4).objects[1:], "white"))
    found = score_video(frames, REQUEST)
    assert found.objects == (False, True) and found.kept == (False, True)
    assert found.motions == (False, True) and not found.success


def test_a_jump_or_a_swelling_loses_the_identity(clip):
    frames = motion.draw(clip)
    assert score_video(frames, REQUEST).success
    assert score_video(frames[[0, 1, 2, 3, 8]], REQUEST).kept == (False, True)
    large = replace(clip.objects[1].start, radius=14)
    frames[5] = world.draw(world.Scene((clip.scene(5).objects[0], large), "white"))
    found = score_video(frames, REQUEST)
    assert found.objects == (True, True) and found.kept == (True, False) and not found.success


def test_flicker_is_the_mean_second_difference(clip):
    """One object shaken by one pixel up and down: second differences of 2 pixels throughout."""
    alone = replace(clip, objects=clip.objects[1:])
    shaken = [replace(alone.objects[0].start, y=16 + frame % 2) for frame in range(9)]
    frames = [world.draw(world.Scene((thing,), "white")) for thing in shaken]
    found = score_video(frames, "a still blue square")
    assert found.success and found.flicker == pytest.approx(2.0)
    assert score_video(motion.draw(alone), "a still blue square").flicker == 0.0


def test_what_nobody_asked_for_counts_in_its_worst_frame(clip):
    frames = motion.draw(clip)
    frames[3, 40:56, 50:60] = world.COLORS["green"]
    assert score_video(frames, REQUEST).extra == 1
    assert score_video(frames, "a red circle").extra == 2


def test_another_background_in_one_frame_is_seen(clip):
    frames = motion.draw(clip)
    text = REQUEST + " on a white background"
    assert score_video(frames, text).background is True
    frames[8] = world.draw(world.Scene(clip.scene(8).objects, "black"))
    assert score_video(frames, text).background is False


def test_nothing_there():
    frames = np.full((9, 64, 64, 3), world.BACKGROUNDS["white"], np.uint8)
    found = score_video(frames, REQUEST)
    assert replace(found, flicker=0.0) == VideoScore(
        (False,) * 2, (False,) * 2, (False,) * 2, (None,) * 2, None, 0, 0.0
    )
    assert np.isnan(found.flicker)
    with pytest.raises(ValueError, match="at least two frames"):
        score_video(frames[:1], REQUEST)
