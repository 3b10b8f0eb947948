"""Pictures on disk: atomic PNGs that carry their record, and labelled grids."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dittune.errors import ConfigError
from dittune.pipelines.video import read_comment

RECORD_KEY = "dittune"  # iTXt chunk with the record as JSON; `parameters` is for other viewers


def save_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Write a PNG with its record in text chunks; the file is there whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", _parameters_line(record))
    info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    temporary = path.with_name(path.name + ".part")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a PNG written by `save_png`, or an MP4 by `save_video`.

    Raises:
        ConfigError: no such file, or one without a record.
    """
    if Path(path).suffix == ".mp4":
        return _parse_record(read_comment(Path(path)), path)
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(RECORD_KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"cannot read picture {path}: {error}") from error
    return _parse_record(text, path)


def _parse_record(text: str | None, path: str | Path) -> dict[str, Any]:
    if text is None:
        raise ConfigError(
            f"{path} carries no dittune record; only PNGs and MP4s written by dittune do"
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the record in {path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"the record in {path} is damaged: expected settings by name")
    return record


def _parameters_line(record: dict[str, Any]) -> str:
    config = record.get("config", {})
    pairs = {
        "Steps": config.get("steps"),
        "CFG scale": config.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": record.get("size"),
        "Model": config.get("model"),
        "Methods": ", ".join(config.get("methods", {})) or None,
    }
    line = ", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None)
    negative = config.get("negative_prompt")
    lines = [record.get("prompt", ""), f"Negative prompt: {negative}" if negative else "", line]
    return "\n".join(filter(None, lines))


def grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 2,
) -> Image.Image:
    """Pictures of one size side by side, enlarged `scale` times, each with a label above it."""
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(size=11)
    band = 30 if labels else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + band + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = (i % columns) * (width + 4), (i // columns) * (height + band + 4)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y + band))
        if labels:
            pen.text((x, y), _wrap(labels[i], font, width, lines=2), font=font, fill="black")
    return sheet


def table(
    images: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str], scale: int = 2
) -> Image.Image:
    """Pictures of one size, row by row, with the names of rows at the left and of columns above."""
    body = grid(images, len(columns), scale=scale)
    left, top, font = 116, 60, ImageFont.load_default(size=11)
    sheet = Image.new("RGB", (left + body.width, top + body.height), "white")
    sheet.paste(body, (left, top))
    pen = ImageDraw.Draw(sheet)
    width, height = (body.size[0] // len(columns), body.size[1] // len(rows))
    for i, name in enumerate(columns):
        said = _wrap(name, font, width - 8, lines=3)
        pen.text((left + i * width, top - 4), said, font=font, fill="black", anchor="ld")
    for i, name in enumerate(rows):
        said = _wrap(name, font, left - 8, lines=6)
        pen.text((4, top + (i + 0.5) * height), said, font=font, fill="black", anchor="lm")
    return sheet


def _wrap(text: str, font, width: int, lines: int) -> str:
    wrapped = [""]
    for word in _breakable(text, font, width).split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1].rstrip() + " ..."]
    return "\n".join(wrapped)


def _breakable(text: str, font, width: int) -> str:
    """The text with words that are wider than a line broken after signs."""
    words = []
    for word in text.split():
        if font.getlength(word) > width:
            word = re.sub(r"([=,;@])(?=\S)", r"\1 ", word)
        words.append(word)
    return " ".join(words)
