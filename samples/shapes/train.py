"""Train the bundled checkpoints on the Shapes world: `python -m dittune.samples.shapes.train STAGE`.

Every stage is resumable: kill it at any time, run the same command again, and it goes on from the
last saved state in `--work`. The learning rate is constant, then falls linearly to zero over the
last 30 % of `--steps`, so a run can be lengthened or cut short by naming another number of steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from dittune.samples.shapes import models, world

WARMUP = 100  # steps
DECAY_SHARE = 0.3  # share of the steps over which the learning rate falls to zero
SAVE_SECONDS = 60


def lr_factor(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / (DECAY_SHARE * steps)))


class Trainer:
    """The loop every stage shares: schedule, bf16 autocast, EMA, resumable state, loss log."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        loss_fn: Callable[[int], dict[str, torch.Tensor]],
        work: Path,
        steps: int,
        ema_decay: float = 0.999,
    ):
        self.module, self.loss_fn, self.steps = module, loss_fn, steps
        self.optimizers = list(optimizers)
        self.base_lrs = [[g["lr"] for g in opt.param_groups] for opt in self.optimizers]
        self.ema_decay = ema_decay
        self.ema = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.work, self.step, self.seconds = work, 0, 0.0
        work.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema,
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.work / "state.tmp")
        (self.work / "state.tmp").replace(self.work / "state.pt")

    def resume(self) -> None:
        path = self.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.ema = state["ema"]
        for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def run(self) -> None:
        self.resume()
        saved = started = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, mininterval=5, maxinterval=30)
        log = (self.work / "loss.csv").open("a", newline="")
        writer, sums = csv.writer(log), {}
        while self.step < self.steps:
            for opt, lrs in zip(self.optimizers, self.base_lrs, strict=True):
                for group, lr in zip(opt.param_groups, lrs, strict=True):
                    group["lr"] = lr * lr_factor(self.step, self.steps)
            losses = self.loss_fn(self.step)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for opt in self.optimizers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            self._update_ema()
            self.step += 1
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            if self.step % 50 == 0:
                means = {k: v / 50 for k, v in sums.items()}
                writer.writerow([self.step, *(f"{k}={v:.5f}" for k, v in means.items())])
                log.flush()
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
                sums = {}
            bar.update()
            if time.monotonic() - saved > SAVE_SECONDS:
                self.seconds += time.monotonic() - started
                saved = started = time.monotonic()
                self.save()
        self.seconds += time.monotonic() - started
        self.save()
        bar.close()

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        state = self.module.state_dict()
        keys = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[k] for k in keys], [state[k] for k in keys], 1 - decay)


def scene_pictures(count: int, seed: int) -> torch.Tensor:
    """`count` training pictures, uint8 `[N, 3, 64, 64]`."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([world.draw(world.sample_scene(rng)) for _ in range(count)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1."""
    return pictures.float() / 127.5 - 1


def train_autoencoder(work: Path, steps: int, batch: int = 16) -> None:
    torch.manual_seed(0)
    vae = models.build_autoencoder().to(memory_format=torch.channels_last)
    pictures = scene_pictures(30_000, seed=1)
    generator = torch.Generator().manual_seed(2)

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        error = (out - x).abs()
        # The few pixels that are wrong are the edges, and they decide the shape.
        recon = error.mean() + error.square().mean()
        return recon, posterior.kl().mean() / posterior.mean[0].numel()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        index = torch.randint(len(pictures), (batch,), generator=generator)
        x = to_unit(pictures[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            recon, kl = compute(x)
        return {"loss": recon + 2e-4 * kl, "recon": recon, "kl": kl}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    trainer = Trainer(vae, [optimizer], loss_fn, work, steps)
    trainer.run()
    vae.load_state_dict(trainer.ema)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(to_unit(pictures[:512])).latent_dist.sample()
    vae.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 4),
        shift_factor=round(float(latents.mean()), 4),
    )
    vae.save_pretrained(work / "vae")
    (work / "record.json").write_text(
        json.dumps({"steps": trainer.step, "minutes": round(trainer.seconds / 60, 1)})
    )


T5_TOKENS = 256  # without T5, StableDiffusion3Pipeline appends this many zero vectors to the text
SCENES = 80_000


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


class SceneLatents:
    """Training scenes with their latents, made once and kept on disk."""

    def __init__(self, work: Path, count: int = SCENES):
        rng = np.random.default_rng(3)
        self.scenes = [world.sample_scene(rng) for _ in range(count)]
        path = work / f"latents-{count}.pt"
        if not path.exists():
            vae = AutoencoderKL.from_pretrained(work / "autoencoder" / "vae").eval()
            config, parts = vae.config, []
            with torch.no_grad():
                for i in tqdm(range(0, count, 200), desc="latents", mininterval=5):
                    pictures = np.stack([world.draw(s) for s in self.scenes[i : i + 200]])
                    x = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast("cpu", torch.bfloat16):
                        latents = vae.encode(x).latent_dist.mean.float()
                    parts.append((latents - config.shift_factor) * config.scaling_factor)
            torch.save(torch.cat(parts).half(), path)
        self.latents = torch.load(path, weights_only=True)
        labels = np.stack([token_labels(scene) for scene in self.scenes])
        self.labels = torch.from_numpy((labels * 255).round().astype(np.uint8))

    def batch(self, size: int, rng: np.random.Generator):
        index = rng.integers(len(self.scenes), size=size)
        scenes = [self.scenes[i] for i in index]
        texts = ["" if rng.random() < 0.1 else world.caption(s, rng) for s in scenes]
        index = torch.from_numpy(index)
        return self.latents[index].float(), texts, self.labels[index].float() / 255


class SD3Bundle(nn.Module):
    """What is trained together: transformer, both text encoders, and a label head to be dropped."""

    def __init__(self, tokenizer, layers: int, width: int, label_layer: int):
        super().__init__()
        self.text_encoder = models.build_text_encoder(tokenizer)
        self.text_encoder_2 = models.build_text_encoder(tokenizer)
        self.transformer = models.build_sd3_transformer(width=width, layers=layers)
        self.label_head = nn.Linear(width, 17)
        self.tokens_seen = None
        self.transformer.transformer_blocks[label_layer].register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.tokens_seen = output[1]

    def forward(self, noisy, sigma, ids):
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        text = torch.cat([text, torch.zeros_like(text[:, :1])], 1)  # (B, 32 + 1, 128)
        pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
        velocity = self.transformer(
            noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma * 1000
        ).sample
        return velocity, self.label_head(self.tokens_seen)


def install_padding_weight() -> None:
    """TEMP"""
    import math
    import types

    from diffusers.models import attention_processor

    bias = torch.zeros(64 + models.CAPTION_TOKENS + 1)
    bias[-1] = math.log(T5_TOKENS)
    shim = types.SimpleNamespace(**vars(F))

    def sdpa(q, k, v, dropout_p=0.0, is_causal=False):
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
        return torch.softmax(scores, -1).to(v.dtype) @ v

    shim.scaled_dot_product_attention = sdpa
    attention_processor.F = shim


def split_parameters(module: nn.Module) -> tuple[list, list]:
    """(matrices inside attention and feed-forward layers, everything else)."""
    hidden, other = [], []
    for name, parameter in module.named_parameters():
        inner = any(part in name for part in (".attn.", ".ff.", ".ff_context.", ".mlp.", "self_attn"))
        (hidden if inner and parameter.ndim == 2 else other).append(parameter)
    return hidden, other


def train_sd3(work: Path, steps: int, batch: int = 64, width: int = 128, layers: int = 6) -> None:
    torch.manual_seed(4)
    install_padding_weight()
    tokenizer = models.build_tokenizer()
    data = SceneLatents(work)
    bundle = SD3Bundle(tokenizer, layers, width, label_layer=layers - 3)
    compiled = torch.compile(bundle)
    generator = torch.Generator()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((5, step))
        generator.manual_seed(step)
        latents, texts, labels = data.batch(batch, rng)
        ids = tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
        s = sigma[:, None, None, None]
        noisy = (1 - s) * latents + s * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity, logits = compiled(noisy, sigma, ids)
        flow = (velocity.float() - (noise - latents)).square().mean()
        logits = logits.float()
        color = -(labels[..., :11] * logits[..., :11].log_softmax(-1)).sum(-1).mean()
        shape = -(labels[..., 11:] * logits[..., 11:].log_softmax(-1)).sum(-1).mean()
        label = color + shape
        return {"loss": flow + 0.2 * label, "flow": flow, "label": label}

    hidden, other = split_parameters(bundle)
    optimizers = [
        torch.optim.Muon(
            hidden, lr=2e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(other, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    trainer = Trainer(bundle, optimizers, loss_fn, work / "sd3", steps)
    trainer.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["autoencoder", "sd3"])
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    if args.stage == "autoencoder":
        train_autoencoder(args.work / "autoencoder", args.steps)
    else:
        train_sd3(args.work, args.steps)


if __name__ == "__main__":
    main()
