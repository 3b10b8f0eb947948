"""The fixed prompt sets: `val` for tuning, `test` for reporting, `train` to compare with."""

from __future__ import annotations

import functools

import numpy as np

from dittune.samples.shapes import motion, world

PROMPT_SETS = world.SPLITS
COUNTS = {1: 80, 2: 100, 3: 40, 4: 20}  # number of objects -> number of prompts
VIDEO_COUNTS = {1: 60, 2: 60, 3: 20}
_SEEDS = {"train": 101, "val": 202, "test": 303}


@functools.cache
def prompt_set(name: str, modality: str = "image") -> tuple[str, ...]:
    """Distinct captions of scenes (240) or clips (140) of one split, by their number of objects.

    The one-object prompts name every colour-shape at least once.

    Args:
        modality: `image` or `video`.

    Raises:
        ValueError: there is no set of that name.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"no prompt set {name!r}; sets: {', '.join(PROMPT_SETS)}")
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
