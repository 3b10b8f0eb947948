"""Stage two: the MM-DiT of `shapes-sd3` and its two text encoders, trained together from scratch.

Flow matching on the autoencoder's latents, captions dropped 10 % of the time. A linear head on one
middle block also has to say which colour and shape each image token belongs to; it is dropped
afterwards, and makes the model learn objects several times sooner.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import nn

from dittune.call import AttnCall, Site
from dittune.method import Method
from dittune.models import sd3
from dittune.run import Run
from dittune.samples.shapes import data, loss_curve, models
from dittune.samples.shapes.trainer import Trainer, processes
from dittune.seam import Link, make_processor, stock_attention

T5_TOKENS = 256  # without T5, StableDiffusion3Pipeline appends this many zero vectors to the text
IMAGE_TOKENS = 64


class PaddingWeight(Method):
    """Let one text token stand for many equal ones: `log(count)` is added to its attention logit.

    The zero vectors that stand in for a missing T5 encoder have no position, so all of them stay
    equal through every block. Weighing one of them is exact and trains 3.6 times faster.
    """

    replaces_attention: ClassVar[bool] = True

    def attend(self, call: AttnCall, proceed) -> torch.Tensor:
        logits = (call.query @ call.key.transpose(-1, -2)).float() * call.query.shape[-1] ** -0.5
        return torch.softmax(logits + call.state, -1).to(call.value.dtype) @ call.value

    def site_state(self, site: Site, device: torch.device) -> torch.Tensor:
        bias = torch.zeros(IMAGE_TOKENS + models.CAPTION_TOKENS + 1, device=device)
        bias[-1] = math.log(T5_TOKENS)
        return bias


def install_padding_weight(transformer: nn.Module) -> None:
    """Put `PaddingWeight` into every site, for good: a training process needs no `attach`."""
    method = PaddingWeight()
    for site in sd3.sites(transformer):
        block = transformer.get_submodule(site.name)
        block.processor = make_processor(block.processor, site, expected_calls=1)
        installed = block.processor.installed
        installed.run = Run()
        installed.run.roles = ("cond",)
        side = int(IMAGE_TOKENS**0.5)
        inputs = {"hidden_states": torch.empty(1, 4, 2 * side, 2 * side)}
        inputs["encoder_hidden_states"] = torch.empty(1, models.CAPTION_TOKENS + 1, 1)
        installed.run.layouts = sd3.layouts(transformer, inputs)
        installed.chain = Link(
            method, method.site_state(site, torch.device("cpu")), stock_attention
        )


class SD3Bundle(nn.Module):
    """What is trained together: transformer, both text encoders, and a label head to be dropped."""

    def __init__(self, tokenizer, layers: int, width: int, label_layer: int):
        super().__init__()
        self.text_encoder = models.build_text_encoder(tokenizer)
        self.text_encoder_2 = models.build_text_encoder(tokenizer)
        self.transformer = models.build_sd3_transformer(width=width, layers=layers)
        self.label_head = nn.Linear(width, data.LABELS)
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


def split_parameters(module: nn.Module) -> tuple[list, list]:
    """(matrices inside attention and feed-forward layers, everything else)."""
    hidden, other = [], []
    for name, parameter in module.named_parameters():
        inner = any(
            part in name for part in (".attn.", ".ff.", ".ff_context.", ".mlp.", "self_attn")
        )
        (hidden if inner and parameter.ndim == 2 else other).append(parameter)
    return hidden, other


def train(work: Path, steps: int, init: Path | None = None, batch: int = 64) -> None:
    """Train `work/sd3`; `export` makes a pipeline of it.

    Args:
        init: an exported pipeline folder whose weights a new training starts from.
    """
    width, layers = 128, 6
    torch.manual_seed(4)
    tokenizer = models.build_tokenizer()
    vae = work / "autoencoder" / "vae"
    scenes = data.SceneLatents(work, vae if init is None else init / "vae")
    bundle = SD3Bundle(tokenizer, layers, width, label_layer=layers - 3)
    install_padding_weight(bundle.transformer)
    if init is not None:
        _load_weights(bundle, init)
    compiled = torch.compile(bundle)
    generator = torch.Generator()
    rank, world_size = processes()
    batch //= world_size

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((5, step, rank))
        generator.manual_seed(step * world_size + rank)
        latents, texts, labels = scenes.batch(batch, rng)
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
        s = sigma[:, None, None, None]
        noisy = (1 - s) * latents + s * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity, logits = compiled(noisy, sigma, ids)
        flow = (velocity.float() - (noise - latents)).square().mean()
        logits, colors = logits.float(), data.COLOR_LABELS
        color = -(labels[..., :colors] * logits[..., :colors].log_softmax(-1)).sum(-1).mean()
        shape = -(labels[..., colors:] * logits[..., colors:].log_softmax(-1)).sum(-1).mean()
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


def _load_weights(bundle: SD3Bundle, folder: Path) -> None:
    """Take over the weights of an exported pipeline; the label head starts anew."""
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        (path,) = (folder / name).glob("*.safetensors")
        weights = {key: value.float() for key, value in load_file(path).items()}
        getattr(bundle, name).load_state_dict(weights)


def export(work: Path, out: Path, shift: float = 4.0) -> None:
    """Write the averaged weights as an ordinary pipeline folder in half precision."""
    state = torch.load(work / "sd3" / "state.pt", weights_only=True, map_location="cpu")
    tokenizer = models.build_tokenizer()
    width, layers = state["ema"]["label_head.weight"].shape[1], 0
    while f"transformer.transformer_blocks.{layers}.attn.to_q.weight" in state["ema"]:
        layers += 1
    bundle = SD3Bundle(tokenizer, layers, width, label_layer=layers - 3)
    bundle.load_state_dict(state["ema"])
    pipe = StableDiffusion3Pipeline(
        transformer=bundle.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=AutoencoderKL.from_pretrained(work / "autoencoder" / "vae"),
        text_encoder=bundle.text_encoder,
        text_encoder_2=bundle.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=models.build_silent_t5(),
        tokenizer_3=models.build_silent_t5_tokenizer(),
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for stage in ("autoencoder", "sd3"):
        log = work / stage / "loss.csv"
        (out / f"loss-{stage}.csv").write_bytes(log.read_bytes())
        picture = loss_curve.draw(loss_curve.read_log(log), f"shapes-sd3, stage {stage}")
        (out / f"loss-{stage}.svg").write_text(picture)
