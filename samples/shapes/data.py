"""Training data drawn from the Shapes world: pictures, latents, captions, token labels."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from dittune.samples.shapes import marks, world

SCENES = 80_000
MOST_NAMED = 4  # objects in a caption
LABELS = len(world.COLORS) + len(world.BACKGROUNDS) + len(world.SHAPES)
COLOR_LABELS = len(world.COLORS) + len(world.BACKGROUNDS)


def scene_pictures(count: int, seed: int, marked: float = 0.0) -> torch.Tensor:
    """`count` training pictures, uint8 `[N, 3, 64, 64]`; a share of their objects is marked."""
    rng, draw = np.random.default_rng(seed), np.random.default_rng(6)
    scenes = (world.sample_scene(rng) for _ in range(count))
    drawn = (marks.draw(s, marks.sample_marks(draw, len(s.objects), marked)) for s in scenes)
    pictures = np.stack([*drawn])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1."""
    return pictures.float() / 127.5 - 1


def token_labels(scene: world.Scene, tokens: int = 8) -> np.ndarray:
    """What stands in each image token: share of every colour and every shape, `[tokens**2, 17]`.

    Columns: 8 object colours, 3 backgrounds, 6 shapes. Used for the auxiliary loss only.
    """
    colors = [*world.COLORS, *world.BACKGROUNDS]
    labels = np.zeros((tokens, tokens, len(colors) + len(world.SHAPES)), np.float32)
    patch = world.CANVAS // tokens
    for thing in scene.objects:
        cover = world.coverage(thing.shape, thing.x, thing.y, thing.radius, world.CANVAS)
        share = cover.reshape(tokens, patch, tokens, patch).mean((1, 3))
        labels[..., colors.index(thing.color)] += share
        labels[..., len(colors) + world.SHAPES.index(thing.shape)] += share
    free = 1 - labels[..., : len(world.COLORS)].sum(-1)
    labels[..., colors.index(scene.background)] = free.clip(0, 1)
    return labels.reshape(tokens * tokens, -1)


def without_some(scene: world.Scene, missing: float, rng: np.random.Generator) -> world.Scene:
    """The scene less each object with probability `missing`; one, drawn at random, always stays."""
    count = len(scene.objects)
    stays = rng.random(count) >= missing
    stays[rng.integers(count)] = True
    return replace(scene, objects=tuple(itertools.compress(scene.objects, stays)))


def weights_id(folder: Path) -> str:
    """Tells the weights in a folder apart: latents of another autoencoder are not these."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def save_whole(values: object, path: Path) -> None:
    """Save, so that a file of this name is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(values, part)
    part.replace(path)


class SceneLatents:
    """Training scenes with their latents, made once and kept on disk.

    Args:
        marked: the probability with which an object of the same scenes has a mark (`marks.py`).
        missing: the probability with which a picture lacks an object that its caption names, as
            pictures of the web do; one of them, drawn at random, always stays.
        twins: the probability with which an object has a twin (`marks.with_twin`); half of the
            captions name them.
    """

    def __init__(
        self,
        work: Path,
        vae_folder: Path,
        count: int = SCENES,
        marked: float = 0.0,
        missing: float = 0.0,
        twins: float = 0.0,
    ):
        rng, draw, lose, double = (np.random.default_rng(seed) for seed in (3, 6, 8, 9))
        self.captioned = [world.sample_scene(rng) for _ in range(count)]
        self.scenes = [without_some(s, missing, lose) for s in self.captioned]
        self.marks = [marks.sample_marks(draw, len(s.objects), marked) for s in self.scenes]
        for i in range(count if twins else 0):
            scene, own = self.scenes[i], self.marks[i]
            for which in np.flatnonzero(double.random(len(own)) < twins):
                scene, own = marks.with_twin(scene, own, int(which), double)
            named = (*self.captioned[i].objects, *scene.objects[len(self.marks[i]) :])
            if double.random() < 0.5 and len(named) <= MOST_NAMED:
                self.captioned[i] = replace(scene, objects=named)
            self.scenes[i], self.marks[i] = scene, own
        shares = {"marked": marked, "missing": missing, "twins": twins}
        kind = "".join(f"-{name}-{share:g}" for name, share in shares.items() if share)
        path = work / f"latents-{count}{kind}-{weights_id(vae_folder)}.pt"
        if not path.exists():
            vae = AutoencoderKL.from_pretrained(vae_folder).eval()
            config, parts = vae.config, []
            with torch.no_grad():
                for i in tqdm(range(0, count, 200), desc="latents", mininterval=5):
                    some = zip(self.scenes[i : i + 200], self.marks[i : i + 200], strict=True)
                    pictures = np.stack([marks.draw(scene, own) for scene, own in some])
                    x = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast("cpu", torch.bfloat16):
                        latents = vae.encode(x).latent_dist.mean.float()
                    parts.append((latents - config.shift_factor) * config.scaling_factor)
            save_whole(torch.cat(parts).half(), path)
        self.latents = torch.load(path, weights_only=True)
        labels = np.stack([token_labels(scene) for scene in self.scenes])
        self.labels = torch.from_numpy((labels * 255).round().astype(np.uint8))

    def batch(self, size: int, rng: np.random.Generator):
        index = rng.integers(len(self.scenes), size=size)
        scenes = [self.captioned[i] for i in index]
        texts = ["" if rng.random() < 0.1 else world.caption(s, rng) for s in scenes]
        index = torch.from_numpy(index)
        return self.latents[index].float(), texts, self.labels[index].float() / 255
