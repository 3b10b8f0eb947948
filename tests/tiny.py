"""Tiny random pipelines of the real classes, built without a hub."""

from __future__ import annotations

import inspect

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from dittune.method import Method
from dittune.samples.shapes import models

WIDTH, LAYERS, HEADS = 64, 3, 2


def randomise(module: torch.nn.Module) -> None:
    """Fresh modulation layers are almost zero; make every part matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.1 * noise


def autoencoder() -> torch.nn.Module:
    vae = models.build_autoencoder().eval()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.05)
    return vae


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe) -> torch.nn.Module:
    return getattr(pipe, "transformer", None) or pipe.unet


def sd3(**transformer_changes) -> StableDiffusion3Pipeline:
    """A tiny SD3: 3 blocks of 2 heads, no T5. The same weights at each call."""
    torch.manual_seed(0)
    transformer = models.build_sd3_transformer(WIDTH, LAYERS)
    if transformer_changes:
        config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
        transformer = type(transformer)(**{**config, **transformer_changes})
    randomise(transformer)
    tokenizer = models.build_tokenizer()  # not shared: fast tokenizers are not safe in two threads
    vae = autoencoder()
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
    return silent(pipe)


def sd35() -> StableDiffusion3Pipeline:
    """A tiny SD3.5-medium: the first two blocks have an image-only self attention as well."""
    return sd3(dual_attention_layers=(0, 1))


def flux(**changes) -> FluxPipeline:
    """A tiny FLUX: 2 double and 2 single blocks of 2 heads."""
    torch.manual_seed(0)
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 32,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    transformer = FluxTransformer2DModel(**{**config, **changes})
    randomise(transformer)
    tokenizer, tokenizer_2 = models.build_tokenizer(), models.build_t5_tokenizer()
    vocab = len(tokenizer_2)
    t5 = T5Config(vocab_size=vocab, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=clip_text_model(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    return silent(pipe)


def clip_text_model(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(models.build_text_encoder(tokenizer).config).eval()


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 2,
    "sample_size": 16,
}


def sd(**changes) -> StableDiffusionPipeline:
    """A tiny SD 1.x: two resolutions with attention of 2 heads in both."""
    torch.manual_seed(0)
    config = {**UNET, "attention_head_dim": HEADS, "cross_attention_dim": WIDTH, **changes}
    unet = UNet2DConditionModel(**config)
    randomise(unet)
    tokenizer = models.build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text_model(tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return silent(pipe)


def sdxl(**changes) -> StableDiffusionXLPipeline:
    """A tiny SDXL: sizes as conditions, attention at the coarse resolution only."""
    torch.manual_seed(0)
    config = {
        **UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    unet = UNet2DConditionModel(**{**config, **changes})
    randomise(unet)
    tokenizer = models.build_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_text_model(tokenizer),
        text_encoder_2=models.build_text_encoder(tokenizer).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    return silent(pipe)


class Nothing(Method):
    """Present at every site, changes nothing."""

    def attend(self, call, proceed):
        return proceed(call)


FAMILIES = {"sd3": sd3, "sd3.5": sd35, "flux": flux, "sd": sd, "sdxl": sdxl}


def latents(pipe, prompt="a red circle", seed=0, steps=2, **kwargs) -> torch.Tensor:
    """Run a tiny pipeline to its latents, of a picture `[B, C, height, width]`."""
    count = len(prompt) if isinstance(prompt, list) else 1
    count *= kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    parameters = inspect.signature(pipe.__call__).parameters
    frames = 9  # 3 of latents
    if hasattr(pipe, "vae_temporal_scale_factor"):  # Mochi, which cannot make one step
        frames, steps = 13, max(2, steps)
    own = {"height": 32, "width": 32, "max_sequence_length": 8, "num_frames": frames}
    own["prompt_template"] = {"template": "{}", "crop_start": 0}  # of HunyuanVideo
    settings = {**{name: own[name] for name in own if name in parameters}, **kwargs}
    output = pipe(
        prompt,
        num_inference_steps=steps,
        generator=generators,
        output_type="latent",
        **settings,
    )
    if hasattr(output, "frames"):
        return output.frames
    images = output.images
    if images.ndim == 3:  # packed
        sides = settings["height"], settings["width"]
        images = pipe._unpack_latents(images, *sides, pipe.vae_scale_factor)
    return images
