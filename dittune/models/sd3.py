"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`.

Every block has a joint attention over `[image, text]`. The first blocks of SD3.5-medium also have
an image-only self attention, `attn2`, which runs after the joint one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dittune.call import Site, TextAxis, TokenLayout

MODEL_CLASSES = ("SD3Transformer2DModel",)

# Attention-core calls in each stock processor.
CORE_CALLS = {"JointAttnProcessor2_0": 1, "FusedJointAttnProcessor2_0": 1}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "block_controlnet_hidden_states",
)


# Blocks whose maps of words agree best with segmentations (arXiv 2508.07519), by number of blocks
# and whether the model is a SD3.5.
WORD_LAYERS = {
    (24, False): (4, 5, 7, 8, 9),
    (24, True): (5, 7, 8, 9, 10),
    (38, True): (16, 18, 20, 21, 24),
}


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order."""
    found = []
    dual = 0
    count = len(model.transformer_blocks)
    middle = range(count // 3, -(-2 * count // 3))  # of a model nobody has measured
    sharp = WORD_LAYERS.get((count, model.config.qk_norm is not None), middle)
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}.attn"
        found.append(Site(i, "joint", name, block.attn.heads, shows_words=i in sharp))
        if block.attn2 is not None:
            found.append(Site(dual, "self", f"transformer_blocks.{i}.attn2", block.attn2.heads))
            dual += 1
    return found


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a picture the model can make, in pixels: whole patches that have a position."""
    unit = vae_scale_factor * model.config.patch_size
    return range(unit, unit * model.config.pos_embed_max_size + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """What the chunks of a batch are: rows are [uncond, cond] when guidance is on."""
    if kwargs.get("skip_layers") is not None:
        return ("skip",)  # the extra pass of the pipeline's own skip-layer guidance
    guided = pipe is not None and pipe.do_classifier_free_guidance
    return ("uncond", "cond") if guided else ("cond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    height, width = (side // model.config.patch_size for side in kwargs["hidden_states"].shape[-2:])
    image, text = height * width, kwargs["encoder_hidden_states"].shape[1]
    grid = (1, height, width)
    return {
        ("joint", 0): TokenLayout((0, image), (image, image + text), grid),
        ("self", 0): TokenLayout((0, image), (image, image), grid),
    }


def text_axes(pipe: Any, kwargs: dict[str, Any]) -> list[TextAxis]:
    """What the text tokens are: both CLIP encoders side by side, then T5 where it says anything."""
    text = kwargs["encoder_hidden_states"]
    clip = min(pipe.tokenizer_max_length, text.shape[1])
    axes = [TextAxis(pipe.tokenizer, "prompt", 0, clip)]
    if pipe.tokenizer_3 is not None and bool(text[:, clip:].any()):  # zeros stand for no T5
        axes.append(TextAxis(pipe.tokenizer_3, "prompt_3", clip, text.shape[1] - clip))
    return axes


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view; masks of inpainting follow it."""
    return kwargs["hidden_states"][:, : model.config.out_channels]


def move_keys(model: nn.Module, key: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Keys as they were at other places of the grid: the same, since none knows its place.

    What hidden states know of theirs, from the embedding of the patches, stays in them.
    """
    return key
