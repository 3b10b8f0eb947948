"""Builders of the small models trained on the Shapes world, all of diffusers' own classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
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
T5_CAPTION = 24  # tokens of the longest caption, its end included
T5_REACH = 15  # how many following tokens a T5 token sees


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


def clip_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids as the pipelines make them, `[B, 32]`."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_text_encoder(
    tokenizer: CLIPTokenizer,
    width: int = 64,
    kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModelWithProjection,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    return kind(
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


def build_t5_tokenizer(vocabulary: Sequence[str] = ()) -> T5Tokenizer:
    """T5's unigram tokenizer in which each word of the world, capitalised or not, is one token.

    Any other ASCII text still encodes, letter by letter.

    Args:
        vocabulary: words, and the comma; those of still pictures if empty.
    """
    known = vocabulary or world.vocabulary()
    words = [word if word == "," else "\u2581" + word for word in known]
    words += [capital(word) for word in words if capital(word) != word]
    letters = ["\u2581", *(chr(i) for i in range(33, 127) if chr(i) not in words)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def capital(piece: str) -> str:
    """The piece with its first letter capitalised."""
    return piece[0] + piece[1:].capitalize()


def t5_ids(tokenizer: T5Tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids with as much padding as a caption can see, `[B, 39]`."""
    length = T5_CAPTION + T5_REACH
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def build_t5(tokenizer: T5Tokenizer, width: int = 128, layers: int = 3) -> T5EncoderModel:
    """A small T5 encoder whose padding stays exactly zero, wherever it stands.

    `FluxPipeline` masks no padding, neither in T5 nor in FLUX. Here the embedding of padding is
    zero, no layer of T5 has a bias, and the relative positions let a token see only itself and the
    next `T5_REACH`: what padding sees is padding, so its output is zero at any length. The excluded
    positions have a logit so low that they get no gradient, hence stay excluded.
    """
    half = 2 * (T5_REACH + 1)  # buckets of one direction; its first half are exact distances
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=width // 32,
        relative_attention_num_buckets=2 * half,
        relative_attention_max_distance=half,
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight[1 : half + 1] = -1e4  # what came before
        bias.weight[half + 1 + T5_REACH :] = -1e4  # what is too far ahead
        encoder.shared.weight[tokenizer.pad_token_id] = 0
    encoder.encoder.embed_tokens.padding_idx = tokenizer.pad_token_id  # no gradient for this row
    return encoder


@torch.no_grad()
def share_capitals(encoder: T5EncoderModel, tokenizer: T5Tokenizer) -> None:
    """Let a capitalised word mean what it means in a caption, where there are no capitals."""
    vocab = tokenizer.get_vocab()
    for piece, index in vocab.items():
        if capital(piece) in vocab:
            encoder.shared.weight[vocab[capital(piece)]] = encoder.shared.weight[index]


def build_flux_transformer(
    width: int = 128, double_blocks: int = 2, single_blocks: int = 4, pooled_width: int = 64
) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=128,
        pooled_projection_dim=pooled_width,
        axes_dims_rope=(4, 14, 14),
    )


def build_unet(widths: tuple[int, int] = (32, 128), text_width: int = 128) -> UNet2DConditionModel:
    """Self and cross attention at 16 x 16 (2 heads) and 8 x 8 (4 heads)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=(2, 4),  # the number of heads, in fact
        cross_attention_dim=text_width,
    )


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
