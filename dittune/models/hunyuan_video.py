"""HunyuanVideo: `HunyuanVideoTransformer3DModel`.

Double blocks, then single blocks, both with a joint attention over `[video, text]` under a mask of
the text's padding; their layers are counted through. The refiner of the text, which comes first, is
attention too, but to no video: it is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TokenLayout

MODEL_CLASSES = ("HunyuanVideoTransformer3DModel",)

# Attention-core calls in each stock processor.
CORE_CALLS = {"HunyuanVideoAttnProcessor2_0": 1}

# Modules whose attention is none of ours.
LEFT_ALONE = ("context_embedder",)

# Arguments of the denoiser whose first axis is the batch.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "timestep",
    "guidance",
)

MAX_SIDE = 2**20  # rotary positions have no end


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    blocks = [
        (f"{name}.{i}.attn", block.attn.heads)
        for name in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(model, name))
    ]
    return [Site(i, "joint", name, heads) for i, (name, heads) in enumerate(blocks)]


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a frame the model can make, in pixels; the pipelines insist on multiples of 16."""
    unit = vae_scale_factor * model.config.patch_size
    unit = unit if unit % 16 == 0 else 16
    return range(unit, MAX_SIDE + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """Distilled guidance is one call a step; true guidance adds one for the negative prompt."""
    return ("cond",) if call == 0 else ("uncond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    frames, height, width = kwargs["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    grid = (frames // model.config.patch_size_t, height // patch, width // patch)
    video = grid[0] * grid[1] * grid[2]
    end = video + kwargs["encoder_hidden_states"].shape[1]
    return {("joint", 0): TokenLayout((0, video), (video, end), grid, is_masked=True)}


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view; an image's latents follow it."""
    return kwargs["hidden_states"][:, : model.config.out_channels]
