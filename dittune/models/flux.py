"""FLUX.1: `FluxTransformer2DModel`.

Double blocks come first, whose text and image streams meet in one joint attention; then single
blocks, whose attention gets the joined sequence. Both attend over `[text, image]`, so the layers of
both are counted through. A reference picture (Kontext) follows the picture that is being made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TextAxis, TokenLayout

MODEL_CLASSES = ("FluxTransformer2DModel",)

# Attention-core calls in each stock processor; fused projections keep the same one.
CORE_CALLS = {"FluxAttnProcessor": 1}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "guidance",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)

# Double blocks whose maps of words agree best with segmentations (arXiv 2508.07519), by number of
# double blocks.
WORD_LAYERS = {19: (11, 12, 14, 17, 18)}

MAX_SIDE = 2**20  # rotary positions have no end


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    blocks = [
        (f"{name}.{i}.attn", block)
        for name in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(model, name))
    ]
    double = len(model.transformer_blocks)
    sharp = WORD_LAYERS.get(double, range(double // 2, double))  # of a model nobody has measured
    return [
        Site(i, "joint", name, block.attn.heads, shows_words=i in sharp)
        for i, (name, block) in enumerate(blocks)
    ]


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a picture the model can make, in pixels: the pipeline packs 2 x 2 latents."""
    unit = vae_scale_factor * 2
    return range(unit, MAX_SIDE + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """Distilled guidance is one call a step; true guidance adds one for the negative prompt.

    Not every pipeline of the family names the two calls, but all make the conditional one first.
    """
    return ("cond",) if call == 0 else ("uncond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    text = kwargs["encoder_hidden_states"].shape[1]
    height, width = _grid(kwargs["img_ids"])
    end = text + height * width
    references = kwargs["img_ids"].shape[-2] - height * width
    return {("joint", 0): TokenLayout((text, end), (0, text), (1, height, width), references)}


def text_axes(pipe: Any, kwargs: dict[str, Any]) -> list[TextAxis]:
    """What the text tokens are: those of T5. CLIP gives one vector for the whole prompt."""
    return [TextAxis(pipe.tokenizer_2, "prompt_2", 0, kwargs["encoder_hidden_states"].shape[1])]


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view.

    The tokens of a reference picture, and the channels of a mask, follow it.
    """
    height, width = _grid(kwargs["img_ids"])
    return kwargs["hidden_states"][:, : height * width, : model.out_channels]


def move_keys(model: nn.Module, key: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Keys as they were at other places of the grid, whose rotary embedding is turned on.

    Args:
        key: `[..., n, D]`, after the embedding.
        shift: `[n, 2]`, rows and columns each key is moved by.

    Source: RoFormer (arXiv 2104.09864), eq. 16: rotations add up.
    """
    angles = [torch.zeros(len(shift), model.pos_embed.axes_dim[0] // 2, dtype=torch.float64)]
    for axis, width in enumerate(model.pos_embed.axes_dim[1:]):
        power = torch.arange(0, width, 2, dtype=torch.float64) / width
        moved = shift[:, axis].double().cpu()
        angles.append(moved[:, None] * model.pos_embed.theta**-power)
    angle = torch.cat(angles, 1)  # (n, D / 2)
    dtype = torch.promote_types(key.dtype, torch.float32)
    pairs = torch.view_as_complex(key.to(dtype).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angle), angle).to(pairs.dtype).to(key.device)
    return torch.view_as_real(pairs * turn).flatten(-2).to(key.dtype)


def _grid(ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the first picture in ids `[S, 3]`, each `(picture, row, column)`.

    The tokens of its first row are counted: half precision rounds large ids.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).cpu()
    picture = ids[ids[:, 0] == ids[0, 0]]
    width = int((picture[:, 1] == picture[0, 1]).sum())
    return len(picture) // width, width
