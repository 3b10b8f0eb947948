"""Videos on disk: an MP4 that carries its record, written whole or not at all, and a GIF beside it.

The MP4 is H.264 as any player reads it; the GIF has the frames as they are, but for 256 colours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from dittune.errors import ConfigError

QUALITY = "12"  # constant rate factor of H.264; 18 is where losses begin to be seen


def save_video(frames: Sequence[Image.Image], path: Path, fps: int, record: dict[str, Any]) -> None:
    """Write `path`, an MP4 with its record as comment, and first the same as GIF beside it.

    Raises:
        ConfigError: a side is odd, which H.264 for all players cannot have.
    """
    width, height = frames[0].size
    if width % 2 or height % 2:
        raise ConfigError(f"an MP4 has even sides, got {width}x{height}; choose another size")
    comment = json.dumps(record, ensure_ascii=False)
    written = (_write_gif, path.with_suffix(".gif")), (_write_mp4, path)
    for write, place in written:  # who finds the MP4 finds both
        temporary = place.with_name(place.name + ".part")
        try:
            write(frames, temporary, fps, comment)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def _write_gif(frames: Sequence[Image.Image], path: Path, fps: int, comment: str) -> None:
    first, *rest = (frame.convert("RGB") for frame in frames)
    duration = round(1000 / fps)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def _write_mp4(frames: Sequence[Image.Image], path: Path, fps: int, comment: str) -> None:
    with av.open(path, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        # Its faster code depends on where in memory a frame lies, and so would the file.
        options = {"crf": QUALITY, "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_image(frame.convert("RGB"))
            picture.pts, picture.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def read_comment(path: Path) -> str | None:
    """The record in an MP4 written by `save_video`, as text; None if there is none.

    Raises:
        ConfigError: no such video, or a damaged one.
    """
    try:
        with av.open(path) as container:
            return container.metadata.get("comment")
    except (OSError, av.FFmpegError) as error:
        raise ConfigError(f"cannot read video {path}: {error}") from error


def read_frames(path: Path) -> list[Image.Image]:
    """The frames of a video, for tests and tools."""
    with av.open(path) as container:
        return [frame.to_image() for frame in container.decode(video=0)]
