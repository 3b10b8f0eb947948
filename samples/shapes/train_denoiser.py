"""Stage two: a denoiser and its text encoders, trained together from scratch on latents.

Captions are dropped 10 % of the time. A linear head on one middle block also has to say which
colour and shape each image token belongs to; it is dropped afterwards, and makes the model learn
objects several times sooner.

A family is one `nn.Module`, its bundle, with

- `parts`: names of its modules that end up in the pipeline;
- `matrices`: a pattern of parameter names; the matrices among them are trained with Muon;
- `loss_name`: what the loss log calls the error of the prediction;
- `autoencoder`: the stage that trains its autoencoder, a key of `AUTOENCODERS`;
- `compiles`: whether `torch.compile` was seen to compute its gradients right;
- `has_shifted_latents`: whether the pipeline knows the autoencoder's `shift_factor`;
- `prepare(latents, texts, generator)` -> (inputs of `forward`, target);
- `forward(*inputs)` -> (prediction, label logits `[B, tokens, 17]`);
- `pipeline(vae)` -> an ordinary diffusers pipeline.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import nn

from dittune.checkpoints import available_checkpoints, checkpoint
from dittune.samples.shapes import data
from dittune.samples.shapes.bundle_flux import FluxBundle
from dittune.samples.shapes.bundle_sd import SDBundle
from dittune.samples.shapes.bundle_sd3 import SD3Bundle
from dittune.samples.shapes.bundle_wan import WanBundle
from dittune.samples.shapes.clip_data import ClipLatents
from dittune.samples.shapes.trainer import Trainer, processes

FAMILIES = {"sd3": SD3Bundle, "flux": FluxBundle, "sd": SDBundle, "wan": WanBundle}

# stage -> (class, what it is for, the bundled checkpoint that has it)
AUTOENCODERS = {
    "autoencoder": (AutoencoderKL, data.SceneLatents, "shapes-sd3"),
    "video_autoencoder": (AutoencoderKLWan, ClipLatents, "shapes-wan"),
}


@contextmanager
def written_out_attention() -> Iterator[None]:
    """PyTorch's attention core replaced by its formula.

    On a CPU the backward of its bfloat16 kernel is several times slower than these products.
    """
    core = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = core


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` with its softmax in float32."""
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention written out has no dropout and no grouped heads")
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores @ key.transpose(-1, -2)).float()
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


def split_parameters(bundle: nn.Module) -> tuple[list, list]:
    """(matrices inside attention and feed-forward layers, everything else)."""
    hidden, other = [], []
    for name, parameter in bundle.named_parameters():
        is_hidden = re.search(bundle.matrices, name) and parameter.ndim == 2
        (hidden if is_hidden else other).append(parameter)
    return hidden, other


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of colour plus that of shape, `[B, tokens, 17]` each."""
    logits, colors = logits.float(), data.COLOR_LABELS
    color = -(labels[..., :colors] * logits[..., :colors].log_softmax(-1)).sum(-1).mean()
    shape = -(labels[..., colors:] * logits[..., colors:].log_softmax(-1)).sum(-1).mean()
    return color + shape


def train(
    family: str,
    work: Path,
    steps: int,
    init: Path | None = None,
    batch: int = 64,
    scenes: int | None = None,
    compiled: bool = True,
    marked: float = 0.0,
    missing: float = 0.0,
    twins: float = 0.0,
    stills: float = 0.0,
) -> None:
    """Train `work/FAMILY`; `export` makes a pipeline of it.

    Args:
        init: an exported pipeline folder whose weights a new training starts from.
        batch: pictures or clips per step, over all processes.
        scenes: how many training scenes or clips there are; None is the usual number.
        compiled: run through `torch.compile`.
        marked: share of objects with a mark, which no caption names (`marks.py`).
        missing: probability that a picture lacks a named object (`SceneLatents`).
        twins: probability with which an object has a twin of the same mark.
        stills: share of the steps that come first and show only the first frame of each clip:
            they teach colours and shapes in a third of the time.
    """
    rank, world_size = processes()
    if rank > 0:
        dist.barrier()  # the first process writes the autoencoder and the latents
    stage = FAMILIES[family].autoencoder
    shares = {"marked": marked, "missing": missing, "twins": twins}
    if any(shares.values()) and stage != "autoencoder":
        raise ValueError(f"{', '.join(shares)} objects are for pictures, {family} makes clips")
    if stills and stage == "autoencoder":
        raise ValueError(f"stills are the first frames of clips, {family} makes pictures")
    vae = provide_autoencoder(work, init, stage)
    options = {"count": scenes} if scenes else {}
    options |= {name: share for name, share in shares.items() if share}
    drawn = AUTOENCODERS[stage][1](work, vae, **options)
    if rank == 0 and world_size > 1:
        dist.barrier()
    torch.manual_seed(4)
    bundle = FAMILIES[family]()
    if init is not None:
        load_weights(bundle, init)
    offset = 0.0 if bundle.has_shifted_latents else latent_shift(vae)
    forward = torch.compile(bundle, dynamic=False) if compiled and bundle.compiles else bundle
    generator = torch.Generator()

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((5, step, rank))
        generator.manual_seed(step * world_size + rank)
        latents, texts, labels = drawn.batch(batch // world_size, rng)
        if step < stills * steps:
            labels = labels[:, : labels.shape[1] // latents.shape[2]]
            latents = latents[:, :, :1]
        inputs, target = bundle.prepare(latents + offset, texts, generator)
        with torch.autocast("cpu", torch.bfloat16), written_out_attention():
            prediction, logits = forward(*inputs)
        error = (prediction.float() - target).square().mean()
        label = label_loss(logits, labels)
        return {"loss": error + 0.2 * label, bundle.loss_name: error, "label": label}

    hidden, other = split_parameters(bundle)
    optimizers = [
        torch.optim.Muon(
            hidden, lr=2e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(other, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    Trainer(bundle, optimizers, loss_fn, work / family, steps).run()


def provide_autoencoder(work: Path, init: Path | None = None, stage: str = "autoencoder") -> Path:
    """The folder of the autoencoder of `work`; where it has none, `init`'s or the bundled one.

    Raises:
        ValueError: `init` was trained on another autoencoder than that of `work`, or there is none.
    """
    folder = work / stage
    if init is None and (folder / "vae").exists():
        return folder / "vae"
    bundled = AUTOENCODERS[stage][2]
    if init is None and bundled not in available_checkpoints():
        raise ValueError(f"{folder} holds no autoencoder, nor does {bundled}; train {stage} first")
    source = Path(checkpoint(bundled)) if init is None else init
    if not (folder / "vae").exists():
        shutil.copytree(source / "vae", folder / "vae")
        shutil.copy(source / f"loss-{stage}.csv", folder / "loss.csv")
    ours, theirs = (_scaling(path / "vae") for path in (folder, source))
    if init is not None and ours != theirs:
        raise ValueError(f"{init} and {folder} have different autoencoders; use another --work")
    return folder / "vae"


def _scaling(folder: Path) -> list:
    """What tells trained autoencoders apart: the statistics of their latents."""
    config = AutoencoderKL.load_config(folder)
    return [config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std")]


def latent_shift(vae: Path) -> float:
    """What `SceneLatents` took off the scaled latents."""
    config = AutoencoderKL.load_config(vae)
    return config["shift_factor"] * config["scaling_factor"]


def load_weights(bundle: nn.Module, folder: Path) -> None:
    """Take over the weights of an exported pipeline; the label head starts anew."""
    for name in bundle.parts:
        part = getattr(bundle, name)
        part.load_state_dict(type(part).from_pretrained(folder / name).float().state_dict())
