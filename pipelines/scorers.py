"""Who judges what a pipeline makes: the Shapes scorer of pictures, or that of videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines.arguments import image_size, makes_videos
from dittune.samples.shapes import motion, score, world
from dittune.samples.shapes.score_video import score_video


class Answers(NamedTuple):
    """What a scorer says of one picture or video; the fields of `evaluate.ImageScore`."""

    num_objects: int
    success: bool
    objects_right: bool
    stated_right: bool
    extra: int
    flicker: float = math.nan


class Scorer(NamedTuple):
    """How prompts are read, what is made of them is judged, and shown as one picture.

    Attributes:
        modality: of the prompt sets: `image` or `video`.
    """

    modality: str
    parse: Callable[[str], Any]
    judge: Callable[[Any, str], Answers]
    show: Callable[[Any], Image.Image]


def scorer_for(pipe: Any) -> Scorer:
    """The scorer of what a diffusers pipeline makes."""
    return VIDEOS if makes_videos(pipe) else PICTURES


def check_readable(config: RunConfig) -> None:
    """Refuse what the scorers cannot read, before it is made.

    Raises:
        ConfigError: pictures that are not square or whose side is no multiple of 64, one frame.
    """
    width, height = image_size(config) or (world.CANVAS, world.CANVAS)
    if width != height or width % world.CANVAS:
        raise ConfigError(
            f"the Shapes scorer reads squares with a side that is a multiple of {world.CANVAS}, "
            f"got {width}x{height}"
        )
    if config.frames == 1:
        raise ConfigError("the Shapes scorer reads videos of 2 frames and more, got frames 1")


def _judge_picture(image: Image.Image, prompt: str) -> Answers:
    found = score.score(_pixels(image), request := world.parse(prompt))
    stated = (*found.sizes, found.relation, found.background)
    return Answers(
        len(request.objects),
        found.success,
        all(found.objects),
        all(answer is not False for answer in stated),
        found.extra,
    )


def _judge_video(frames: Sequence[Image.Image], prompt: str) -> Answers:
    """Objects are right if they keep their identity in every frame."""
    found = score_video([_pixels(frame) for frame in frames], request := motion.parse(prompt))
    stated = (*found.motions, *found.sizes, found.background)
    return Answers(
        len(request.objects),
        found.success,
        all(found.kept),
        all(answer is not False for answer in stated),
        found.extra,
        round(found.flicker, 4),
    )


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    """The first, the middle and the last frame side by side."""
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    width, height = chosen[0].size
    strip = Image.new("RGB", (3 * width, height))
    for i, frame in enumerate(chosen):
        strip.paste(frame, (i * width, 0))
    return strip


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


PICTURES = Scorer("image", world.parse, _judge_picture, lambda image: image)
VIDEOS = Scorer("video", motion.parse, _judge_video, _strip)
