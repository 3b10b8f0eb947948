"""`dittune bench attach`: what an attached method that does nothing costs.

Two settings, each timed in alternation with and without: a bundled checkpoint at batch 8, and an
SD3 block of real width (1,536) on 4,096 image tokens with random weights. The outputs must be
bitwise equal before anything is timed. A round times both directly after one another, in an order
that alternates. The ratio is that of the fastest rounds, since other work on the machine can only
add time; the median of the rounds' own ratios is given beside it, with its spread.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dittune.attach import attach
from dittune.errors import DittuneError
from dittune.method import Method


class DoNothing(Method):
    """Acts in all three places and changes nothing."""

    def attend(self, call, proceed):
        return proceed(call)

    def around_model(self, inputs, model):
        return model(inputs)

    def on_step(self, run, latents):
        return latents


def checkpoint_step(
    name: str = "shapes-sd3", batch: int = 8, steps: int = 4
) -> tuple[Any, Callable]:
    """(pipeline, call) for `steps` denoising steps of a bundled checkpoint, guidance on."""
    from dittune.pipelines.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(name).pipe
    with torch.no_grad():
        prompt, negative, pooled, negative_pooled = pipe.encode_prompt(
            ["a red circle and a blue square"] * batch, None, None
        )
    embeds = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    return pipe, _sampler(pipe, steps, embeds, guidance_scale=4.0)


def wide_step(steps: int = 1) -> tuple[Any, Callable]:
    """(pipeline, call) for a step of one SD3 block: width 1,536, 4,096 image + 333 text tokens."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=128, num_layers=1, attention_head_dim=64, num_attention_heads=24,
        caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )  # fmt: skip
    absent = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    absent += ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(absent),
    )
    embeds = {
        "prompt_embeds": torch.randn(1, 333, 4096),
        "pooled_prompt_embeds": torch.randn(1, 2048),
    }
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    embeds = {name: value.to(pipe.device) for name, value in embeds.items()}
    return pipe, _sampler(pipe, steps, embeds, guidance_scale=1.0, height=1024, width=1024)


def _sampler(pipe: Any, steps: int, embeds: dict, **settings) -> Callable[[], torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    in_channels, side = pipe.transformer.config.in_channels, pipe.transformer.config.sample_size
    batch = len(embeds["prompt_embeds"])
    latents = torch.randn(
        batch, in_channels, side, side, generator=torch.Generator().manual_seed(0)
    )

    def sample() -> torch.Tensor:
        return pipe(
            latents=latents.to(pipe.device), num_inference_steps=steps, output_type="latent",
            **embeds, **settings,
        ).images  # fmt: skip

    return sample


def attach_overhead(pipe: Any, sample: Callable, rounds: int, steps: int) -> dict[str, float]:
    """Time steps with and without a do-nothing method.

    Returns:
        Milliseconds a step of both (fastest rounds) and their ratio; median, 20th and 80th
        percentile of the ratios of the rounds.
    """
    plain = sample()
    with attach(pipe, DoNothing()):
        if not torch.equal(plain, sample()):
            raise DittuneError("a method that does nothing changed the output; not timing it")
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds):
        for attached in (True, False) if i % 2 else (False, True):
            handle = attach(pipe, DoNothing()) if attached else None
            times[attached].append(_seconds(sample) / steps)
            if handle:
                handle.detach()
    ratios = sorted(a / b for a, b in zip(times[True], times[False], strict=True))
    return {
        "plain_ms": 1e3 * min(times[False]),
        "attached_ms": 1e3 * min(times[True]),
        "ratio": min(times[True]) / min(times[False]),
        "ratio_median": statistics.median(ratios),
        "ratio_p20": ratios[int(0.2 * (rounds - 1))],
        "ratio_p80": ratios[int(0.8 * (rounds - 1))],
        "rounds": rounds,
    }


def _seconds(call: Callable) -> float:
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> dict[str, str]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": device or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def bench_attach(rounds: int = 21) -> dict[str, Any]:
    """Run both settings; the document that `dittune bench attach --json` prints."""
    rows = []
    for label, build, steps in (
        ("shapes-sd3, batch 8, guidance on", checkpoint_step, 4),
        ("SD3 block, width 1536, 4096 + 333 tokens", wide_step, 1),
    ):
        pipe, sample = build(steps=steps)
        rows.append({"setting": label, **attach_overhead(pipe, sample, rounds, steps)})
    return {"method": __doc__, "hardware": hardware(), "rows": rows}


def as_text(result: dict[str, Any]) -> str:
    """The document of `bench_attach` for people."""
    lines = [result["method"].strip(), "", " ".join(result["hardware"].values()), ""]
    for row in result["rows"]:
        lines.append(
            f"{row['setting']}: plain {row['plain_ms']:.2f} ms a step, attached "
            f"{row['attached_ms']:.2f} ms; ratio {row['ratio']:.4f} "
            f"(of rounds: median {row['ratio_median']:.4f}, p20 {row['ratio_p20']:.4f}, "
            f"p80 {row['ratio_p80']:.4f}; {row['rounds']} rounds)"
        )
    return "\n".join(lines)
