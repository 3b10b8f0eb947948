"""Mochi 1: `MochiTransformer3DModel`.

Every block has a joint attention over `[video, text]`. The stock processor computes one row of the
batch after the other, each without the padding of its text; methods see each row with the padding
back, under a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TokenLayout

MODEL_CLASSES = ("MochiTransformer3DModel",)

# Attention-core calls in each stock processor, of which it is a loop over rows.
CORE_CALLS = {"MochiAttnProcessor2_0": 1}
ROWS_APART = True

# Modules whose attention is none of ours.
LEFT_ALONE = ("time_embed",)

# Arguments of the denoiser whose first axis is the batch.
BATCHED = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep")

MAX_SIDE = 2**20  # rotary positions are made for any side


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
    guided = pipe is not None and pipe.do_classifier_free_guidance
    return ("uncond", "cond") if guided else ("cond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    frames, height, width = kwargs["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    grid = (frames, height // patch, width // patch)
    video = grid[0] * grid[1] * grid[2]
    end = video + kwargs["encoder_hidden_states"].shape[1]
    return {("joint", 0): TokenLayout((0, video), (video, end), grid, is_masked=True)}


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps: all of it."""
    return kwargs["hidden_states"]
