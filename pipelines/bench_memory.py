"""`dittune bench memory`: what a gradient step on the latents holds, at the size of SD 1.5.

Three measurements, each in a process of its own: an ordinary forward and backward pass of one
conditional row through the same layers, with torch's own attention and no maps; one denoising step
with `a_star`, guidance on; the same with `checkpointing`. Weights are random, 512 x 512 pixels.
Peaks are of the resident memory above what is in use when the weights are loaded.
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from typing import Any

import psutil
import torch

from dittune.attach import attach
from dittune.methods.a_star import AStar

CAPTION = "a red circle and a blue square"


def bench_memory() -> dict[str, Any]:
    """MiB and ratios to the plain pass."""
    ways = ("plain", "a_star", "a_star, checkpointing")
    mib = {}
    for way in ways:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib[way] = pool.apply(_peak, (way,))
    return {
        "method": __doc__,
        "rows": [
            {"setting": way, "mib": round(mib[way]), "ratio": round(mib[way] / mib["plain"], 3)}
            for way in ways
        ],
    }


def _peak(way: str) -> float:
    from dittune.pipelines.evaluate import PeakMemory

    pipe = build_pipeline()
    step = _plain_pass(pipe) if way == "plain" else _a_star_step(pipe, "checkpointing" in way)
    before = psutil.Process().memory_info().rss / 2**20
    with PeakMemory() as memory:
        step()
    return memory.mib - before


def build_pipeline() -> Any:
    """Stable Diffusion with a U-Net of the size of 1.5; its text encoder has one layer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

    from dittune.checkpoints import checkpoint

    tokenizer = CLIPTokenizerFast.from_pretrained(checkpoint("shapes-sd3"), subfolder="tokenizer")
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=768, num_hidden_layers=1)
    )
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        scheduler=DDIMScheduler(),
        vae=None,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _a_star_step(pipe: Any, checkpointing: bool):
    def step() -> None:
        with attach(pipe, AStar(checkpointing=checkpointing)):
            pipe(CAPTION, num_inference_steps=1, output_type="latent")

    return step


class _Seen(Exception):
    """Ends the plain pass after the last layer whose maps `a_star` reads."""


def _plain_pass(pipe: Any):
    from dittune.models import unet

    sites = [site for site in unet.sites(pipe.unet) if site.shows_words]
    pipe.unet.requires_grad_(False)
    outputs: list[torch.Tensor] = []

    def keep(module, args, output) -> None:
        outputs.append(output)
        if len(outputs) == len(sites):
            raise _Seen

    for site in sites:
        pipe.unet.get_submodule(site.name).register_forward_hook(keep)

    def step() -> None:
        with torch.no_grad():
            text, _ = pipe.encode_prompt(CAPTION, "cpu", 1, False)
        latents = torch.randn(1, 4, 64, 64, requires_grad=True)
        with suppress(_Seen):
            pipe.unet(latents, 500, encoder_hidden_states=text)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()

    return step
