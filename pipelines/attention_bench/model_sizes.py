"""Video denoisers of true width and length, a few layers deep, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Size(NamedTuple):
    """One model at one size of video.

    Attributes:
        name: as in `--only`.
        build: of the class and configuration, with as many layers of each kind as given.
        layers: of each kind of block that are timed; attribute of the model, and how many.
        depth: how many times as many the real model has.
        inputs: arguments of one call.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: dict[str, int]
    depth: float
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]


def wan(name: str, heads: int, width: int, depth: int, latents: tuple[int, int, int]) -> Size:
    """Wan 2.1: patches of 2 x 2 latents, 512 tokens of text in cross attention."""

    def build() -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(num_attention_heads=heads, ffn_dim=width, num_layers=3)

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, *latents, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
            "timestep": torch.full((1,), 500, device=device),
        }

    return Size(name, build, {"blocks": 3}, depth / 3, inputs)


def hunyuan(name: str, latents: tuple[int, int, int]) -> Size:
    """HunyuanVideo: 20 double and 40 single blocks, 256 tokens of text, of which 40 are real."""

    def build() -> nn.Module:
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=2)

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, *latents, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 256, 4096, device=device, dtype=dtype),
            "encoder_attention_mask": (torch.arange(256, device=device) < 40)[None].to(dtype),
            "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
            "timestep": torch.full((1,), 500, device=device),
            "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        }

    layers = {"transformer_blocks": 1, "single_transformer_blocks": 2}
    return Size(name, build, layers, 20, inputs)


GPU_SIZES = (
    wan("wan-1.3b-480p", 12, 8960, 30, (21, 60, 104)),
    wan("wan-1.3b-720p", 12, 8960, 30, (21, 90, 160)),
    wan("wan-14b-480p", 40, 13824, 40, (21, 60, 104)),
    wan("wan-14b-720p", 40, 13824, 40, (21, 90, 160)),
    hunyuan("hunyuan-720p", (33, 90, 160)),
)
CPU_SIZES = (wan("wan-narrow", 2, 1536, 30, (3, 30, 52)),)  # heads of true size, but few
