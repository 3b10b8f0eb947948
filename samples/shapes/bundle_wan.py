"""`shapes-wan`: Wan's video transformer and its UMT5 text encoder, trained by flow matching.

`WanPipeline` pads the text to 512 tokens and sets the padding to zero, and nothing masks it in the
cross attention. All of it is equal there, so training shows the model one of these tokens and adds
the logarithm of their number to its attention logit, which is exact. The number varies in training,
so that `max_sequence_length` may be anything from 64 to 512.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

from dittune.samples.shapes import data, models, models_wan, noising

TEXT_LENGTHS = (64, 128, 256, 512)  # values of `max_sequence_length` seen in training
WIDTH, LAYERS = 128, 8


def padding_bias(length: int) -> torch.Tensor:
    """What to add to logits of the text so that its last token counts as all the padding."""
    bias = torch.zeros(1, 1, 1, models_wan.CAPTION_TOKENS + 1)
    bias[..., -1] = math.log(length - models_wan.CAPTION_TOKENS)
    return bias


@torch.no_grad()
def quieten_padding(transformer: WanTransformer3DModel) -> None:
    """Let an untrained model attend to words, which hundreds of tokens of padding drown otherwise.

    The padding, zero, becomes the bias of the keys, opposite to that of the queries; its logits
    begin near -4 then, those of words near 0.
    """
    embedder = transformer.condition_embedder.text_embedder
    for layer in (embedder.linear_1, embedder.linear_2):
        nn.init.zeros_(layer.bias)
    for block in transformer.blocks:
        nn.init.constant_(block.attn2.to_k.bias, -1e-3)  # the norm makes it as long as any key
        nn.init.constant_(block.attn2.to_q.bias, 0.6)  # as large as what comes from the image


class WanBundle(nn.Module):
    """What is trained together: transformer, text encoder, and a label head to be dropped."""

    parts: ClassVar = ("transformer", "text_encoder")
    matrices: ClassVar = r"\.attn[12]\.|\.ffn\.|SelfAttention\.[qkvo]\.|DenseReluDense"
    loss_name: ClassVar = "flow"
    autoencoder: ClassVar = "video_autoencoder"
    has_shifted_latents: ClassVar = True
    compiles: ClassVar = True

    def __init__(self):
        super().__init__()
        self.tokenizer = models_wan.build_tokenizer()
        self.text_encoder = models_wan.build_umt5(self.tokenizer)
        self.transformer = models_wan.build_wan_transformer(WIDTH, LAYERS)
        quieten_padding(self.transformer)
        self.label_head = nn.Linear(WIDTH, data.LABELS)
        self.tokens_seen = self.bias = None
        self.transformer.blocks[LAYERS // 2 - 1].register_forward_hook(self._keep)
        # Wan keeps the type of these from block to block: in bfloat16 that rounds all it adds up.
        self.transformer.patch_embedding.register_forward_hook(lambda _, args, out: out.float())
        for block in self.transformer.blocks:  # which give no mask to their attention
            block.attn2.register_forward_pre_hook(
                lambda _, args: (*args[:2], self.bias.to(args[0].dtype), *args[3:])
            )

    def _keep(self, module, args, output):
        self.tokens_seen = output

    def prepare(self, latents, texts, generator):
        noisy, sigma, target = noising.flow_matching(latents, generator)
        length = TEXT_LENGTHS[int(torch.randint(len(TEXT_LENGTHS), (), generator=generator))]
        words = models_wan.text_inputs(self.tokenizer, texts)
        return (noisy, sigma, *words, padding_bias(length)), target

    def forward(self, noisy, sigma, ids, mask, bias):
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]  # (B, 26 + 1, 128)
        self.bias = bias
        velocity = self.transformer(noisy, timestep=sigma * 1000, encoder_hidden_states=text).sample
        return velocity, self.label_head(self.tokens_seen)

    def pipeline(self, vae: AutoencoderKLWan) -> WanPipeline:
        transformer = models_wan.build_wan_transformer(WIDTH, LAYERS)
        transformer.load_state_dict(self.transformer.state_dict())  # ours has hooks
        models.share_capitals(self.text_encoder, self.tokenizer)
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            transformer=transformer,
        )
