"""The command that repeats what the page has made, to the bit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from dittune.config import RunConfig, resolve

YAML_NAME = "run.yaml"


def picture_command(config: RunConfig, extra: Sequence[str] = ()) -> str:
    """`dittune generate` for the one picture of a configuration."""
    return _joined(["dittune", "generate"], config, _prompt(config), extra)


def video_command(config: RunConfig) -> str:
    """`dittune video` for the one video of a configuration."""
    return _joined(["dittune", "video"], config, _prompt(config), ["--fps", str(config.fps)])


def story_command(config: RunConfig, subjects: Sequence[str], masks: str) -> str:
    """`dittune story`, after its scenes are written into a file."""
    scenes = "printf '%s\\n' " + shlex.join(config.prompts) + " > scenes.txt && "
    named = [f"--subject={subject}" for subject in subjects]
    extra = [*named, "--scenes", "scenes.txt", "--masks", masks]
    return scenes + _joined(["dittune", "story"], config, [], extra)


def yaml_command(verb: str, extra: Sequence[str] = ()) -> str:
    """The command that runs the YAML of a result, saved as `run.yaml`."""
    return shlex.join(["dittune", verb, "--config", YAML_NAME, *extra])


def _prompt(config: RunConfig) -> list[str]:
    (prompt,) = config.prompts
    return ["--", prompt] if prompt.startswith("-") else [prompt]


def _joined(
    command: list[str], config: RunConfig, prompt: Sequence[str], extra: Sequence[str]
) -> str:
    words = [*command, *(() if prompt[:1] == ["--"] else prompt), "--model", config.model]
    for name in ("seed", "steps", "guidance_scale", "frames"):
        if getattr(config, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    for name in ("negative_prompt", "size", "device", "dtype"):
        if getattr(config, name) != getattr(RunConfig, name):
            words.append(f"--{name.replace('_', '-')}={getattr(config, name)}")
    for label, settings in config.methods.items():
        words += ["--method", label]
        plain = resolve({"model": config.model}, [label]).methods[label]
        for key, value in settings.items():
            if value != plain[key]:
                words += ["--set", f"{label}.{key}={_written(value)}"]
    return shlex.join([*words, *extra, *(prompt if prompt[:1] == ["--"] else ())])


def _written(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
