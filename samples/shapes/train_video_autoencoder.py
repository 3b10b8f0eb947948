"""The autoencoder of the video checkpoint, trained on crops of clips around their objects.

Its decoder can be trained on alone: what was encoded before stays true.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from dittune.samples.shapes import clip_data, models_wan
from dittune.samples.shapes.trainer import Trainer, processes


def train(work: Path, steps: int, batch: int = 16) -> None:
    """Train and save `work/vae`; it knows the mean and deviation of each of its channels."""
    torch.manual_seed(7)
    vae = models_wan.build_autoencoder()
    if not _run(vae, work, steps, batch, seed=8):
        return
    with torch.no_grad():
        x = clip_data.crops(128, np.random.default_rng(9))
        latents = vae.encode(x).latent_dist.sample().transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(float(mean), 4) for mean in latents.mean(1)],
        latents_std=[round(float(std), 4) for std in latents.std(1)],
    )
    vae.save_pretrained(work / "vae")


def train_decoder(work: Path, steps: int, batch: int = 16) -> None:
    """Train the decoder of `work/../video_autoencoder/vae` on, and save it there."""
    folder = work.parent / "video_autoencoder" / "vae"
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is not there yet; train video_autoencoder first")
    vae = AutoencoderKLWan.from_pretrained(folder)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    if _run(vae, work, steps, batch, seed=10):
        vae.save_pretrained(folder)


def _run(vae: AutoencoderKLWan, work: Path, steps: int, batch: int, seed: int) -> bool:
    """Train what may be trained; in the first process `vae` has the averaged weights then."""
    rank, world_size = processes()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        x = clip_data.crops(batch // world_size, np.random.default_rng((seed, step, rank)))
        torch.manual_seed(step * world_size + rank)  # of the noise in the latents
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample.float()
        error = (out - x).abs()
        # The few pixels that are wrong are the edges, and they decide the shape.
        recon = error.mean() + error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": recon + 2e-4 * kl, "recon": recon, "kl": kl}

    vae.train()
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    trainer = Trainer(vae, [optimizer], loss_fn, work, steps)
    trainer.run()
    if rank > 0:
        return False
    vae.load_state_dict(trainer.ema)
    vae.eval()
    record = {"steps": trainer.step, "minutes": round(trainer.seconds / 60, 1)}
    (work / "record.json").write_text(json.dumps(record))
    return True
