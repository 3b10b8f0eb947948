"""How a training step mixes latents with noise."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler


def flow_matching(
    latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents, noise level `[B]` in 0..1, target velocity); levels sigmoid(N(0.4, 1.2))."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(len(latents), generator=generator))
    s = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - s) * latents + s * noise, sigma, noise - latents


def v_prediction(
    latents: torch.Tensor, generator: torch.Generator, scheduler: DDIMScheduler
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents, timestep `[B]`, target v); timesteps uniform over the scheduler's."""
    noise = torch.randn(latents.shape, generator=generator)
    steps = scheduler.config.num_train_timesteps
    timestep = torch.randint(steps, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, timestep)
    return noisy, timestep, scheduler.get_velocity(latents, noise, timestep)
