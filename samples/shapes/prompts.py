"""The fixed prompt sets: `val` for tuning, `test` for reporting, `train` to compare with."""

from __future__ import annotations

import functools

import numpy as np

from dittune.samples.shapes import world

PROMPT_SETS = world.SPLITS
COUNTS = {1: 80, 2: 100, 3: 40, 4: 20}  # number of objects -> number of prompts
_SEEDS = {"train": 101, "val": 202, "test": 303}


@functools.cache
def prompt_set(name: str) -> tuple[str, ...]:
    """240 distinct captions of scenes of one split, ordered by their number of objects.

    The one-object prompts name every colour-shape at least once.

    Raises:
        ValueError: there is no set of that name.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"no prompt set {name!r}; sets: {', '.join(PROMPT_SETS)}")
    rng = np.random.default_rng(_SEEDS[name])
    prompts: dict[str, None] = {}
    kinds_left = {(color, shape) for color in world.COLORS for shape in world.SHAPES}
    for count, wanted in COUNTS.items():
        goal = len(prompts) + wanted
        while len(prompts) < goal:
            scene = world.sample_scene(rng, count, name)
            if count == 1 and kinds_left:
                kind = (scene.objects[0].color, scene.objects[0].shape)
                if kind not in kinds_left:
                    continue
                kinds_left.remove(kind)
            prompts[world.caption(scene, rng)] = None
    return tuple(prompts)
