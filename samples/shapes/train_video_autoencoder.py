"""The autoencoder of the video checkpoint, trained on crops of clips around their objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from dittune.samples.shapes import clip_data, models_wan
from dittune.samples.shapes.trainer import Trainer, processes


def train(work: Path, steps: int, batch: int = 16) -> None:
    """Train and save `work/vae`; it knows the mean and deviation of each of its channels."""
    rank, world_size = processes()
    torch.manual_seed(7)
    vae = models_wan.build_autoencoder()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        x = clip_data.crops(batch // world_size, np.random.default_rng((8, step, rank)))
        torch.manual_seed(step * world_size + rank)  # of the noise in the latents
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample.float()
        error = (out - x).abs()
        # The few pixels that are wrong are the edges, and they decide the shape.
        recon = error.mean() + error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": recon + 2e-4 * kl, "recon": recon, "kl": kl}

    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    trainer = Trainer(vae, [optimizer], loss_fn, work, steps)
    trainer.run()
    if rank > 0:
        return
    vae.load_state_dict(trainer.ema)
    vae.eval()
    with torch.no_grad():
        x = clip_data.crops(128, np.random.default_rng(9))
        latents = vae.encode(x).latent_dist.sample().transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(float(mean), 4) for mean in latents.mean(1)],
        latents_std=[round(float(std), 4) for std in latents.std(1)],
    )
    vae.save_pretrained(work / "vae")
    (work / "record.json").write_text(
        json.dumps({"steps": trainer.step, "minutes": round(trainer.seconds / 60, 1)})
    )
