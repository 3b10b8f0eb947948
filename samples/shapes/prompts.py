"""The fixed prompt sets: `val` for tuning, `test` for reporting, `train` to compare with.

`val-bare` and `test-bare` name objects and nothing else: no size, relation or background.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from dittune.samples.shapes import motion, world

PROMPT_SETS = (*world.SPLITS, "val-bare", "test-bare")
COUNTS = {1: 80, 2: 100, 3: 40, 4: 20}  # number of objects -> number of prompts
BARE_COUNTS = {1: 48, 2: 100, 3: 60}
VIDEO_COUNTS = {1: 70, 2: 70}
_SEEDS = {"train": 101, "val": 202, "test": 303, "val-bare": 404, "test-bare": 505}


@functools.cache
def prompt_set(name: str, modality: str = "image") -> tuple[str, ...]:
    """Distinct captions of scenes (240, bare 208) or clips (140), by their number of objects.

    The one-object prompts name every colour-shape at least once.

    Args:
        modality: `image` or `video`.

    Raises:
        ValueError: there is no set of that name for the modality.
    """
    known = PROMPT_SETS if modality == "image" else world.SPLITS
    if name not in known:
        raise ValueError(f"no prompt set {name!r}; sets: {', '.join(known)}")
    if name.endswith("-bare"):
        return _bare(name)
    rng = np.random.default_rng(_SEEDS[name])
    is_video = modality == "video"
    prompts: dict[str, None] = {}
    kinds_left = {(color, shape) for color in world.COLORS for shape in world.SHAPES}
    for count, wanted in (VIDEO_COUNTS if is_video else COUNTS).items():
        goal = len(prompts) + wanted
        while len(prompts) < goal:
            drawn = (motion.sample_clip if is_video else world.sample_scene)(rng, count, name)
            if count == 1 and kinds_left:
                first = drawn.objects[0].start if is_video else drawn.objects[0]
                kind = (first.color, first.shape)
                if kind not in kinds_left:
                    continue
                kinds_left.remove(kind)
            prompts[(motion if is_video else world).caption(drawn, rng)] = None
    return tuple(prompts)


def _bare(name: str) -> tuple[str, ...]:
    """Captions of objects alone; the one-object prompts name every colour-shape once."""
    rng = np.random.default_rng(_SEEDS[name])
    kinds = {(color, shape) for color in world.COLORS for shape in world.SHAPES}
    prompts = dict.fromkeys(_list([kind]) for kind in sorted(kinds))
    for count in (2, 3):
        goal = len(prompts) + BARE_COUNTS[count]
        while len(prompts) < goal:
            some = world.sample_kinds(rng, count, name.removesuffix("-bare"))
            prompts[_list(some)] = None
    return tuple(prompts)


def _list(kinds: Sequence[tuple[str, str]]) -> str:
    return world.listed([world.article(" ".join(kind)) for kind in kinds])
