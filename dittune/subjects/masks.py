"""Where the subjects of a story are in its pictures: from the user, or from the model's own maps.

Shape letters: `P` pictures, `S` subjects.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dittune.errors import ConfigError
from dittune.local_path import local_path
from dittune.subjects.boxes import SIDE, parse_boxes, refuse_overlap
from dittune.words.attn_maps import otsu, smooth, word_maps
from dittune.words.tokens import PromptWords

Masks = list[torch.Tensor]  # of each picture: bool `[S, h, w]`, empty where a subject is not named


def mask_file(picture: int, subject: int) -> str:
    """The name of a mask in a folder; both are counted from 0."""
    return f"{picture}-{subject}.png"


def read_masks(
    source: str, subjects: Sequence[str], named: Sequence[Sequence[bool]], grid: tuple[int, int]
) -> Masks:
    """The masks a user gives.

    Args:
        source: a folder of pictures `PICTURE-SUBJECT.png` (bright is inside), or boxes,
            `x0,y0,x1,y1: SUBJECT @PICTURE; ...`, where no `@` means every picture.
        subjects: as they are written.
        named: for each picture, which subjects its prompt names.
        grid: `(height, width)` in tokens, for the shape of the pictures.

    Raises:
        ConfigError: a mask that is missing, empty, of another shape than the pictures, overlapping
            another one of its picture, or of a subject or picture that is not there.
    """
    folder = local_path(source)
    if os.path.isdir(folder):  # False also for boxes that are too long to be a path
        masks = [_from_folder(folder, p, subjects, has, grid) for p, has in enumerate(named)]
    elif ":" in source:
        masks = _from_boxes(source, subjects, named)
    else:
        raise ConfigError(f"masks is a folder or 'x0,y0,x1,y1: SUBJECT @PICTURE', got {source!r}")
    for picture, (found, has) in enumerate(zip(masks, named, strict=True)):
        for subject, (mask, wanted) in enumerate(zip(found, has, strict=True)):
            if wanted and not mask.any():
                raise ConfigError(
                    f"no mask of {subjects[subject]!r} in picture {picture}, whose prompt names it;"
                    f" add {mask_file(picture, subject)} or a box, or mend one that is empty"
                )
        refuse_overlap(found, list(subjects), f"picture {picture}")
    return masks


def _from_folder(
    folder: Path,
    picture: int,
    subjects: Sequence[str],
    named: Sequence[bool],
    grid: tuple[int, int],
) -> torch.Tensor:
    found = [_read_png(folder / mask_file(picture, i), grid) for i in range(len(subjects))]
    sizes = {tuple(mask.shape) for mask in found if mask is not None}
    if len(sizes) > 1:
        raise ConfigError(f"masks of picture {picture} in {folder} differ in size: {sizes}")
    size = sizes.pop() if sizes else (1, 1)
    masks = [torch.zeros(size, dtype=torch.bool) if mask is None else mask for mask in found]
    return torch.stack(masks) & torch.tensor(named)[:, None, None]


def _read_png(path: Path, grid: tuple[int, int]) -> torch.Tensor | None:
    from PIL import Image

    if not path.exists():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of metadata nobody reads
            with Image.open(path, formats=["PNG"]) as image:
                values = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"cannot read the mask {path}: {error}") from error
    height, width = values.shape
    if abs(height * grid[1] - width * grid[0]) > max(height, width):
        raise ConfigError(
            f"the mask {path.name} is {width} x {height}, the pictures have {grid[1]} x {grid[0]} "
            "tokens; give masks the shape of the pictures"
        )
    return torch.from_numpy(values > 127)


def _from_boxes(text: str, subjects: Sequence[str], named: Sequence[Sequence[bool]]) -> Masks:
    masks = [torch.zeros(len(subjects), SIDE, SIDE, dtype=torch.bool) for _ in named]
    for box, label in parse_boxes(text):
        subject, _, picture = (part.strip() for part in label.partition("@"))
        if subject not in subjects:
            raise ConfigError(f"a box is of {subject!r}; the subjects are {', '.join(subjects)}")
        if picture and not (re.fullmatch(r"\d{1,6}", picture) and int(picture) < len(named)):
            raise ConfigError(f"a box is of picture {picture!r}; there are 0..{len(named) - 1}")
        index = subjects.index(subject)
        for i in [int(picture)] if picture else range(len(named)):
            if named[i][index]:
                masks[i][index] |= box.mask()
    return masks


def masks_from_maps(
    maps: torch.Tensor, words: Sequence[PromptWords], subjects: Sequence[str], kind: str
) -> Masks:
    """Masks from the attention to the subjects' words: smoothed, Otsu's threshold, made apart.

    A token that is high for two subjects belongs to the one with the larger share of its own map.

    Args:
        maps: `[P, T, h, w]`, as captured.
        words: of each picture, whose concepts are those of `subjects` it names.
        kind: of the sites they come from.
    """
    masks = []
    for own, prompt in zip(maps, words, strict=True):
        found = torch.zeros(len(subjects), *own.shape[1:], dtype=torch.bool)
        if prompt.concepts:
            groups = [sorted({t for word in concept for t in word}) for concept in prompt.concepts]
            heat = smooth(word_maps(own, prompt, kind).of(groups)).cpu()
            high = torch.stack([otsu(one) for one in heat])
            heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
            winner = torch.zeros_like(high).scatter_(0, heat.argmax(0)[None], True)
            found[[subjects.index(label) for label in prompt.labels]] = high & winner
        masks.append(found)
    return masks
