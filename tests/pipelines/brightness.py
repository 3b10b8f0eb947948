"""An objective of a user's own, for the tests of the search."""

import time

import numpy as np


def score(images, prompts):
    """Mean of a strange weighting of the pixels: differs by head, repeats exactly."""
    assert len(images) == len(prompts)
    return [float((np.asarray(image, float) * np.arange(3)).mean()) for image in images]


def slow(images, prompts):
    time.sleep(0.3)
    return score(images, prompts)
