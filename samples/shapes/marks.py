"""Marks: what makes one red circle differ from another, and no caption says.

A mark is a shade of the colour. Two pictures of one subject must agree in it, which only another
picture can tell; so marks measure whether a subject stays the same. Things of one kind in one
picture have one mark, their *twins* (`with_twin`): from such pictures a model can learn to look at
another object for what this one should be like. Scenes of `world.py` are all `plain`; marks are
drawn from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dittune.samples.shapes import world

SHADES = {"plain": 1.0, "deep": 0.8, "dark": 0.6}  # of the colour's brightness
MARKS = tuple(SHADES)
SHARE = 2 / 3  # of objects that are not plain, in training: all three marks are then as frequent


def sample_marks(rng: np.random.Generator, count: int, share: float = SHARE) -> tuple[str, ...]:
    """The marks of `count` objects; each has another one than `plain` with probability `share`."""
    return tuple(
        str(rng.choice(MARKS[1:])) if rng.random() < share else "plain" for _ in range(count)
    )


def with_twin(
    scene: world.Scene, own: tuple[str, ...], which: int, rng: np.random.Generator
) -> tuple[world.Scene, tuple[str, ...]]:
    """The scene and its marks with one more object, of the kind and mark of object `which`.

    Its size and place are its own, and it comes last. One for which there is no room is small;
    where there is none for that either, the scene stays as it is.
    """
    taken = [(thing.x, thing.y, thing.radius) for thing in scene.objects]
    for size in (str(rng.choice(list(world.SIZES))), "small"):
        radius = int(rng.choice(world.SIZES[size]))
        centre = world.free_place(rng, radius, taken)
        if centre is not None:
            twin = replace(scene.objects[which], x=centre[0], y=centre[1], radius=radius)
            return replace(scene, objects=(*scene.objects, twin)), (*own, own[which])
    return scene, own


def draw(scene: world.Scene, marks: Sequence[str], side: int = world.CANVAS) -> np.ndarray:
    """The picture of a scene whose objects have marks, uint8 `[side, side, 3]`.

    Raises:
        ValueError: another number of marks than of objects, or an unknown one.
    """
    if len(marks) != len(scene.objects) or not set(marks) <= set(MARKS):
        raise ValueError(
            f"expected {len(scene.objects)} marks of {', '.join(MARKS)}, got {', '.join(marks)}"
        )
    return world.draw(scene, side, [SHADES[mark] for mark in marks])
