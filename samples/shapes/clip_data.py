"""Training data drawn from the moving scenes: crops, latents, captions, token labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from dittune.samples.shapes import data, models_wan, motion, world

CLIPS = 48_000
CROP = 32  # pixels a side


def to_unit(clips: np.ndarray) -> torch.Tensor:
    """uint8 `[N, T, H, W, 3]` -> float -1..1 `[N, 3, T, H, W]`."""
    return data.to_unit(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)).contiguous()


def crops(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops of new clips around one of their objects, float `[count, 3, 9, 32, 32]`."""
    found = np.empty((count, motion.FRAMES, CROP, CROP, 3), np.uint8)
    for i in range(count):
        clip = motion.sample_clip(rng)
        thing = clip.objects[rng.integers(len(clip.objects))].at(int(rng.integers(motion.FRAMES)))
        corner = np.array([thing.x, thing.y]) - rng.integers(0, CROP + 1, 2)
        x, y = corner.clip(0, world.CANVAS - CROP)
        found[i] = motion.draw(clip)[:, y : y + CROP, x : x + CROP]
    return to_unit(found)


def token_labels(clip: motion.Clip) -> np.ndarray:
    """Share of every colour and shape in each token, `[3 * 64, 17]`: the mean over its frames."""
    frames = np.stack(
        [data.token_labels(clip.scene(i), models_wan.TOKENS) for i in range(clip.frames)]
    )
    groups = [frames[:1], *np.split(frames[1:], (clip.frames - 1) // 4)]
    return np.concatenate([group.mean(0) for group in groups])


class ClipLatents:
    """Training clips with their latents and labels, made once and kept on disk."""

    def __init__(self, work: Path, vae_folder: Path, count: int = CLIPS):
        rng = np.random.default_rng(6)
        self.clips = [motion.sample_clip(rng) for _ in range(count)]
        path = work / f"clip-latents-{count}-{data.weights_id(vae_folder)}.pt"
        if not path.exists():
            data.save_whole(self._encode(AutoencoderKLWan.from_pretrained(vae_folder).eval()), path)
        self.latents, self.labels = torch.load(path, weights_only=True)

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(values)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents, labels = [], []
        for i in tqdm(range(0, len(self.clips), 50), desc="clip latents", mininterval=5):
            clips = self.clips[i : i + 50]
            with torch.autocast("cpu", torch.bfloat16):
                drawn = to_unit(np.stack([motion.draw(clip) for clip in clips]))
                found = vae.encode(drawn).latent_dist.mean.float()
            latents.append(((found - mean) / std).half())
            shares = np.stack([token_labels(clip) for clip in clips])
            labels.append(torch.from_numpy((shares * 255).round().astype(np.uint8)))
        return torch.cat(latents), torch.cat(labels)

    def batch(self, size: int, rng: np.random.Generator):
        index = rng.integers(len(self.clips), size=size)
        clips = [self.clips[i] for i in index]
        texts = ["" if rng.random() < 0.1 else motion.caption(c, rng) for c in clips]
        index = torch.from_numpy(index)
        return self.latents[index].float(), texts, self.labels[index].float() / 255
