"""Tiny random video pipelines of the real classes, built without a hub."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dittune.samples.shapes import models, models_wan
from tests.tiny import FAMILIES, HEADS, WIDTH, clip_text_model, randomise, silent

TEXT = 32  # width of the text


def t5(kind=T5EncoderModel, config=T5Config):
    """Tokenizer and encoder, which sees its padding only if it is not masked."""
    tokenizer = models_wan.build_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "d_model": TEXT, "d_kv": 8, "d_ff": 32}
    return tokenizer, kind(config(**sizes, num_layers=1, num_heads=4)).eval()


def wan_transformer(**changes) -> WanTransformer3DModel:
    """Two blocks of two heads."""
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    transformer = WanTransformer3DModel(**{**config, **changes})
    randomise(transformer)
    return transformer.eval()


def wan(**changes) -> WanPipeline:
    """A tiny Wan 2.1: factor 4 in space and in time, patches of 2 x 2 latents."""
    torch.manual_seed(0)
    tokenizer, encoder = t5(UMT5EncoderModel, UMT5Config)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * 4,
        latents_std=[0.7] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    settings = {"transformer": wan_transformer(), "transformer_2": None, **changes}
    return silent(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            **settings,
        )
    )


def wan22() -> WanPipeline:
    """A tiny Wan 2.2: one denoiser for the noisy half of the steps, another for the rest."""
    torch.manual_seed(1)
    return wan(transformer_2=wan_transformer(num_layers=2), boundary_ratio=0.8)


def cogvideox() -> CogVideoXPipeline:
    """A tiny CogVideoX 5B: rotary positions, factor 8 in space and 4 in time."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    randomise(transformer)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    tokenizer, encoder = t5()
    return silent(
        CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=vae.eval(),
            transformer=transformer.eval(),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    """A tiny HunyuanVideo: a double and a single block, one refiner block, true guidance too."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    randomise(transformer)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    tokenizer = models_wan.build_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
    )
    tokenizer_2 = models.build_tokenizer()
    clip = clip_text_model(tokenizer_2).config
    clip.max_position_embeddings = 77
    return silent(
        HunyuanVideoPipeline(
            text_encoder=LlamaModel(llama).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder_2=CLIPTextModel(clip).eval(),
            tokenizer_2=tokenizer_2,
        )
    )


def ltx() -> LTXPipeline:
    """A tiny LTX-Video: factor 4 in space and in time, no patches."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    randomise(transformer)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    tokenizer, encoder = t5()
    return silent(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    )


def mochi() -> MochiPipeline:
    """A tiny Mochi 1: factor 8 in space and 6 in time, the text's padding cut off."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        max_sequence_length=8,
    )
    randomise(transformer)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        latent_channels=4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.1] * 4,
        latents_std=[0.7] * 4,
    )
    tokenizer, encoder = t5()
    return silent(
        MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    )


VIDEO_FAMILIES = {
    "wan": wan,
    "wan2.2": wan22,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "mochi": mochi,
}
ALL_FAMILIES = {**FAMILIES, **VIDEO_FAMILIES}


def wide(family: str) -> dict[str, int]:
    """Another size than the usual 32 x 32 that the family can make."""
    return {"height": 32 if family == "ltx" else 16, "width": 64}
