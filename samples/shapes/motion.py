"""Clips of the Shapes world: coloured shapes that move straight on, with captions.

A clip is one or two objects on a plain background, 9 to 17 frames of 64 x 64. Each object keeps
its colour, shape and size, medium or large, and either stands still or moves at a constant speed in
one of four directions; objects never touch. The caption says what each of them does::

    OBJECTS [on a COLOR background]      OBJECTS = OBJECT joined by ", " and " and "
    OBJECT = a still [small|large] COLOR SHAPE | a|an [small|large] COLOR SHAPE moving DIRECTION

`score_video.py` checks everything a caption states. Pairs of objects are held out as in `world.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dittune.samples.shapes import world

FRAMES = 9  # of a training clip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STILL = "still"
SPEEDS = (1, 2, 3)  # pixels a frame
SIZES = ("medium", "large")  # small ones do not survive a small autoencoder in every frame
TRAVEL = (12, 32)  # least and greatest way of a moving object over the whole clip, in pixels


@dataclass(frozen=True)
class MovingObject:
    """An object in the first frame, and what it does: a direction, or `still`."""

    start: world.SceneObject
    motion: str
    speed: int = 0

    def at(self, frame: int) -> world.SceneObject:
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        way, first = self.speed * frame, self.start
        return world.SceneObject(
            first.color, first.shape, first.x + dx * way, first.y + dy * way, first.radius
        )


@dataclass(frozen=True)
class Clip:
    objects: tuple[MovingObject, ...]
    background: str
    frames: int = FRAMES

    def scene(self, frame: int) -> world.Scene:
        """What one frame shows."""
        return world.Scene(tuple(thing.at(frame) for thing in self.objects), self.background)


def draw(clip: Clip, side: int = world.CANVAS) -> np.ndarray:
    """The frames of a clip, uint8 `[T, side, side, 3]`."""
    return np.stack([world.draw(clip.scene(frame), side) for frame in range(clip.frames)])


# ---------------------------------------------------------------------------- sampling


def sample_clip(
    rng: np.random.Generator,
    count: int | None = None,
    split: str = "train",
    frames: int = FRAMES,
) -> Clip:
    """A random clip of `split` with `count` objects (1 or 2; drawn at random if None)."""
    if count is None:
        count = int(rng.choice([1, 2], p=[0.6, 0.4]))
    kinds = world.sample_kinds(rng, count, split)
    while True:
        sizes = rng.choice(SIZES, size=count)
        radii = [int(rng.choice(world.SIZES[str(size)])) for size in sizes]
        moves = [_sample_move(rng, radius, frames) for radius in radii]
        places = _place(rng, radii, moves, frames)
        if places is not None:
            break
    objects = tuple(
        MovingObject(world.SceneObject(color, shape, x, y, radius), motion, speed)
        for (color, shape), (x, y), radius, (motion, speed) in zip(
            kinds, places, radii, moves, strict=True
        )
    )
    return Clip(objects, str(rng.choice(list(world.BACKGROUNDS))), frames)


def _sample_move(rng: np.random.Generator, radius: int, frames: int) -> tuple[str, int]:
    longest = min(TRAVEL[1], world.CANVAS - 2 * (radius + world.MARGIN))
    speeds = [speed for speed in SPEEDS if TRAVEL[0] <= speed * (frames - 1) <= longest]
    if rng.random() < 0.2 or not speeds:
        return STILL, 0
    return str(rng.choice(list(DIRECTIONS))), int(rng.choice(speeds))


def _place(
    rng: np.random.Generator, radii: Sequence[int], moves: Sequence[tuple[str, int]], frames: int
) -> list[tuple[int, int]] | None:
    """First centres such that the ways of no two objects come near each other."""
    places: list[tuple[int, int]] = []
    boxes: list[np.ndarray] = []  # [[left, top], [right, bottom]] of a whole way
    for radius, (motion, speed) in zip(radii, moves, strict=True):
        way = np.array(DIRECTIONS.get(motion, (0, 0))) * speed * (frames - 1)
        swept = np.stack([np.minimum(way, 0) - radius, np.maximum(way, 0) + radius])
        low, high = world.MARGIN - swept[0], world.CANVAS - world.MARGIN - swept[1]
        for _ in range(40):
            x, y = (int(value) for value in rng.integers(low, high + 1))
            box = swept + np.array([x, y])
            if all(_apart(box, other) for other in boxes):
                break
        else:
            return None
        places.append((x, y))
        boxes.append(box)
    return places


def _apart(first: np.ndarray, second: np.ndarray) -> bool:
    gaps = np.maximum(first[0] - second[1], second[0] - first[1])
    return gaps.max() >= world.GAP


# ---------------------------------------------------------------------------- captions


def caption(clip: Clip, rng: np.random.Generator) -> str:
    """A caption that is true of the clip and says what every object does."""
    phrases = []
    for thing in clip.objects:
        first = thing.start
        named = first.size != "medium" and rng.random() < 0.4
        words = f"{first.size} " * named + f"{first.color} {first.shape}"
        if thing.motion == STILL:
            phrases.append(f"a {STILL} {words}")
        else:
            phrases.append(f"{world.article(words)} moving {thing.motion}")
    text = world.listed(phrases)
    if rng.random() < 0.3:
        text += f" on {world.article(clip.background)} background"
    return text


@dataclass(frozen=True)
class MotionRequest:
    """What a caption asks for; `motions` has a direction, `still` or None for each object."""

    objects: tuple[world.NamedObject, ...]
    motions: tuple[str | None, ...]
    background: str | None = None


def parse(text: str) -> MotionRequest:
    """Read a caption of the grammar above; an object may also do nothing in particular.

    Raises:
        ValueError: the text is not in the grammar (says at which words).
    """
    words = " ".join(text.lower().replace(",", " and ").rstrip(" .").split())
    words = words.replace(" and and ", " and ")  # a comma before "and"
    words, on, background = words.partition(" on ")
    parts, motions = [], []
    for part in words.split(" and "):
        thing, moving, direction = part.partition(" moving ")
        if moving and direction not in DIRECTIONS:
            raise ValueError(
                f"cannot read 'moving {direction}' in {text!r}; directions: {', '.join(DIRECTIONS)}"
            )
        article, _, rest = thing.strip().partition(" ")
        is_still = article in ("a", "the") and rest.startswith(STILL + " ")
        if is_still and moving:
            raise ValueError(f"{part.strip()!r} in {text!r} is both still and moving")
        parts.append(f"{article} {rest.removeprefix(STILL + ' ')}" if is_still else thing)
        motions.append(STILL if is_still else direction or None)
    request = world.parse(" and ".join(parts) + on + background)
    if len(request.objects) != len(motions):
        raise ValueError(f"{text!r} names {len(request.objects)} objects, moves {len(motions)}")
    if request.relation:
        raise ValueError(f"{request.relation!r} in {text!r}: objects of a clip have no relation")
    return MotionRequest(request.objects, tuple(motions), request.background)


def vocabulary() -> list[str]:
    """Every word (and the comma) a caption can contain, those of still pictures included."""
    return sorted({*world.vocabulary(), *DIRECTIONS, STILL, "moving"})


def kinds_of(clip: Clip) -> list[tuple[str, str]]:
    """The (color, shape) of each object."""
    return [(thing.start.color, thing.start.shape) for thing in clip.objects]


def pairs_of(clip: Clip) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of objects, of which each belongs to one split."""
    return list(itertools.combinations(kinds_of(clip), 2))
