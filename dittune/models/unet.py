"""Stable Diffusion 1.x, 2.x and XL: `UNet2DConditionModel`.

A transformer block has a self attention over the image, then a cross attention to the text. The
grid is halved on the way down and restored on the way up; the stage of a site counts the halvings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dittune.call import Site, TextAxis, TokenLayout
from dittune.errors import UnsupportedModelError

MODEL_CLASSES = ("UNet2DConditionModel",)

# Attention-core calls in each stock processor.
CORE_CALLS = {"AttnProcessor2_0": 1, "FusedAttnProcessor2_0": 1}

# Arguments of the denoiser whose first axis is the batch.
BATCHED = (
    "sample",
    "encoder_hidden_states",
    "timestep",
    "timestep_cond",
    "class_labels",
    "added_cond_kwargs",
    "attention_mask",
    "encoder_attention_mask",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

# The grid of one token for 32 x 32 pixels, 16 x 16 in a picture of 512: its maps show words best
# (attend-and-excite, arXiv 2301.13826). Models that do not go as deep have them at their deepest.
WORD_STAGE = 2

MAX_SIDE = 2**20  # convolutions and attention without positions have no end


def sites(model: nn.Module) -> list[Site]:
    """Attention sites in execution order: down, middle, up; each kind is counted by itself.

    Raises:
        UnsupportedModelError: attention outside of the usual transformer blocks.
    """
    found: list[Site] = []
    layers: Counter[str] = Counter()
    for path, stage in _transformers(model):
        for i in range(len(model.get_submodule(path).transformer_blocks)):
            for name in (f"{path}.transformer_blocks.{i}.{attn}" for attn in ("attn1", "attn2")):
                parent, _, attribute = name.rpartition(".")
                attn = getattr(model.get_submodule(parent), attribute)
                if attn is None:
                    continue
                kind = "cross" if attn.is_cross_attention else "self"
                found.append(Site(layers[kind], kind, name, attn.heads, stage))
                layers[kind] += 1
    stages = [site.stage for site in found if site.kind == "cross" and site.stage <= WORD_STAGE]
    found = [
        replace(site, shows_words=site.kind == "cross" and site.stage == max(stages, default=0))
        for site in found
    ]
    known = {site.name for site in found}
    for name, module in model.named_modules():
        if hasattr(module, "processor") and name not in known:
            raise UnsupportedModelError(
                f"{name} is no attention of a block dittune knows; of the models of this class "
                "it knows Stable Diffusion 1.x, 2.x and XL"
            )
    return found


def _transformers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Module path and stage of each stack of transformer blocks, in execution order."""
    stage = 0
    downs = [(f"down_blocks.{i}", block) for i, block in enumerate(model.down_blocks)]
    ups = [(f"up_blocks.{i}", block) for i, block in enumerate(model.up_blocks)]
    for path, block in [*downs, ("mid_block", model.mid_block), *ups]:
        for i, transformer in enumerate(getattr(block, "attentions", ())):
            if hasattr(transformer, "transformer_blocks"):
                yield f"{path}.attentions.{i}", stage
        stage += getattr(block, "downsamplers", None) is not None
        stage -= getattr(block, "upsamplers", None) is not None


def sides(model: nn.Module, vae_scale_factor: int) -> range:
    """Sides of a picture the model can make, in pixels; the pipelines insist on multiples of 8."""
    unit = math.lcm(vae_scale_factor, 8)
    return range(unit, MAX_SIDE + 1, unit)


def roles(pipe: Any, kwargs: dict[str, Any], call: int) -> tuple[str, ...]:
    """What the chunks of a batch are: rows are [uncond, cond] when guidance is on."""
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    return ("uncond", "cond") if guided else ("cond",)


def layouts(model: nn.Module, kwargs: dict[str, Any]) -> dict[tuple[str, int], TokenLayout]:
    """Token layout of each kind and stage of site for the inputs of one denoiser call."""
    height, width = kwargs["sample"].shape[-2:]
    text = kwargs["encoder_hidden_states"].shape[1]
    found = {}
    for stage in range(len(model.down_blocks)):
        image, grid = height * width, (1, height, width)
        found["self", stage] = TokenLayout((0, image), (image, image), grid)
        found["cross", stage] = TokenLayout((0, image), (0, text), grid)
        # A padded convolution of stride 2 rounds up; the way up takes its sizes from the way down.
        height, width = (-(-side // 2) for side in (height, width))
    return found


def text_axes(pipe: Any, kwargs: dict[str, Any]) -> list[TextAxis]:
    """What the text tokens are: those of CLIP; the two encoders of XL stand side by side."""
    tokenizer = pipe.tokenizer or pipe.tokenizer_2  # the refiner of XL has the second one only
    return [TextAxis(tokenizer, "prompt", 0, kwargs["encoder_hidden_states"].shape[1])]


def latents(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The part of the sample that the scheduler steps, a view; masks of inpainting follow it."""
    return kwargs["sample"][:, : model.config.out_channels]


def move_keys(model: nn.Module, key: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Keys as they were at other places of the grid: the same, since none knows its place."""
    return key
