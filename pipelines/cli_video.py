"""The command that makes videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_options import (
    ConfigFile,
    Device,
    DryRun,
    Dtype,
    Guidance,
    Json,
    Methods,
    Model,
    PromptsFile,
    Seed,
    Sets,
    Size,
    Steps,
    make,
    read_prompts,
    resolve_flags,
)


def video(
    prompt: Annotated[str | None, typer.Argument(help="what to film")] = None,
    prompts_file: PromptsFile = None,
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    config: ConfigFile = None,
    from_: Annotated[Path | None, typer.Option("--from", help="repeat this MP4")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to film")] = None,
    seed: Seed = None,
    num_videos: Annotated[int | None, typer.Option(help="videos a prompt")] = None,
    frames: Annotated[int | None, typer.Option(help="frames a video")] = None,
    fps: Annotated[int | None, typer.Option(help="frames a second, of the files")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for the videos")] = Path("outputs/video"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make videos, each as MP4 and GIF; run again, it continues where it stopped."""
    from dittune.config import read_yaml

    if from_ is None and (config is None or read_yaml(config).get("model") is None):
        model = model or "shapes-wan"
    flags = {"model": model, "negative_prompt": negative_prompt, "seed": seed, "size": size}
    flags |= {"num_images": num_videos, "frames": frames, "fps": fps, "steps": steps}
    flags |= {"guidance_scale": guidance_scale, "device": device, "dtype": dtype}
    flags |= {"prompts": read_prompts(prompt, prompts_file)}
    make(resolve_flags(config, from_, flags, method, set_), out, ".mp4", dry_run, as_json)
