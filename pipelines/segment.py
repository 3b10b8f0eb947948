"""Masks of subjects from a segmenter: any function of a picture and a phrase.

`segmenter(picture, phrase)` returns bool `[H, W]`, all False where the phrase is not in the
picture. `MODULE:FUNCTION` names one of the user's own (a detector with SAM, say); `shapes` reads
the Shapes world exactly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dittune.errors import ConfigError
from dittune.samples.shapes import score_marks, world
from dittune.subjects.masks import mask_file

Segmenter = Callable[[Image.Image, str], np.ndarray]


def shapes(picture: Image.Image, phrase: str) -> np.ndarray:
    """The object of a phrase such as `red circle` in a picture of the Shapes world.

    Raises:
        ConfigError: the phrase is not of that world.
    """
    try:
        (named,) = world.parse(phrase).objects
    except ValueError as error:
        raise ConfigError(f"the Shapes world has no {phrase!r}: {error}") from error
    return score_marks.mask_of(np.asarray(picture.convert("RGB")), named.color, named.shape)


def load_segmenter(name: str) -> Segmenter:
    """A segmenter by name.

    Raises:
        ConfigError: there is no such function.
    """
    if name == "shapes":
        return shapes
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except Exception as error:  # it may be anybody's module
        raise ConfigError(f"cannot import segmenter {name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"a segmenter is 'shapes' or MODULE:FUNCTION, got {name!r}")
    return found


def write_masks(
    folder: Path, pictures: Sequence[Image.Image], subjects: Sequence[str], segmenter: Segmenter
) -> list[str]:
    """Segment the references, one of each subject, and the scene after them.

    What two subjects share in the scene belongs to the first of them.

    Args:
        folder: gets `PICTURE-SUBJECT.png`, numbered by the subjects that are returned.
        pictures: the references in the order of `subjects`, then the scene.

    Returns:
        The subjects that were found in both; the others have no mask.

    Raises:
        ConfigError: a mask is not bool `[H, W]` of its picture's shape.
    """
    *references, scene = pictures
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    taken = np.zeros(1, bool)
    for subject, reference in zip(subjects, references, strict=True):
        shown, place = (_checked(segmenter, one, subject) for one in (reference, scene))
        place = place & ~taken
        if shown.any() and place.any():
            found.append((subject, shown, place))
            taken = taken | place
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*-*.png"):
        old.unlink()
    for i, (_, shown, place) in enumerate(found):
        for picture, mask in ((i, shown), (len(found), place)):
            image = Image.fromarray(np.uint8(255) * mask.astype(np.uint8))
            image.save(folder / mask_file(picture, i))
    return [subject for subject, _, _ in found]


def _checked(segmenter: Segmenter, picture: Image.Image, subject: str) -> np.ndarray:
    mask = np.asarray(segmenter(picture, subject))
    if mask.dtype != bool or mask.shape != (picture.height, picture.width):
        raise ConfigError(
            f"the segmenter returned {mask.dtype} {mask.shape} for {subject!r}, expected bool "
            f"({picture.height}, {picture.width})"
        )
    return mask
