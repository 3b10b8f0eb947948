"""Builders of the small video models trained on clips, all of diffusers' own classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from dittune.samples.shapes import models, motion

LATENT_CHANNELS = 24
TOKENS = 8  # a side of the latents of one frame; each of them is a token
CAPTION_TOKENS = 26  # tokens of the longest caption, its end included


def build_autoencoder(width: int = 24) -> AutoencoderKLWan:
    """Factor 8 in space and 4 in time: 9 frames of 64 x 64 pixels become 3 x 8 x 8 latents.

    It works on patches of 2 x 2 pixels with residual shortcuts, as that of Wan 2.2: a quarter of
    the cost, and soon trained. The attention in the middle is left out (its projection is zero and
    stays so), so what is learned on crops holds for whole frames.
    """
    vae = AutoencoderKLWan(
        base_dim=width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for half in (vae.encoder, vae.decoder):
        for attention in half.mid_block.attentions:
            attention.requires_grad_(False)
            torch.nn.init.zeros_(attention.proj.weight)
            torch.nn.init.zeros_(attention.proj.bias)
    return vae


def build_tokenizer() -> T5Tokenizer:
    return models.build_t5_tokenizer(motion.vocabulary())


def text_inputs(tokenizer: T5Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of all a caption can say and one token of padding, `[B, 27]` each."""
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    found = tokenizer(texts, max_length=CAPTION_TOKENS + 1, **settings)
    return found.input_ids, found.attention_mask


def build_umt5(tokenizer: T5Tokenizer, width: int = 128, layers: int = 3) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 32,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_wan_transformer(
    width: int = 128, layers: int = 8, text_width: int = 128
) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text_width,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=64,
    )
