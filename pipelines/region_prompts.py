"""`--region "x0,y0,x1,y1: PHRASE"`: prompts that name each region, and the setting of `regions`."""

from __future__ import annotations

from collections.abc import Sequence

from dittune.errors import ConfigError
from dittune.subjects.boxes import parse_boxes


def joined(regions: Sequence[str]) -> str:
    """The regions, each `x0,y0,x1,y1: PHRASE`, as `regions.regions` takes them.

    Raises:
        ConfigError: one is not written so.
    """
    if any(";" in region or not parse_boxes(region) for region in regions):
        raise ConfigError("a region is written 'x0,y0,x1,y1: PHRASE'; give --region once for each")
    return "; ".join(regions)


def naming(prompts: Sequence[str], regions: Sequence[str]) -> list[str]:
    """The prompts, with the phrases of regions that they lack.

    Args:
        prompts: none stands for one that the regions alone make.
    """
    phrases = [parse_boxes(region)[0][1] for region in regions]
    return [_naming(prompt, phrases) for prompt in prompts or [""]]


def _naming(prompt: str, phrases: Sequence[str]) -> str:
    missing = [phrase for phrase in phrases if phrase.lower() not in prompt.lower()]
    parts = [prompt.strip(), *missing] if prompt.strip() else missing
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
