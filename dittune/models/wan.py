"""Wan 2.1 and 2.2: `WanTransformer3DModel`, text to video and image to video.

A block has a self attention over all tokens of the video, row-major by frame, then a cross
attention to the text. In image to video of 2.1 the latter has a second branch, to the tokens of the
image, which is left alone. Wan 2.2 has two denoisers, one for the noisy steps and one for the rest;
their layers are counted alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TokenLayout

MODEL_CLASSES = ("WanTransformer3DModel",)

# Attention-core calls in each stock processor: that to the image, where there is one, and the main
# one. Fused projections keep the same processor.
CORE_CALLS = {"WanAttnProcessor": 2}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_hidden_states_image")


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    return [
        Site(i, kind, f"blocks.{i}.{name}", getattr(block, name).heads)
        for i, block in enumerate(model.blocks)
        for kind, name in (("self", "attn1"), ("cross", "attn2"))
    ]


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a frame the model can make, in pixels; the pipelines insist on multiples of 16."""
    unit = vae_scale_factor * model.config.patch_size[1]
    unit = unit if unit % 16 == 0 else 16
    return range(unit, unit * model.config.rope_max_seq_len + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """Guidance makes two calls a step, the conditional one first."""
    return ("cond",) if call == 0 else ("uncond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    frames, height, width = (
        side // patch
        for side, patch in zip(
            kwargs["hidden_states"].shape[-3:], model.config.patch_size, strict=True
        )
    )
    video, text = frames * height * width, kwargs["encoder_hidden_states"].shape[1]
    grid = (frames, height, width)
    return {
        ("self", 0): TokenLayout((0, video), (video, video), grid),
        ("cross", 0): TokenLayout((0, video), (0, text), grid),
    }


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view; an image's latents follow it."""
    return kwargs["hidden_states"][:, : model.config.out_channels]
