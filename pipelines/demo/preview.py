"""What latents look like before they are done: noisy at first, but decoded as at the end."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image


def decode(
    pipe: Any, latents: torch.Tensor, width: int | None, height: int | None
) -> Image.Image | None:
    """The last picture of a batch of latents; None for those of a video.

    Args:
        width: in pixels, None for the model's own; and so is `height`. Only packed latents, as of
            FLUX, need them.
    """
    if latents.ndim == 5:
        return None
    latents = latents[-1:]
    if latents.ndim == 3:
        own = getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, height or own, width or own, pipe.vae_scale_factor)
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]
