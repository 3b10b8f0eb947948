"""Marks: what makes one red circle differ from another, and no caption says.

A marked object has a notch, cut in from the left, right, top or bottom. Two pictures of one
subject must agree in its mark, which only another picture can tell; so marks measure whether a
subject stays the same. Notches survive the autoencoder of the plain world, where shades of a colour
do not. Things of one kind in one picture have one mark, their *twins* (`with_twin`): only from such
pictures can a model learn to look at another object for what this one should be like.
Scenes of `world.py` are all `plain`; marks are drawn from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dittune.samples.shapes import world

SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
MARKS = ("plain", *SIDES)
SHARE = 0.8  # of objects that have a notch, in training: all five marks are then as frequent
FLOOR, HALF_WIDTH = 0.2, 0.4  # of a notch: where it ends, from the centre, in half extents


def sample_marks(rng: np.random.Generator, count: int, share: float = SHARE) -> tuple[str, ...]:
    """The marks of `count` objects; each has one of the four notches with probability `share`."""
    return tuple(
        str(rng.choice(list(SIDES))) if rng.random() < share else "plain" for _ in range(count)
    )


def with_twin(
    scene: world.Scene, own: tuple[str, ...], rng: np.random.Generator
) -> tuple[world.Scene, tuple[str, ...]]:
    """The scene and its marks with one more object, of the kind and mark of one that is there.

    Its size and place are its own, and it comes last. One for which there is no room is small;
    where there is none for that either, the scene stays as it is.
    """
    which = int(rng.integers(len(scene.objects)))
    taken = [(thing.x, thing.y, thing.radius) for thing in scene.objects]
    for size in (str(rng.choice(list(world.SIZES))), "small"):
        radius = int(rng.choice(world.SIZES[size]))
        centre = world.free_place(rng, radius, taken)
        if centre is not None:
            twin = replace(scene.objects[which], x=centre[0], y=centre[1], radius=radius)
            return replace(scene, objects=(*scene.objects, twin)), (*own, own[which])
    return scene, own


def coverage(shape: str, mark: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """As `world.coverage`, of a marked shape: float32 `[side, side]`, coordinates in pixels."""
    cover = world.coverage(shape, x, y, radius, side)
    if mark == "plain":
        return cover
    rows, cols = np.mgrid[0:side, 0:side].astype(np.float32) + 0.5
    dx, dy = SIDES[mark]
    along = dx * (cols - x) + dy * (rows - y)
    across = np.abs(dy * (cols - x) + dx * (rows - y))
    distance = np.maximum(FLOOR * radius - along, across - HALF_WIDTH * radius)
    return cover * (1 - np.clip(0.5 - distance, 0.0, 1.0))


def draw(scene: world.Scene, marks: Sequence[str], side: int = world.CANVAS) -> np.ndarray:
    """The picture of a scene whose objects have marks, uint8 `[side, side, 3]`.

    Raises:
        ValueError: another number of marks than of objects, or an unknown one.
    """
    if len(marks) != len(scene.objects) or not set(marks) <= set(MARKS):
        raise ValueError(
            f"expected {len(scene.objects)} marks of {', '.join(MARKS)}, got {', '.join(marks)}"
        )
    scale = side / world.CANVAS
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = world.BACKGROUNDS[scene.background]
    for thing, mark in zip(scene.objects, marks, strict=True):
        place = thing.x * scale, thing.y * scale, thing.radius * scale
        alpha = coverage(thing.shape, mark, *place, side)[..., None]
        picture = (1 - alpha) * picture + alpha * np.float32(world.COLORS[thing.color])
    return np.round(picture).astype(np.uint8)
