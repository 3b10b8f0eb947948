"""`shapes-flux`: FLUX's double and single blocks with a CLIP and a T5 text encoder.

FLUX does not mask padding, and its pipeline pads T5's text to 512 tokens unless told otherwise. All
padding tokens are equal here (`models.build_t5` says why), and FLUX gives text no position, so they
stay equal through every block: training shows the model one of them and adds the logarithm of their
number to its attention logit, which is exact. The number varies in training, so that
`max_sequence_length` may be anything from 64 to 512.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from transformers import CLIPTextModel

from dittune.samples.shapes import data, models, noising

TEXT_LENGTHS = (64, 128, 256, 512)  # values of `max_sequence_length` seen in training
WIDTH, DOUBLE_BLOCKS, SINGLE_BLOCKS = 128, 2, 4


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Each 2 x 2 patch becomes a token: `[B, C, H, W]` -> `[B, H W / 4, 4 C]`."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def padding_bias(length: int) -> torch.Tensor:
    """What to add to attention logits so that the last text token counts as all the padding."""
    bias = torch.zeros(1, 1, 1, models.T5_CAPTION + 1 + 64)
    bias[..., models.T5_CAPTION] = math.log(length - models.T5_CAPTION)
    return bias


class FluxBundle(nn.Module):
    """What is trained together: transformer, both text encoders, and a label head to be dropped."""

    parts: ClassVar = ("transformer", "text_encoder", "text_encoder_2")
    matrices: ClassVar = (
        r"\.attn\.|\.ff\.|\.ff_context\.|single_transformer_blocks\.\d+\.proj_"
        r"|\.mlp\.|self_attn|SelfAttention\.[qkvo]\.|DenseReluDense"
    )
    loss_name: ClassVar = "flow"
    autoencoder: ClassVar = "autoencoder"
    has_shifted_latents: ClassVar = True
    compiles: ClassVar = True

    def __init__(self):
        super().__init__()
        self.tokenizer = models.build_tokenizer()
        self.tokenizer_2 = models.build_t5_tokenizer()
        self.text_encoder = models.build_text_encoder(self.tokenizer, kind=CLIPTextModel)
        self.text_encoder_2 = models.build_t5(self.tokenizer_2)
        self.transformer = models.build_flux_transformer(WIDTH, DOUBLE_BLOCKS, SINGLE_BLOCKS)
        self.label_head = nn.Linear(WIDTH, data.LABELS)
        self.tokens_seen = None
        labelled = self.transformer.single_transformer_blocks[SINGLE_BLOCKS // 2 - 1]
        labelled.register_forward_hook(self._keep)
        # FLUX computes its time in the type of these: in bfloat16, 600 and 601 would be the same.
        self.transformer.x_embedder.register_forward_hook(lambda _, args, out: out.float())
        side = torch.arange(8.0)
        positions = torch.cartesian_prod(torch.zeros(1), side, side)
        self.register_buffer("image_positions", positions, persistent=False)

    def _keep(self, module, args, output):
        self.tokens_seen = output[1]

    def prepare(self, latents, texts, generator):
        noisy, sigma, target = noising.flow_matching(latents, generator)
        length = TEXT_LENGTHS[int(torch.randint(len(TEXT_LENGTHS), (), generator=generator))]
        ids = models.clip_ids(self.tokenizer, texts)
        words = models.t5_ids(self.tokenizer_2, texts)
        return (pack(noisy), sigma, ids, words, padding_bias(length)), pack(target)

    def forward(self, noisy, sigma, ids, words, bias):
        pooled = self.text_encoder(ids).pooler_output  # (B, 64)
        text = self.text_encoder_2(words).last_hidden_state
        text = text[:, : models.T5_CAPTION + 1]  # (B, 24 + 1, 128), the last of them padding
        velocity = self.transformer(
            noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self.image_positions,
            txt_ids=torch.zeros(text.shape[1], 3),
            joint_attention_kwargs={"attention_mask": bias},
        ).sample
        return velocity, self.label_head(self.tokens_seen)

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        models.share_capitals(self.text_encoder_2, self.tokenizer_2)
        return FluxPipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            vae=vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
        )
