"""Reads marked objects as `score.py` reads plain ones, and from which side each is notched.

Colours and outlines come from `score.py`; shape and mark are decided together, by the overlap with
drawn templates. A notch may cut the box of an object, so each template is laid into the box that
was found by its own box.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from dittune.samples.shapes import marks, score, world


@dataclass(frozen=True)
class MarkedObject(score.FoundObject):
    """One object of a picture and its mark: one of `marks.MARKS`, or "unknown"."""

    mark: str = "unknown"


def segment(picture: np.ndarray) -> tuple[str, list[MarkedObject]]:
    """Read a picture: the name of its background, and the objects on it with their marks.

    Args:
        picture: uint8 `[side, side, 3]`, side a multiple of 64.

    Raises:
        ValueError: another shape or type.
    """
    background, outlines = score.outlines(picture)
    found = [_measure(color, alpha) for color, alpha in outlines]
    return background, [thing for thing in found if thing.area >= score.MIN_AREA]


def score_marked(picture: np.ndarray, request: world.Request | str) -> score.Score:
    """As `score.score`, for pictures whose objects may have marks."""
    request = world.parse(request) if isinstance(request, str) else request
    return score.judge(*segment(picture), request)


@functools.cache
def _extents(shape: str, mark: str) -> tuple[float, float, float, float]:
    """How far a marked shape reaches left, up, right and down of its centre, in half extents."""
    side, r = 400, 160
    solid = marks.coverage(shape, mark, side / 2, side / 2, r, side) >= 0.5
    rows, cols = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    edges = side / 2 - cols[0], side / 2 - rows[0], cols[-1] + 1 - side / 2, rows[-1] + 1 - side / 2
    return tuple(float(edge) / r for edge in edges)


def _measure(color: int, alpha: np.ndarray) -> MarkedObject:
    solid = alpha >= 0.5
    rows, cols = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    top, left = float(rows[0]), float(cols[0])
    height, width = rows[-1] + 1.0 - top, cols[-1] + 1.0 - left
    best = (0.0, "unknown", "unknown", left + width / 2, top + height / 2, (width + height) / 4)
    for shape in world.SHAPES:
        for mark in marks.MARKS:
            west, north, east, south = _extents(shape, mark)
            across, down = west + east, north + south
            if not score.MIN_ASPECT < (height / down) / (width / across) < 1 / score.MIN_ASPECT:
                continue
            fitted = (height + width) / (down + across)
            for radius in (fitted, fitted + 0.5, fitted + 1.0):  # thin corners are not solid
                x = left + width / 2 + (west - east) / 2 * radius
                y = top + height / 2 + (north - south) / 2 * radius
                template = marks.coverage(shape, mark, x, y, radius, world.CANVAS)
                fit = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
                best = max(best, (float(fit), shape, mark, x, y, float(radius)))
    fit, shape, mark, x, y, radius = best
    if fit < score.MIN_FIT:
        shape = mark = "unknown"
    name = list(world.COLORS)[color]
    return MarkedObject(name, shape, x, y, radius, round(fit, 4), float(alpha.sum()), mark)


def mask_of(picture: np.ndarray, color: str, shape: str) -> np.ndarray:
    """Where the object of a colour and shape is, bool as large as the picture; False if nowhere."""
    solid = np.zeros((world.CANVAS, world.CANVAS), bool)
    for number, alpha in score.outlines(picture)[1]:
        found = _measure(number, alpha)
        if (found.color, found.shape) == (color, shape) and found.area >= score.MIN_AREA:
            solid = alpha >= 0.5
            break
    k = picture.shape[0] // world.CANVAS
    return np.kron(solid, np.ones((k, k), bool))
