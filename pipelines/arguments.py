"""What a configuration means as arguments of a diffusers pipeline."""

from __future__ import annotations

import inspect
import re
from typing import Any

from dittune.config import RunConfig
from dittune.errors import ConfigError


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
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", config.size)
    if not match:
        raise ConfigError(f"size is written SIDE or WIDTHxHEIGHT in pixels, got {config.size!r}")
    width = int(match[1])
    return width, int(match[2] or width)
