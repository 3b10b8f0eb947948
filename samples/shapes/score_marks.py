"""Reads marked objects as `score.py` reads plain ones, and which shade of its colour each has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dittune.samples.shapes import marks, score, world


@dataclass(frozen=True)
class MarkedObject(score.FoundObject):
    """One object of a picture and its mark: one of `marks.MARKS`."""

    mark: str = "plain"


def segment(picture: np.ndarray) -> tuple[str, list[MarkedObject]]:
    """Read a picture: the name of its background, and the objects on it with their marks.

    Args:
        picture: uint8 `[side, side, 3]`, side a multiple of 64.

    Raises:
        ValueError: another shape or type.
    """
    background, found = _outlined(picture)
    return background, [thing for thing, _ in found]


def score_marked(picture: np.ndarray, request: world.Request | str) -> score.Score:
    """As `score.score`, for pictures whose objects may have marks."""
    request = world.parse(request) if isinstance(request, str) else request
    return score.judge(*segment(picture), request)


def mask_of(picture: np.ndarray, color: str, shape: str) -> np.ndarray:
    """Where the object of a colour and shape is, bool as large as the picture; False if nowhere."""
    fitting = [alpha for thing, alpha in _outlined(picture)[1]
               if (thing.color, thing.shape) == (color, shape)]  # fmt: skip
    solid = fitting[0] >= 0.5 if fitting else np.zeros((world.CANVAS, world.CANVAS), bool)
    k = picture.shape[0] // world.CANVAS
    return np.kron(solid, np.ones((k, k), bool))


def _outlined(picture: np.ndarray) -> tuple[str, list[tuple[MarkedObject, np.ndarray]]]:
    """The background; each object and the share of each pixel that is of it."""
    background, outlines = score.outlines(picture, tuple(marks.SHADES.values()))
    found = []
    for outline in outlines:
        thing = score.measure(outline)
        if thing.area >= score.MIN_AREA:
            marked = MarkedObject(**vars(thing), mark=marks.MARKS[outline.shade])
            found.append((marked, outline.alpha))
    return background, found
