"""What the page makes: pairs of pictures or videos, looks at attention, stories. No gradio here."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dittune.config import RunConfig, build_methods
from dittune.errors import ConfigError
from dittune.method import Method
from dittune.methods.softpag import SoftPAG
from dittune.pipelines.arguments import image_size
from dittune.pipelines.demo.studio import Studio, Watch, WatchedPipeline
from dittune.pipelines.demo.uploads import MASKS, keep_masks
from dittune.pipelines.generate import check, jobs, run
from dittune.pipelines.head_pictures import WatchHeads
from dittune.pipelines.map_pictures import WatchWords, overlay
from dittune.pipelines.story import Story

MOST = {"steps": 200, "frames": 129}  # one user of a shared page does not hold the model for hours
MOST_PIXELS = 1536**2
MOST_LETTERS = 2000  # of a prompt
MOST_SCENES = 8
MOST_SUBJECTS = 8
MOST_REFINEMENTS = 50  # within a step, which cannot be cancelled


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed without methods and with them.

    Attributes:
        before: None if the configuration has no method.
        masks: copies of the user's masks, named as the configuration wants them.
    """

    config: RunConfig
    before: Path | None
    after: Path
    masks: tuple[Path, ...]
    seconds: float


@dataclass(frozen=True)
class Look:
    """One picture and where it was looked at.

    Attributes:
        words: the picture under the map of each word.
        heads: by `layer:head`, how widely it looks, 0 to 1.
    """

    config: RunConfig
    picture: Path
    words: list[tuple[Image.Image, str]]
    heads: dict[str, float]


@dataclass(frozen=True)
class Told:
    """A story: its pictures with their prompts, and all of them on one sheet.

    Attributes:
        plain: the scenes of the same seeds without methods and references.
    """

    config: RunConfig
    references: list[tuple[str, str]]
    plain: list[tuple[str, str]]
    scenes: list[tuple[str, str]]
    sheet: Path


def check_limits(config: RunConfig) -> None:
    """Refuse what a shared page should not do.

    Raises:
        ConfigError: what `generate.check` refuses, or a number, a size or a setting of a method
            beyond the page's limits.
    """
    check(config)
    for label, settings in config.methods.items():
        if settings.get("refinements", 0) > MOST_REFINEMENTS:
            raise ConfigError(f"{label}: the page makes at most {MOST_REFINEMENTS} refinements")
        if max(map(len, map(str, settings.values()))) > MOST_LETTERS:
            raise ConfigError(f"{label}: the page takes settings of at most {MOST_LETTERS} letters")
    for name, most in MOST.items():
        if (getattr(config, name) or 0) > most:
            raise ConfigError(f"the page makes at most {most} {name}, got {getattr(config, name)}")
    width, height = image_size(config) or (1, 1)
    if width * height > MOST_PIXELS:
        raise ConfigError(f"the page makes at most {MOST_PIXELS} pixels, got {width}x{height}")
    if max(map(len, [*config.prompts, config.negative_prompt])) > MOST_LETTERS:
        raise ConfigError(f"the page takes prompts of at most {MOST_LETTERS} letters")
    if len(config.prompts) > MOST_SCENES:
        raise ConfigError(f"the page makes at most {MOST_SCENES} scenes of a story")


def make_pair(
    studio: Studio, watch: Watch, config: RunConfig, masks: Sequence[str] = (), suffix: str = ".png"
) -> Pair:
    """Make a picture (or a video, `.mp4`) without and with the methods of a configuration.

    Args:
        masks: files, one for each subject; the methods find them in the folder `masks`.
    """
    check_limits(config)
    folder, started = studio.new_folder(), time.perf_counter()
    kept = keep_masks(masks, folder)
    acting = _methods(config, folder)
    with studio.lend(config.model, watch) as pipeline:
        before = None
        if acting:
            plain = dataclasses.replace(config, methods={})
            _tell(pipeline, "Without the method", 0.0, 0.5)
            before = _make(pipeline, plain, [], folder / "before", suffix)
        title = "With the method" if acting else "Making it"
        _tell(pipeline, title, 0.5 if acting else 0.0, 1.0)
        after = _make(pipeline, config, acting, folder / "after", suffix)
    return Pair(config, before, after, tuple(kept), time.perf_counter() - started)


def look(studio: Studio, watch: Watch, config: RunConfig) -> Look:
    """Make the plain picture, and see where each of its words and heads looks."""
    check_limits(config)
    (prompt,) = config.prompts
    words, heads = WatchWords(concepts=words_of(prompt)), WatchHeads()
    with studio.lend(config.model, watch) as pipeline:
        _tell(pipeline, "Watching the attention", 0.0, 1.0)
        path = _make(pipeline, config, [words, heads], studio.new_folder() / "look", ".png")
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    covered = [(overlay(image, values), word) for word, values in words.seen[0].items()]
    return Look(config, path, covered, dict(heads.seen))


def with_heads(config: RunConfig, heads: str, u: float, scale: float) -> RunConfig:
    """The configuration with some heads perturbed by `softpag`."""
    method = SoftPAG(heads=heads, u=u, scale=scale)
    if not method.heads:
        raise ConfigError("choose a head: click one, or write layer:head, such as 2:1")
    return dataclasses.replace(config, methods={"softpag": dataclasses.asdict(method)})


def tell_story(
    studio: Studio, watch: Watch, config: RunConfig, subjects: Sequence[str], masks: str
) -> Told:
    """Make the references and scenes of a story, and each scene without both."""
    check_limits(config)
    if len(subjects) > MOST_SUBJECTS or max(map(len, subjects), default=0) > MOST_LETTERS:
        raise ConfigError(
            f"the page takes at most {MOST_SUBJECTS} subjects of at most {MOST_LETTERS} letters"
        )
    folder = studio.new_folder()
    story = Story(config, subjects, masks, folder)
    plain, count = [], len(config.prompts)
    with studio.lend(config.model, watch) as pipeline:
        for k, prompt in enumerate(config.prompts):
            _tell(pipeline, f"Scene {k + 1} of {count} alone", k / count / 3, (k + 1) / count / 3)
            alone = dataclasses.replace(config, prompts=[prompt], methods={}, seed=story.seed_of(k))
            plain.append((str(_make(pipeline, alone, [], folder / f"plain-{k}", ".png")), prompt))
        pipeline.methods = _methods(config, folder)
        _tell(pipeline, "References", 1 / 3, 1 / 2)
        for k, _ in enumerate(story.run(pipeline), start=1):
            _tell(pipeline, f"Scene {k + 1} of {count}", *((1 + x / count) / 2 for x in (k, k + 1)))
    references, scenes = (
        [(str(story.path(name, i)), text) for i, text in enumerate(texts)]
        for name, texts in (("reference", subjects), ("scene", config.prompts))
    )
    return Told(config, references, plain, scenes, story.sheet)


def words_of(prompt: str) -> str:
    """Each word of a prompt once, as the methods take concepts."""
    words = dict.fromkeys(word.lower() for word in re.findall(r"[^\W\d_][\w'\u2019-]*", prompt))
    small = {"a", "an", "the", "and", "of"}
    return ", ".join([word for word in words if word not in small] or words)


def _methods(config: RunConfig, folder: Path) -> list[Method]:
    """The methods of a configuration; masks that were uploaded are in the request's folder."""
    placed = {
        label: settings | ({"masks": str(folder / MASKS)} if settings.get("masks") == MASKS else {})
        for label, settings in config.methods.items()
    }
    return list(build_methods(dataclasses.replace(config, methods=placed)).values())


def _tell(pipeline: WatchedPipeline, title: str, first: float, last: float) -> None:
    pipeline.title, pipeline.part = title, (first, last)


def _make(
    pipeline: WatchedPipeline, config: RunConfig, methods: Sequence[Method], out: Path, suffix: str
) -> Path:
    """The file that `dittune generate` (or `video`) writes for this configuration."""
    out.mkdir()
    pipeline.methods = list(methods)
    ((job, _),) = run(config, jobs(config, out, suffix), pipeline)
    return job.path
