"""Write a trained family as an ordinary pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dittune.samples.shapes import loss_curve
from dittune.samples.shapes.train_denoiser import AUTOENCODERS, FAMILIES


def export(family: str, work: Path, out: Path) -> None:
    """Write the averaged weights in half precision, the loss logs, and pictures of these."""
    state = torch.load(work / family / "state.pt", weights_only=True, map_location="cpu")
    bundle = FAMILIES[family]()
    bundle.load_state_dict(state["ema"])
    vae_class = AUTOENCODERS[bundle.autoencoder][0]
    pipe = bundle.pipeline(vae_class.from_pretrained(work / bundle.autoencoder / "vae"))
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.json"):
        tidy_config(path)
    for stage in (bundle.autoencoder, family):
        log = work / stage / "loss.csv"
        (out / f"loss-{stage}.csv").write_bytes(log.read_bytes())
        picture = loss_curve.draw(loss_curve.read_log(log), f"shapes-{family}, stage {stage}")
        (out / f"loss-{stage}.svg").write_text(picture)


def tidy_config(path: Path) -> None:
    """Forget the folder a part was loaded from, and load in full precision unless told otherwise.

    Otherwise `from_pretrained` would load text encoders in half precision and the rest in full.
    """
    config = json.loads(path.read_text())
    tidy = {key: value for key, value in config.items() if key != "_name_or_path"}
    if "dtype" in tidy:
        tidy["dtype"] = "float32"
    if tidy != config:
        path.write_text(json.dumps(tidy, indent=2, sort_keys=True) + "\n")
