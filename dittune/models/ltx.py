"""LTX-Video: `LTXVideoTransformer3DModel`.

A block has a self attention over all tokens of the video, row-major by frame, then a cross
attention to the text under a mask of its padding. The denoiser gets the video packed into tokens;
frames of conditions may come before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TokenLayout

MODEL_CLASSES = ("LTXVideoTransformer3DModel",)

# Attention-core calls in each stock processor; fused projections keep the same one.
CORE_CALLS = {"LTXVideoAttnProcessor": 1}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "video_coords",
)

MAX_SIDE = 2**20  # rotary positions have no end


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    return [
        Site(i, kind, f"transformer_blocks.{i}.{name}", getattr(block, name).heads)
        for i, block in enumerate(model.transformer_blocks)
        for kind, name in (("self", "attn1"), ("cross", "attn2"))
    ]


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a frame the model can make, in pixels; the pipelines insist on multiples of 32."""
    return range(32, MAX_SIDE + 1, 32)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """What the chunks of a batch are: rows are [uncond, cond] when guidance is on."""
    guided = pipe is not None and pipe.do_classifier_free_guidance
    return ("uncond", "cond") if guided else ("cond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    patch, first = model.config.patch_size, 0
    if kwargs.get("video_coords") is not None:
        first, grid = _from_coords(kwargs["video_coords"][0].cpu())
    else:
        grid = (
            kwargs["num_frames"] // model.config.patch_size_t,
            kwargs["height"] // patch,
            kwargs["width"] // patch,
        )
    last = first + grid[0] * grid[1] * grid[2]
    text = kwargs["encoder_hidden_states"].shape[1]
    return {
        ("self", 0): TokenLayout((first, last), (last, last), grid),
        ("cross", 0): TokenLayout((first, last), (0, text), grid),
    }


def _from_coords(coords: torch.Tensor) -> tuple[int, tuple[int, int, int]]:
    """First token of the video, and its grid, from the time, row and column of each token `[3, S]`.

    Frames of conditions are as large as those of the video, come before it, and are later than 0.
    """
    size = _alike_at_the_end(coords[0])  # of a frame
    width = min(size, _alike_at_the_end(coords[1]))
    times = coords[0, ::size]
    before = int((times == times.min()).nonzero()[-1])
    return before * size, (len(times) - before, size // width, width)


def _alike_at_the_end(numbers: torch.Tensor) -> int:
    return int((numbers == numbers[-1]).flip(0).long().cumprod(0).sum())


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps: all of it."""
    return kwargs["hidden_states"]
