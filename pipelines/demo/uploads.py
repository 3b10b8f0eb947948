"""Masks that users upload: looked at before any of it is used."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dittune.errors import ConfigError
from dittune.subjects.masks import mask_file

MASKS = "masks"  # the folder of a user's masks, in settings and beside them
MOST_FILES, MOST_BYTES, MOST_SIDE = 16, 2 * 2**20, 4096


def check_mask(path: Path) -> None:
    """Refuse what is no PNG of a sensible size.

    Raises:
        ConfigError: and why.
    """
    name = path.name
    if path.stat().st_size > MOST_BYTES:
        size = path.stat().st_size / 2**20
        raise ConfigError(f"{name} has {size:.1f} MB; a mask has at most {MOST_BYTES // 2**20} MB")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if max(image.size) > MOST_SIDE:
                width, height = image.size
                raise ConfigError(
                    f"{name} is {width}x{height}; a mask has at most {MOST_SIDE} pixels a side"
                )
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is no PNG picture, or a damaged one; save it as PNG") from error


def keep_masks(paths: Sequence[str], folder: Path) -> list[Path]:
    """Copy masks, one for each subject in their order, to where the methods look for them.

    Raises:
        ConfigError: too many, or one that `check_mask` refuses.
    """
    if len(paths) > MOST_FILES:
        raise ConfigError(f"at most {MOST_FILES} masks, got {len(paths)}")
    for path in paths:
        check_mask(Path(path))
    kept = [folder / MASKS / mask_file(0, i) for i in range(len(paths))]
    for path, place in zip(paths, kept, strict=True):
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    return kept
