"""Run a configuration: a file an image or video, written as it is ready, resumable, repeatable."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dittune
from dittune.config import RunConfig, build_methods
from dittune.errors import ConfigError
from dittune.pipelines.arguments import call_settings, check_numbers, makes_videos
from dittune.pipelines.loading import fingerprint, public_name
from dittune.pipelines.map_pictures import WatchWords, sheet
from dittune.pipelines.media import read_record, save_png
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.video import save_video

WATCHING = ("map_pictures", "head_pictures")  # they change nothing, and records leave them out


@dataclass(frozen=True)
class Job:
    """One image (a PNG) or video (an MP4) to be made."""

    prompt: str
    seed: int
    path: Path


def check(config: RunConfig) -> None:
    """What can be refused before a model is loaded.

    Raises:
        ConfigError: no prompt, an empty one, or a number or size out of range.
    """
    if not config.prompts:
        raise ConfigError("no prompt; give one, or a file with one a line")
    if any(not prompt.strip() for prompt in config.prompts):
        raise ConfigError("a prompt is empty")
    check_numbers(config)


def jobs(config: RunConfig, out: Path, suffix: str = ".png") -> list[Job]:
    """The images of a configuration; image `j` of every prompt has seed `seed + j`."""
    return [
        Job(prompt, seed, out / f"{i:04d}-{_slug(prompt)}-{seed}{suffix}")
        for i, prompt in enumerate(config.prompts)
        for seed in range(config.seed, config.seed + config.num_images)
    ]


def prepare(
    config: RunConfig, out: Path, suffix: str = ".png", show_maps: bool = False
) -> list[Job]:
    """Check everything, draw a seed if there is none, and list what is still to be made.

    Args:
        suffix: `.png` for pictures, `.mp4` for videos.
        show_maps: a picture without its maps is made again, the same, for them.

    Raises:
        ConfigError: what `check` raises; `out` cannot be written to; a picture of other settings is
            in the way.
    """
    check(config)
    if config.seed is None:
        config.seed = secrets.randbelow(2**31)
    todo = []
    weights = fingerprint(config.model)
    for job in jobs(config, out, suffix):
        if not job.path.exists():
            todo.append(job)
            continue
        record = read_record(job.path)
        if record.get("config") != _settings(config, job):
            raise ConfigError(f"{job.path} was made with other settings; choose another --out")
        if record.get("weights") != weights:
            raise ConfigError(f"{job.path} was made with other weights; choose another --out")
        if show_maps and not _maps_path(job).exists():
            todo.append(job)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".dittune-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from error
    return todo


def run(
    config: RunConfig,
    todo: list[Job],
    pipeline: Pipeline,
    show_maps: bool = False,
    maps_of: str = "",
) -> Iterator[tuple[Job, dict]]:
    """Make the images or videos one by one; yields each with its record once it is on disk.

    With `show_maps` a second picture, `NAME-maps.png`, shows where each concept was looked at;
    `maps_of` names them, else they are those of the prompt.

    Raises:
        ConfigError: the model makes videos and pictures are to be made, or the other way round.
    """
    films = makes_videos(pipeline.pipe)
    if todo and films != (todo[0].path.suffix == ".mp4"):
        made, command = ("videos", "video") if films else ("pictures", "generate")
        raise ConfigError(f"{public_name(config.model)} makes {made}; use `dittune {command}`")
    watch = WatchWords(concepts=maps_of)
    if show_maps:
        pipeline.methods = [watch, *pipeline.methods]
    arguments = call_settings(pipeline.pipe, config)
    weights = fingerprint(config.model)
    for job in todo:
        result = pipeline(job.prompt, seed=job.seed, **arguments)
        frames = result.images[0] if films else result.images
        image = frames[0]
        record = {
            "prompt": job.prompt,
            "seed": job.seed,
            "size": "{}x{}".format(*image.size),
            **({"frames": len(frames)} if films else {}),
            "config": _settings(config, job),
            "weights": weights,
            **{key: result.record[key] for key in ("device", "dtype", "versions")},
            "report": {k: v for k, v in result.record["report"].items() if k not in WATCHING},
        }
        if show_maps:
            save_png(sheet(image, watch.seen[0]), _maps_path(job), record)
        if films:
            save_video(frames, job.path, config.fps, record)
        else:
            save_png(image, job.path, record)  # without the seconds, so a repeat is the same file
        yield job, {**record, "seconds": result.record["seconds"]}


def load(config: RunConfig) -> Pipeline:
    """The pipeline of a configuration, its methods included."""
    methods = list(build_methods(config).values())
    return Pipeline.from_pretrained(config.model, methods, device=config.device, dtype=config.dtype)


def recorded(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration that makes a picture again, and warnings of what differs by now.

    Raises:
        ConfigError: the picture cannot be read, or holds no configuration that makes it alone.
    """
    record = read_record(path)
    if not isinstance(record.get("config"), dict):
        raise ConfigError(f"the record in {path} holds no configuration")
    if "subjects" in record["config"]:
        raise ConfigError(f"{path} is of a story; `dittune story` makes it with its references")
    versions = record.get("versions")
    warnings = [
        f"made with {name} {version}, this is {_version(name)}; bits may differ"
        for name, version in (versions if isinstance(versions, dict) else {}).items()
        if version != _version(name)
    ]
    return dict(record["config"]), warnings


def check_recorded_model(name: Any) -> None:
    """A record holds the bare name of a local folder: refuse one that cannot be found by it.

    Raises:
        ConfigError: neither bundled, nor a folder here, nor a hub id.
    """
    name = str(name)
    if "/" not in name and name not in dittune.available_checkpoints() and not os.path.isdir(name):
        raise ConfigError(f"the picture was made with the local model {name!r}; add --model FOLDER")


def other_weights(path: Path, model: str) -> list[str]:
    """A warning if a picture was made with other weights than `model` has now."""
    recorded = read_record(path).get("weights")
    if recorded in (None, fingerprint(model)):
        return []
    return [f"{path} was made with other weights than those of {model}; it will look different"]


def _maps_path(job: Job) -> Path:
    return job.path.with_name(f"{job.path.stem}-maps.png")


def _version(name: str) -> str:
    if name == "dittune":
        return dittune.__version__
    try:
        return importlib.metadata.version(name)
    except (ValueError, importlib.metadata.PackageNotFoundError):
        return "not installed"


def _settings(config: RunConfig, job: Job) -> dict[str, Any]:
    """The configuration of one image alone, without local paths."""
    alone = dataclasses.replace(config, prompts=[job.prompt], seed=job.seed, num_images=1)
    return {**dataclasses.asdict(alone), "model": public_name(config.model)}


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"
