"""`shapes-sd`: a U-Net with self and cross attention, and its CLIP text encoder.

v-prediction over Stable Diffusion's own noise schedule, rescaled so that the last step is pure
noise: otherwise the first step of generation could not choose a white or a black background.
"""

from __future__ import annotations

from typing import ClassVar

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import nn
from transformers import CLIPTextModel

from dittune.samples.shapes import data, models, noising

WIDTHS, TEXT_WIDTH = (32, 128), 128


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


class SDBundle(nn.Module):
    """What is trained together: U-Net, text encoder, and a label head to be dropped."""

    parts: ClassVar = ("unet", "text_encoder")
    matrices: ClassVar = r"\.attn[12]\.|\.ff\.|\.mlp\.|self_attn"
    loss_name: ClassVar = "v"
    autoencoder: ClassVar = "autoencoder"
    has_shifted_latents: ClassVar = False  # this pipeline knows a scale only
    compiles: ClassVar = False  # torch 2.13 gets its bfloat16 gradients wrong on a CPU

    def __init__(self):
        super().__init__()
        self.tokenizer = models.build_tokenizer()
        self.scheduler = build_scheduler()
        self.text_encoder = models.build_text_encoder(self.tokenizer, TEXT_WIDTH, CLIPTextModel)
        self.unet = models.build_unet(WIDTHS, TEXT_WIDTH)
        self.label_head = nn.Linear(WIDTHS[-1], data.LABELS)
        self.tokens_seen = None
        self.unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.tokens_seen = output.flatten(2).transpose(1, 2)  # (B, 64, 128)

    def prepare(self, latents, texts, generator):
        noisy, timestep, target = noising.v_prediction(latents, generator, self.scheduler)
        return (noisy, timestep, models.clip_ids(self.tokenizer, texts)), target

    def forward(self, noisy, timestep, ids):
        text = self.text_encoder(ids).last_hidden_state  # (B, 32, 128)
        prediction = self.unet(noisy, timestep, encoder_hidden_states=text).sample
        return prediction, self.label_head(self.tokens_seen)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            unet=self.unet,
            scheduler=self.scheduler,
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
