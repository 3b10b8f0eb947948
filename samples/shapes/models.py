"""Builders of the small models trained on the Shapes world, all of diffusers' own classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dittune.samples.shapes import world

LATENT_CHANNELS = 4
CAPTION_TOKENS = 32  # length of the text axis of one CLIP encoder


def build_autoencoder() -> AutoencoderKL:
    """Factor 4, 4 channels: 64 x 64 pixels become 16 x 16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=world.CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer in which each word of the world is one token.

    Any other text still encodes, byte by byte.
    """
    symbols = list(bytes_to_unicode().values())
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    for word in world.vocabulary():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # what the merges so far make of it, in order of their rank
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:  # later merges rank lower, so they leave earlier words whole
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    tokenizer.model_max_length = CAPTION_TOKENS
    return tokenizer


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each neighbouring `pair` in `pieces`."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_silent_t5(width: int = 128) -> T5EncoderModel:
    """A T5 encoder without layers whose output is zero, which is what SD3 uses without T5.

    `StableDiffusion3Pipeline.from_pretrained` insists on the component, even on its absence.
    """
    config = T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=0, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def build_silent_t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_sd3_transformer(width: int = 128, layers: int = 6, text_width: int = 128):
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
