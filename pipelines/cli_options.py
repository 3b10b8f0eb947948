"""What the commands share: options, reading of prompts and flags, and printing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Option(help="bundled name, local folder or hub id")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="NAME or LABEL=NAME")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="METHOD.FIELD=VALUE")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
PromptsFile = Annotated[Path | None, typer.Option(help="one prompt a line")]
Seed = Annotated[int | None, typer.Option(help="drawn at random if absent")]
Size = Annotated[str | None, typer.Option(help="SIDE or WIDTHxHEIGHT in pixels")]
DryRun = Annotated[bool, typer.Option(help="print the resolved configuration only")]
Steps = Annotated[int | None, typer.Option(help="denoising steps")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance; 1 is off")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16")]


def say(text: str) -> None:
    """To standard error: standard output carries results only."""
    print(text, file=sys.stderr)


def emit(document: Any) -> None:
    """The one JSON document of a command."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def read_prompts(prompt: str | None, prompts_file: Path | None) -> list[str] | None:
    """The prompt, or those of a file, one a line."""
    from dittune.errors import ConfigError

    if prompts_file is None:
        return None if prompt is None else [prompt]
    if prompt is not None:
        raise ConfigError("give either a prompt or --prompts-file, not both")
    from dittune.pipelines.arguments import read_lines

    return read_lines(prompts_file)


def parse_counts(text: str) -> list[int]:
    """`2,3` as `[2, 3]`."""
    from dittune.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise ConfigError(f"numbers are written like 2,3, got {text!r}") from error


def resolve_flags(config: Path | None, source: Path | None, flags: dict, method, set_) -> Any:
    """The configuration of a file or of a recorded picture, with flags on top."""
    from dittune.config import read_yaml, resolve

    content: dict[str, Any] = {}
    if source is not None:
        from dittune.pipelines import generate as generation

        content, warnings = generation.recorded(source)
        for warning in warnings:
            say(f"warning: {warning}")
    if config is not None:
        content |= read_yaml(config)
    content |= {key: value for key, value in flags.items() if value is not None}
    if source is not None:
        generation.check_recorded_model(content.get("model"))
        for warning in generation.other_weights(source, str(content["model"])):
            say(f"warning: {warning}")
    return resolve(content, method or (), set_ or ())


def make(
    config: Any, out: Path, suffix: str, dry_run: bool, as_json: bool, maps_of: str | None = None
) -> None:
    """What `generate` and `video` do with a resolved configuration.

    Args:
        maps_of: concepts to draw maps of; "" are those of the prompt, None draws nothing.
    """
    from dittune.config import write_yaml
    from dittune.pipelines import generate as generation

    if dry_run:
        generation.check(config)
        emit(vars(config)) if as_json else print(write_yaml(config), end="")
        return
    what = "videos" if suffix == ".mp4" else "images"
    drawn = config.seed is None
    todo = generation.prepare(config, out, suffix, maps_of is not None)
    pipeline = generation.load(config) if todo else None
    total = len(config.prompts) * config.num_images
    if len(todo) < total:
        say(f"{total - len(todo)} of {total} {what} are there already")
    made = []
    shown = generation.run(config, todo, pipeline, maps_of is not None, maps_of or "")
    try:
        for job, record in shown if todo else ():
            if drawn and not made:
                say(f"seed {config.seed}")
            made.append({"path": str(job.path), **record})
            if not as_json:
                print(job.path)
    except KeyboardInterrupt:
        if drawn and not made:
            say(f"continue with --seed {config.seed}")
        raise
    if as_json:
        emit({what: made, "skipped": total - len(todo)})
