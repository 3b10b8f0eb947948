"""Write a trained family as an ordinary pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dittune.samples.shapes import loss_curve
from dittune.samples.shapes.train_denoiser import FAMILIES


def export(family: str, work: Path, out: Path) -> None:
    """Write the averaged weights in half precision, the loss logs, and pictures of these."""
    state = torch.load(work / family / "state.pt", weights_only=True, map_location="cpu")
    bundle = FAMILIES[family]()
    bundle.load_state_dict(state["ema"])
    pipe = bundle.pipeline(AutoencoderKL.from_pretrained(work / "autoencoder" / "vae"))
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.json"):
        forget_origin(path)
    for stage in ("autoencoder", family):
        log = work / stage / "loss.csv"
        (out / f"loss-{stage}.csv").write_bytes(log.read_bytes())
        picture = loss_curve.draw(loss_curve.read_log(log), f"shapes-{family}, stage {stage}")
        (out / f"loss-{stage}.svg").write_text(picture)


def forget_origin(path: Path) -> None:
    """Take the folder a part was loaded from out of its configuration."""
    config = json.loads(path.read_text())
    if "_name_or_path" in config:
        del config["_name_or_path"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
