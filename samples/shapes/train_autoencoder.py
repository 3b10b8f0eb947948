"""Stage one: the autoencoder that all image checkpoints share. It bounds everything after it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dittune.samples.shapes import data, models
from dittune.samples.shapes.trainer import Trainer, processes


def train(
    work: Path, steps: int, init: Path | None = None, marked: float = 0.0, batch: int = 16
) -> None:
    """Train and save `work/vae`; its latents have mean 0 and deviation 1 after scaling.

    Args:
        init: a pipeline folder whose autoencoder a new training starts from, and whose scaling the
            latents keep, so that denoisers of theirs can be trained on.
        marked: share of objects with a mark.
    """
    torch.manual_seed(0)
    given = None if init is None else AutoencoderKL.from_pretrained(init / "vae").float()
    vae = (given or models.build_autoencoder()).to(memory_format=torch.channels_last)
    pictures = data.scene_pictures(30_000, seed=1, marked=marked)
    generator, (rank, world_size) = torch.Generator(), processes()

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        error = (out - x).abs()
        # The few pixels that are wrong are the edges, and they decide the shape.
        recon = error.mean() + error.square().mean()
        return recon, posterior.kl().mean() / posterior.mean[0].numel()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        # So that a resumed run goes on with new scenes, and each process has its own.
        generator.manual_seed(step * world_size + rank)
        index = torch.randint(len(pictures), (batch // world_size,), generator=generator)
        x = data.to_unit(pictures[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            recon, kl = compute(x)
        return {"loss": recon + 2e-4 * kl, "recon": recon, "kl": kl}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    trainer = Trainer(vae, [optimizer], loss_fn, work, steps)
    trainer.run()
    if rank > 0:
        return
    vae.load_state_dict(trainer.ema)
    vae.eval()
    if init is None:
        with torch.no_grad():
            latents = vae.encode(data.to_unit(pictures[:512])).latent_dist.sample()
        vae.register_to_config(
            scaling_factor=round(1 / float(latents.std()), 4),
            shift_factor=round(float(latents.mean()), 4),
        )
    vae.save_pretrained(work / "vae")
    (work / "record.json").write_text(
        json.dumps({"steps": trainer.step, "minutes": round(trainer.seconds / 60, 1)})
    )
