"""CogVideoX 1.0 and 1.5: `CogVideoXTransformer3DModel`.

Every block has a joint attention over `[text, video]`, the video row-major by frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TokenLayout

MODEL_CLASSES = ("CogVideoXTransformer3DModel",)

# Attention-core calls in each stock processor.
CORE_CALLS = {"CogVideoXAttnProcessor2_0": 1, "FusedCogVideoXAttnProcessor2_0": 1}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = ("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs")

MAX_SIDE = 2**20  # positions are made for any side


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    return [
        Site(i, "joint", f"transformer_blocks.{i}.attn1", block.attn1.heads)
        for i, block in enumerate(model.transformer_blocks)
    ]


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a frame the model can make, in pixels: whole patches of latents."""
    unit = vae_scale_factor * model.config.patch_size
    return range(unit, MAX_SIDE + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """What the chunks of a batch are: rows are [uncond, cond] when guidance is on."""
    guided = pipe is not None and pipe.guidance_scale > 1
    return ("uncond", "cond") if guided else ("cond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    frames, _, height, width = kwargs["hidden_states"].shape[-4:]
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    grid = (frames // patch_t, height // patch, width // patch)
    text = kwargs["encoder_hidden_states"].shape[1]
    end = text + grid[0] * grid[1] * grid[2]
    return {("joint", 0): TokenLayout((text, end), (0, text), grid)}


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view; an image's latents follow it."""
    return kwargs["hidden_states"][:, :, : model.config.out_channels]
