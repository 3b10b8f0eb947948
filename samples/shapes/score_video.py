"""An exact scorer for clips of the Shapes world: every frame is read by `score.py`, then compared.

An object of a caption is *there* if some frame-by-frame reading finds its colour and shape in every
frame; it *keeps its identity* if it also stays of one size and never jumps; its *motion* is that of
a straight line fitted to its centres. *Flicker* is how unsteady objects are: the mean size of the
second difference, from frame to frame, of centre and radius, in pixels. A drawn clip has next to
none, since speeds and sizes are constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dittune.samples.shapes import motion, score

MOVES = 8.0  # pixels over the clip from which on an object moves
STAYS = 4.0  # pixels up to which it stands still
JUMP = 7.0  # pixels from one frame to the next; the fastest object moves 3
SWELL = 3.0  # pixels by which the radius may vary

Reading = list[tuple[str, list[score.FoundObject]]]


@dataclass(frozen=True)
class VideoScore:
    """Answers to a caption's questions; None where the caption says nothing.

    Attributes:
        objects: for each named object, whether every frame shows it with its own colour and shape.
        kept: for each named object, whether it is there and never jumps or swells.
        motions: for each named object, whether it moves (or stays) as stated.
        sizes: for each named object, whether it has the size stated, by its median radius.
        background: whether every frame has the background stated.
        extra: how many objects nobody asked for, in the worst frame.
        flicker: mean second difference of centre and radius in pixels over the objects that are
            there; nan if none is.
    """

    objects: tuple[bool, ...]
    kept: tuple[bool, ...]
    motions: tuple[bool | None, ...]
    sizes: tuple[bool | None, ...]
    background: bool | None
    extra: int
    flicker: float

    @property
    def success(self) -> bool:
        stated = (*self.motions, *self.sizes, self.background)
        return all(self.kept) and self.extra == 0 and all(s is not False for s in stated)


def score_video(
    frames: Sequence[np.ndarray] | np.ndarray, request: motion.MotionRequest | str
) -> VideoScore:
    """Answer every question a caption raises about a clip.

    Args:
        frames: at least two uint8 pictures `[side, side, 3]`, side a multiple of 64.
        request: a caption, or what `motion.parse` made of it.

    Raises:
        ValueError: the caption cannot be parsed, there are fewer than two frames, or a frame has
            another shape.
    """
    if isinstance(request, str):
        request = motion.parse(request)
    return judge(read(frames), request)


def read(frames: Sequence[np.ndarray] | np.ndarray) -> Reading:
    """The background and the objects of each frame; see `score_video`."""
    if len(frames) < 2:
        raise ValueError(f"a clip has at least two frames, got {len(frames)}")
    return [score.segment(frame) for frame in frames]


def judge(reading: Reading, request: motion.MotionRequest) -> VideoScore:
    """What `score_video` answers, from what it has read: reading takes nearly all of its time."""
    grounds, pictures = zip(*reading, strict=True)
    tracks = [[] for _ in request.objects]
    extra = 0
    for found in pictures:
        free = list(found)
        for named, track in zip(request.objects, tracks, strict=True):
            thing = _nearest(free, named, track)
            if thing is not None:
                free.remove(thing)
                track.append(thing)
        extra = max(extra, len(free))
    there = [len(track) == len(pictures) for track in tracks]
    paths = [_path(track) if ok else None for track, ok in zip(tracks, there, strict=True)]
    bends = [np.linalg.norm(np.diff(path, 2, axis=0), axis=1) for path in paths if path is not None]
    return VideoScore(
        objects=tuple(there),
        kept=tuple(path is not None and _is_steady(path) for path in paths),
        motions=tuple(
            None if asked is None else path is not None and _motion(path) == asked
            for asked, path in zip(request.motions, paths, strict=True)
        ),
        sizes=tuple(
            None if named.size is None else ok and _size(track) == named.size
            for named, ok, track in zip(request.objects, there, tracks, strict=True)
        ),
        background=None
        if request.background is None
        else all(ground == request.background for ground in grounds),
        extra=extra,
        flicker=float(np.concatenate(bends).mean()) if bends and len(pictures) > 2 else math.nan,
    )


def _nearest(found, named, track) -> score.FoundObject | None:
    """The object of the named kind nearest to where it was; the best one in the first frame."""
    fitting = [f for f in found if (f.color, f.shape) == (named.color, named.shape)]
    if not track:
        return min(fitting, key=lambda f: (f.size != (named.size or f.size), -f.fit), default=None)
    last = track[-1]
    return min(fitting, key=lambda f: math.hypot(f.x - last.x, f.y - last.y), default=None)


def _path(track: Sequence[score.FoundObject]) -> np.ndarray:
    """Centre and radius by frame, `[T, 3]`."""
    return np.array([(thing.x, thing.y, thing.radius) for thing in track])


def _is_steady(path: np.ndarray) -> bool:
    steps = np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1)
    return bool(steps.max() <= JUMP and np.ptp(path[:, 2]) <= SWELL)


def _motion(path: np.ndarray) -> str | None:
    """The direction of the fitted line, `still`, or None for neither (slow, or askew)."""
    time = np.arange(len(path)) - (len(path) - 1) / 2
    dx, dy = (time @ path[:, :2]) / (time @ time) * (len(path) - 1)
    if math.hypot(dx, dy) <= STAYS and np.ptp(path[:, :2], axis=0).max() <= 2 * STAYS:
        return motion.STILL
    for name, (sx, sy) in motion.DIRECTIONS.items():
        along, across = sx * dx + sy * dy, abs(sy * dx) + abs(sx * dy)
        if along >= MOVES and across <= along / 2:
            return name
    return None


def _size(track: Sequence[score.FoundObject]) -> str:
    return sorted(track, key=lambda thing: thing.radius)[len(track) // 2].size
