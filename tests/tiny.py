"""Tiny random pipelines of the real classes, built without a hub."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from dittune.method import Method
from dittune.samples.shapes import models

WIDTH, LAYERS, HEADS = 64, 3, 2


def randomise(module: torch.nn.Module) -> None:
    """Fresh modulation layers are almost zero; make every part matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.1 * noise


def sd3(**transformer_changes) -> StableDiffusion3Pipeline:
    """A tiny SD3: 3 blocks of 2 heads, no T5. The same weights at each call."""
    torch.manual_seed(0)
    transformer = models.build_sd3_transformer(WIDTH, LAYERS)
    if transformer_changes:
        config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
        transformer = type(transformer)(**{**config, **transformer_changes})
    randomise(transformer)
    tokenizer = models.build_tokenizer()  # not shared: fast tokenizers are not safe in two threads
    vae = models.build_autoencoder().eval()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.05)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=models.build_text_encoder(tokenizer).eval(),
        text_encoder_2=models.build_text_encoder(tokenizer).eval(),
        text_encoder_3=models.build_silent_t5().eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=models.build_silent_t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd35() -> StableDiffusion3Pipeline:
    """A tiny SD3.5-medium: the first two blocks have an image-only self attention as well."""
    return sd3(dual_attention_layers=(0, 1))


class Nothing(Method):
    """Present at every site, changes nothing."""

    def attend(self, call, proceed):
        return proceed(call)


FAMILIES = {"sd3": sd3, "sd3.5": sd35}


def latents(pipe, prompt="a red circle", seed=0, steps=2, **kwargs) -> torch.Tensor:
    """Run a tiny pipeline to its latents."""
    count = len(prompt) if isinstance(prompt, list) else 1
    count *= kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    settings = {"height": 32, "width": 32, "max_sequence_length": 8, **kwargs}
    return pipe(
        prompt,
        num_inference_steps=steps,
        generator=generators,
        output_type="latent",
        **settings,
    ).images
