"""What a configuration means as arguments of a diffusers pipeline."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines.pipeline import MAX_SEED

MOST_IMAGES = 100_000  # of a prompt


def call_settings(pipe: Any, config: RunConfig) -> dict[str, Any]:
    """The arguments of a call that a configuration decides, but prompt and seed."""
    found: dict[str, Any] = {"num_inference_steps": config.steps}
    if config.guidance_scale is not None:
        found |= guidance(pipe, config.guidance_scale)
    if config.negative_prompt:
        found["negative_prompt"] = config.negative_prompt
    found["width"], found["height"] = image_size(config) or (None, None)
    if makes_videos(pipe):
        found |= {"num_frames": config.frames, "output_type": "pil"}
    return {name: value for name, value in found.items() if value is not None}


def makes_videos(pipe: Any) -> bool:
    """Whether a diffusers pipeline makes videos, not pictures."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def guidance(pipe: Any, scale: float) -> dict[str, Any]:
    """Arguments that set classifier-free guidance to `scale`; 1 is off.

    That is `guidance_scale` in most pipelines. In those of FLUX it is an input of a distilled
    model; a FLUX that was not distilled has true guidance only, which wants a negative prompt.
    """
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    has_true = "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
    if has_true and not getattr(config, "guidance_embeds", False):
        return {"true_cfg_scale": scale, "negative_prompt": ""}
    return {"guidance_scale": scale}


def image_size(config: RunConfig) -> tuple[int, int] | None:
    """(width, height) of a configuration, None for the model's own size.

    Raises:
        ConfigError: `size` is not written `SIDE` or `WIDTHxHEIGHT`.
    """
    if not config.size:
        return None
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", config.size)
    if not match:
        raise ConfigError(f"size is written SIDE or WIDTHxHEIGHT in pixels, got {config.size!r}")
    width = int(match[1])
    return width, int(match[2] or width)


def check_numbers(config: RunConfig) -> None:
    """What can be refused of numbers and size before a model is loaded.

    Raises:
        ConfigError: one that is out of range.
    """
    for name, least in (("num_images", 1), ("steps", 1), ("seed", 0), ("frames", 1), ("fps", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if config.num_images > MOST_IMAGES:  # each has its name before the first is made
        raise ConfigError(f"num_images must be at most {MOST_IMAGES}, got {config.num_images}")
    if config.seed is not None and config.seed + config.num_images - 1 > MAX_SEED:
        raise ConfigError(f"seed must be at most {MAX_SEED}, got {config.seed}")
    if config.guidance_scale is not None and not math.isfinite(config.guidance_scale):
        raise ConfigError(f"guidance_scale must be a finite number, got {config.guidance_scale}")
    image_size(config)


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not empty, without blanks around them.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]
